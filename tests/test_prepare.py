"""Fair-Speech's preparation and the manifest splitter.

Meta's metadata must not be committed, so the rows here are made up, with the quirks of the real
ones. The tests marked `real` run on the released rows where FAIRSPEECH_METADATA names a folder
with metadata.csv and test_manifest.json.
"""

import hashlib
import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "data"))

import prepare_fair_speech as prepare  # noqa: E402
import split_manifest  # noqa: E402

from fairasr_min import data  # noqa: E402

LABELS = prepare.LABELS
REAL = os.environ.get("FAIRSPEECH_METADATA")

CHOICES = {
    "age": (["18 - 22", "23 - 30", "31 - 45", "46 - 65"], [15, 16, 48, 21]),
    "gender": (["female", "male"], [54, 46]),
    "first_language": (
        ["English", "Spanish", "Hindi", "Korean", "English/Turkish"],
        [81, 9, 6, 3, 1],
    ),
    "socioeconomic_bkgd": (["Low", "Medium", "Affluent"], [56, 37, 7]),
    "ethnicity": (
        ["White", "Black or African American", "Hispanic, Latino, or Spanish"],
        [5, 4, 1],
    ),
}
QUIRKS = [  # transcription, text
    ("hey facebook call the last dialed number", "hey facebook call the last dialed number"),
    ("play beyonc\u00e9's album", "play beyonce's album"),
    ("play beyonce\u0301's album", "play beyonce's album"),
    ("add se\u00f1orita", "add senorita"),
    ("a stray \u0301 mark and\u0301", "a stray mark and"),
    ("on \u200eapple music", "on apple music"),
    ("new year\u2019s \u2018eve\u2019", "new year's 'eve'"),
    ("twenty-two  Mr. JAY-Z", "twenty two mr jay z"),
    ("play lo\\ungs", "play lo ungs"),
    ("rf: search me lovin'", "rf search me lovin'"),
    ("don\u00b4t", "don't"),
]


def rows_of(n, seed=0):
    """n metadata rows with skewed labels and quirky transcriptions, one of them empty."""
    rng = random.Random(seed)
    rows = []
    for i in range(n):
        labels = {column: rng.choices(*CHOICES[column])[0] for column in LABELS}
        name = hashlib.md5(f"{seed} {i}".encode()).hexdigest()
        rows.append({"hash_name": name, "transcription": QUIRKS[i % len(QUIRKS)][0], **labels})
    rows[n // 2]["transcription"] = ""
    return rows


def clips_of(rows):
    """Manifest rows as far as splitting needs them; the empty transcription is left out."""
    return [{**row, "duration": 1.0} for row in rows if row["transcription"]]


def write_tsv(path, rows, columns=prepare.COLUMNS):
    lines = ["\t".join(columns), *("\t".join(row[c] for c in columns) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def names(part):
    return [clip["hash_name"] for clip in part]


@pytest.fixture(scope="module")
def real():
    """Released metadata rows, and the hash names of the original's test list."""
    if not REAL:
        pytest.skip("FAIRSPEECH_METADATA is not set")
    rows, bad = prepare.read_metadata(Path(REAL) / "metadata.csv")
    listed = [
        Path(row["audio_filepath"]).stem for row in read_lines(Path(REAL) / "test_manifest.json")
    ]
    return [row for _, row in rows], bad, listed


@pytest.fixture(params=["made up", "real"])
def clips(request):
    if request.param == "real":
        return clips_of(request.getfixturevalue("real")[0])
    return clips_of(rows_of(20_000))


# ---- sampling ------------------------------------------------------------------------------------


def test_every_stratum_gets_its_share_to_within_one_utterance(clips):
    parts = prepare.split_clips(clips, seed=0)
    n, n_test, n_dev = len(clips), round(0.1 * len(clips)), len(parts["dev"])
    assert len(parts["test"]) == n_test and n_dev == round(0.1 * (n - n_test))
    found = [name for part in parts.values() for name in names(part)]
    assert sorted(found) == sorted(names(clips))  # nobody lost, nobody twice

    def count(rows, columns=LABELS):
        counts = Counter()
        for row in rows:
            counts[tuple(row[column] for column in columns)] += 1
        return counts

    everything, counts = count(clips), {name: count(part) for name, part in parts.items()}
    assert len(everything) > 100
    for stratum, m in everything.items():
        test, dev, train = (counts[name][stratum] for name in ("test", "dev", "train"))
        assert abs(test - m * n_test / n) < 1
        assert abs(dev - (m - test) * n_dev / (n - n_test)) < 1
        assert abs(dev - 0.09 * m) < 1.2 and abs(train - 0.81 * m) < 2
    for group, m in count(clips, ["ethnicity"]).items():
        assert abs(count(parts["test"], ["ethnicity"])[group] - m * n_test / n) < 1


def test_the_split_depends_on_the_seed_and_not_on_the_order(clips):
    first = prepare.split_clips(clips, seed=0)
    shuffled = random.Random(1).sample(clips, len(clips))
    assert prepare.split_clips(shuffled, seed=0) == first
    assert set(names(prepare.split_clips(clips, seed=1)["test"])) != set(names(first["test"]))


def test_a_given_test_set_is_taken_as_it_is(clips):
    listed = set(random.Random(2).sample(names(clips), 1000))
    parts = prepare.split_clips(clips, 0, listed)
    assert set(names(parts["test"])) == listed and len(parts["test"]) == 1000
    assert len(parts["dev"]) == round(0.1 * (len(clips) - 1000))
    assert sorted(n for part in parts.values() for n in names(part)) == sorted(names(clips))


def test_every_utterance_is_as_likely_to_be_taken():
    units = [split_manifest.Unit(str(i), (str(i) if i % 2 else "many",), [i]) for i in range(41)]
    counts = Counter()
    for seed in range(1000):
        taken, rest = split_manifest.take(units, 0.2, seed)
        assert len(taken) == 8 and len(rest) == 33
        counts.update(unit.name for unit in taken)
    expected = 1000 * 8 / 41
    assert all(abs(counts[unit.name] - expected) < 5 * expected**0.5 for unit in units)


def test_speakers_of_any_size_stay_within_one_speaker_of_the_share():
    rng = random.Random(0)
    for trial in range(50):
        sizes = [rng.randint(1, 30) for _ in range(rng.randint(20, 80))]
        units = [
            split_manifest.Unit(str(i), (rng.choice("abc"),), list(range(size)))
            for i, size in enumerate(sizes)
        ]
        taken, rest = split_manifest.take(units, 0.3, trial)
        assert sorted(taken + rest) == sorted(units)
        for stratum in "abc":
            size = sum(len(u.rows) for u in units if u.stratum == (stratum,))
            got = sum(len(u.rows) for u in taken if u.stratum == (stratum,))
            assert abs(got - 0.3 * size) <= max(sizes) + 0.5  # the goal itself is rounded
    assert split_manifest.take([], 0.3, 0) == ([], [])


# ---- text ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("transcription, text", QUIRKS)
def test_text(transcription, text):
    assert prepare.clean(transcription) == text
    assert prepare.clean(text) == text


def test_accents_fold_on_latin_letters_only():
    assert prepare.clean("\u00c5ngstr\u00f6m \u0130zmir na\u00efve") == "angstrom izmir naive"
    assert (
        prepare.clean("\u0439\u043e\u0433\u0430") == "\u0439\u043e\u0433\u0430"
    )  # a letter of its own
    assert (
        prepare.clean("\u0939\u093f\u0928\u094d\u0926\u0940")
        == "\u0939\u093f\u0928\u094d\u0926\u0940"
    )


def test_real_metadata(real):
    rows, bad, listed = real
    assert len(rows) == 26_470 and [b.reason for b in bad] == [prepare.EMPTY]
    assert set("".join(row["text"] for row in rows)) == set("abcdefghijklmnopqrstuvwxyz' ")
    parts = prepare.split_clips(clips_of(rows), 0, set(listed))
    assert len(listed) == 2550 and sorted(names(parts["test"])) == sorted(listed)


# ---- metadata and audio --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """300 clips as downloaded, a few in a subfolder, as FLAC, or over 17.5 s."""
    folder = tmp_path_factory.mktemp("fair_speech")
    audio = folder / "asr_fairness_audio"
    (audio / "more").mkdir(parents=True)
    sources = {}
    for seconds, name in [(0.2, "s.wav"), (0.2, "s.flac"), (17.5, "limit.wav"), (17.6, "l.wav")]:
        sources[name] = folder / name
        noise = np.random.default_rng(0).integers(-99, 99, int(8000 * seconds), np.int16)
        soundfile.write(folder / name, noise, 8000)
    rows = rows_of(300)
    for i, row in enumerate(rows):
        name = {0: "l.wav", 1: "l.wav", 2: "s.flac", 3: "limit.wav"}.get(i, "s.wav")
        place = audio / "more" if i % 10 == 5 else audio
        os.link(sources[name], place / f"{row['hash_name']}{sources[name].suffix}")
    return write_tsv(folder / "metadata.tsv", rows), audio, rows


def prepared(monkeypatch, metadata, audio, out, *more):
    """Run the script in this process, with the usual arguments."""
    command = ["x", "--metadata", metadata, "--audio", audio, "--out", out, *more]
    monkeypatch.setattr(sys, "argv", [str(word) for word in command])
    return prepare.main()


def run(script, *arguments, code=0):
    done = subprocess.run(
        [sys.executable, ROOT / "data" / script, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code == 0 else done.stderr


def test_from_download_to_manifests(corpus, tmp_path):
    metadata, audio, rows = corpus
    arguments = ("--metadata", metadata, "--audio", audio, "--out", tmp_path / "out")
    printed = run("prepare_fair_speech.py", *arguments)
    assert printed.endswith("--independent_space --balance_param 0.1\n")
    parts = {
        name: read_lines(tmp_path / "out" / f"{name}.jsonl") for name in ("train", "dev", "test")
    }
    assert [len(part) for part in parts.values()] == [240, 27, 30]  # 300 - 2 long - 1 empty
    found = {clip["hash_name"]: clip for part in parts.values() for clip in part}
    given = {row["hash_name"]: row for row in rows}
    assert set(given) - set(found) == {rows[i]["hash_name"] for i in (0, 1, 150)}
    for name, clip in found.items():
        assert list(clip) == ["audio_filepath", "text", "duration", *LABELS, "cluster", "hash_name"]
        assert all(clip[column] == given[name][column] for column in LABELS)
        assert clip["cluster"] == " | ".join(given[name][column] for column in LABELS)
        assert set(clip["text"]) <= set("abcdefghijklmnopqrstuvwxyz' ")
        assert clip["text"] == dict(QUIRKS)[given[name]["transcription"]]
    assert found[rows[3]["hash_name"]]["duration"] == 17.5
    for name in parts:
        assert names(parts[name]) == sorted(names(parts[name]))
        _, bad = data.read_manifest(tmp_path / "out" / f"{name}.jsonl", show_progress=False)
        assert bad == []

    report = (tmp_path / "out" / "summary.md").read_text()
    assert report in printed
    for column in LABELS:  # the long clips, by group: last but one column of the table
        lines = [line.split("|")[1:-1] for line in report.splitlines() if f"| {column} " in line]
        counts = {line[1].strip(): int(line[5].split()[0]) for line in lines}
        assert +Counter(counts) == Counter(row[column] for row in rows[:2])
    assert "metadata.tsv:152: empty transcription" in report
    assert not list((tmp_path / "out").glob("*.unfinished"))

    again = run("prepare_fair_speech.py", *arguments, code=2)
    assert again.startswith("error: --out") and "delete them" in again and again.count("\n") == 1


def test_audio_beside_the_manifests_is_named_relative(corpus, tmp_path, monkeypatch, capsys):
    metadata, audio, _ = corpus
    out = metadata.parent / "manifests"
    prepared(monkeypatch, metadata, audio, out)
    clips = read_lines(out / "train.jsonl")
    assert {Path(c["audio_filepath"]).parts[:2] for c in clips} == {("..", "asr_fairness_audio")}
    assert all((out / clip["audio_filepath"]).is_file() for clip in clips)
    assert f" --manifest {out / 'train.jsonl'} " in capsys.readouterr().out
    monkeypatch.setattr(prepare, "OUT", tmp_path / "far" / "away")  # what train.py looks for
    prepared(monkeypatch, metadata, audio, prepare.OUT)
    assert "python train.py --independent_space" in capsys.readouterr().out
    clips = read_lines(tmp_path / "far" / "away" / "train.jsonl")
    assert all(Path(clip["audio_filepath"]).is_absolute() for clip in clips)


def test_manifests_do_not_depend_on_the_order_of_the_metadata(corpus, tmp_path, monkeypatch):
    metadata, audio, rows = corpus
    shuffled = write_tsv(tmp_path / "shuffled.tsv", random.Random(0).sample(rows, len(rows)))
    prepared(monkeypatch, metadata, audio, tmp_path / "a")
    prepared(monkeypatch, shuffled, audio, tmp_path / "b")
    for name in ("train.jsonl", "dev.jsonl", "test.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_original_test_list(corpus, tmp_path, monkeypatch):
    metadata, audio, rows = corpus
    listed = [{"audio_filepath": f"/elsewhere/{row['hash_name']}.wav"} for row in rows[200:240]]
    good = write_lines(tmp_path / "list.json", listed)
    prepared(monkeypatch, metadata, audio, tmp_path / "a", "--test_list", good)
    assert set(names(read_lines(tmp_path / "a" / "test.jsonl"))) == set(names(rows[200:240]))
    assert len(read_lines(tmp_path / "a" / "dev.jsonl")) == 26  # of 257 others

    wrong = [{"audio_filepath": "/elsewhere/unknown.wav"}]
    wrong += [{"audio_filepath": f"{rows[i]['hash_name']}.wav"} for i in (0, 150)]
    bad = write_lines(tmp_path / "bad.json", listed + wrong)
    with pytest.raises(data.ManifestError) as error:
        prepared(monkeypatch, metadata, audio, tmp_path / "b", "--test_list", bad)
    message = str(error.value)
    assert "3 of its 43 clips" in message and "unknown: not in the metadata" in message
    assert f"{rows[0]['hash_name']}: lasts 17.60 s" in message
    assert "metadata.tsv:152: empty transcription" in message
    assert not (tmp_path / "b").exists()


def test_bad_rows_are_named_and_counted(corpus, tmp_path, monkeypatch, capsys):
    metadata, audio, rows = corpus
    lines = metadata.read_text(encoding="utf-8").split("\n")
    lines[9] = lines[9].rsplit("\t", 1)[0]  # line 10: a field is missing
    lines[10] += "\tmore"
    lines[11] = lines[12]
    lines[13] = "no_such_clip" + lines[13][32:]
    spoilt = tmp_path / "spoilt.tsv"
    spoilt.write_text("\n".join(lines), encoding="utf-8")
    broken = tmp_path / "audio"
    broken.mkdir()
    for row in rows:
        os.link(next(audio.rglob(f"{row['hash_name']}.*")), broken / f"{row['hash_name']}.wav")
    (broken / f"{rows[13]['hash_name']}.wav").unlink()
    (broken / f"{rows[13]['hash_name']}.wav").write_bytes(b"not audio")

    with pytest.raises(data.ManifestError) as error:
        prepared(monkeypatch, spoilt, broken, tmp_path / "out")
    message = str(error.value)
    assert "5 rows cannot be used" in message and "--max_bad 5" in message
    assert "spoilt.tsv:10: no ethnicity" in message
    assert "spoilt.tsv:11: more fields" in message
    assert "spoilt.tsv:13: " + rows[11]["hash_name"] + " stands already in line 12" in message
    assert "spoilt.tsv:14: no audio file" in message and "no_such_clip.wav" in message
    assert "spoilt.tsv:15: " in message and "not readable as audio" in message

    prepared(monkeypatch, spoilt, broken, tmp_path / "out", "--max_bad", "5")
    assert "spoilt.tsv:14: no audio file" in capsys.readouterr().out
    total = sum(len(read_lines(tmp_path / "out" / f"{n}.jsonl")) for n in ("train", "dev", "test"))
    assert total == 300 - 2 - 1 - 5


def test_a_second_empty_transcription_counts_as_bad(corpus, tmp_path, monkeypatch):
    _, audio, rows = corpus
    rows = [row | ({"transcription": "..."} if i == 7 else {}) for i, row in enumerate(rows)]
    metadata = write_tsv(tmp_path / "metadata.tsv", rows)
    with pytest.raises(data.ManifestError, match="2 rows cannot be used"):
        prepared(monkeypatch, metadata, audio, tmp_path / "out")


def test_mistakes_of_the_user(corpus, tmp_path, monkeypatch):
    metadata, audio, rows = corpus
    commas = tmp_path / "commas.csv"
    commas.write_text(metadata.read_text(encoding="utf-8").replace("\t", ","), encoding="utf-8")
    narrow = write_tsv(tmp_path / "narrow.tsv", rows, [c for c in prepare.COLUMNS if c != "age"])
    (tmp_path / "empty").mkdir()
    for arguments, message in [
        ((commas, audio), "not tab-separated"),
        ((narrow, audio), "no column 'age'; columns there are: hash_name"),
        ((tmp_path / "none.tsv", audio), "cannot be read"),
        ((metadata, tmp_path / "none"), "is not a folder"),
        ((metadata, tmp_path / "empty"), "no .flac"),
        ((metadata, audio, metadata), "is a file"),
    ]:
        metadata_, audio_, out = (*arguments, tmp_path / "out")[:3]
        with pytest.raises(data.ManifestError, match=message) as error:
            prepared(monkeypatch, metadata_, audio_, out)
        assert "\n" not in str(error.value)
    with pytest.raises(data.ManifestError, match="train would be empty"):
        prepared(monkeypatch, metadata, audio, tmp_path / "out", "--max_seconds", "0.1")
    assert not (tmp_path / "out").exists()


# ---- split_manifest.py ---------------------------------------------------------------------------


@pytest.fixture
def manifest(tmp_path):
    """60 speakers with 2 to 9 utterances each; the first 20 are the corpus's own test part."""
    rng = random.Random(0)
    rows = []
    for speaker in range(60):
        person = {"speaker": f"s{speaker:02d}", "age": 20 + speaker % 3}
        person["gender"] = ["female", "male", "male", None][speaker % 4]
        for i in range(rng.randint(2, 9)):
            name = f"audio/{speaker}/{i}.wav"
            row = {"audio_filepath": name, "text": f"text {i}", "duration": 1.5, "offset": 0.25}
            rows.append(row | person | {"split": "test" if speaker < 20 else "train"})
            (tmp_path / "corpus" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "corpus" / name).touch()
    rows[5]["audio_filepath"] = str(tmp_path / "corpus" / rows[5]["audio_filepath"])
    rows[6]["audio_filepath"] = "found/with/audio_root.wav"
    return write_lines(tmp_path / "corpus" / "manifest.jsonl", rows)


def cut(monkeypatch, manifest, out, *more):
    """Run split_manifest.py in this process -> split -> rows."""
    monkeypatch.setattr(sys, "argv", ["x", str(manifest), "--out", str(out), *map(str, more)])
    assert split_manifest.main() == 0
    return {path.stem: read_lines(path) for path in sorted(out.glob("*.jsonl"))}


def speakers(rows):
    return {row["speaker"] for row in rows}


def test_speakers_are_kept_apart_and_groups_keep_their_share(manifest, tmp_path, monkeypatch):
    parts = cut(
        monkeypatch, manifest, tmp_path / "new" / "place",
        "--disjoint", "speaker", "--stratify", "gender", "--fractions", 0.6, 0.2, 0.2,
    )  # fmt: skip
    rows = read_lines(manifest)
    assert sum(map(len, parts.values())) == len(rows)
    assert sum(len(speakers(part)) for part in parts.values()) == 60
    largest = max(Counter(row["speaker"] for row in rows).values())
    for gender in ("female", "male", None):
        size = sum(row["gender"] == gender for row in rows)
        for name in ("dev", "test"):
            got = sum(row["gender"] == gender for row in parts[name])
            assert abs(got - 0.2 * size) <= 1.25 * largest + 1  # dev: a share of what test left


def test_rows_are_kept_and_relative_paths_still_resolve(manifest, tmp_path, monkeypatch):
    out = tmp_path / "elsewhere" / "deep"
    parts = cut(monkeypatch, manifest, out)
    before = {(row["speaker"], row["text"]): row for row in read_lines(manifest)}
    order = list(before)
    for part in parts.values():
        places = [order.index((row["speaker"], row["text"])) for row in part]
        assert places == sorted(places)
        for row in part:
            old = before[row["speaker"], row["text"]]
            assert list(row) == list(old)
            name, old_name = row["audio_filepath"], old["audio_filepath"]
            assert row | {"audio_filepath": old_name} == old
            if os.path.isabs(old_name) or old_name.startswith("found/"):
                assert name == old_name
            else:
                assert not os.path.isabs(name)
                assert os.path.samefile(out / name, manifest.parent / old_name)


def test_paths_hold_through_linked_folders(manifest, tmp_path, monkeypatch):
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "away")
    (tmp_path / "linked_corpus").symlink_to(manifest.parent)
    parts = cut(monkeypatch, tmp_path / "linked_corpus" / manifest.name, tmp_path / "link" / "out")
    for row in (row for part in parts.values() for row in part):
        if not row["audio_filepath"].startswith("found/"):
            assert (tmp_path / "link" / "out" / row["audio_filepath"]).is_file()

    rows = [row | {"audio_filepath": "../corpus/audio/0/0.wav"} for row in read_lines(manifest)]
    write_lines(tmp_path / "far" / "manifest.jsonl", rows)
    parts = cut(monkeypatch, tmp_path / "link" / ".." / "manifest.jsonl", tmp_path / "out")
    assert {r["audio_filepath"] for r in parts["train"]} == {"../corpus/audio/0/0.wav"}


def test_rows_by_default_and_as_the_seed_says(manifest, tmp_path, monkeypatch, capsys):
    n = len(read_lines(manifest))
    parts = cut(monkeypatch, manifest, tmp_path / "a", "--stratify", "gender", "age")
    assert len(parts["test"]) == round(0.1 * n)
    assert len(parts["dev"]) == round((n - len(parts["test"])) / 9)
    assert "--disjoint speaker keeps them apart" in capsys.readouterr().out
    assert cut(monkeypatch, manifest, tmp_path / "b", "--stratify", "gender", "age") == parts
    assert cut(monkeypatch, manifest, tmp_path / "c", "--seed", "1")["test"] != parts["test"]
    missing = [row for row in read_lines(manifest) if row["gender"] is None]
    got = sum(row["gender"] is None for row in parts["test"])
    assert abs(got - 0.1 * len(missing)) <= 1  # no label: a stratum of its own


def test_the_own_test_part_of_a_corpus(manifest, tmp_path):
    out = tmp_path / "out"
    printed = run(
        "split_manifest.py", manifest, "--out", out, "--test_where", "split=test",
        "--disjoint", "speaker", "--stratify", "gender",
    )  # fmt: skip
    assert "| test " in printed and "speakers |" in printed
    parts = {name: read_lines(out / f"{name}.jsonl") for name in ("train", "dev", "test")}
    assert {row["split"] for row in parts["test"]} == {"test"}
    assert {row["split"] for row in parts["train"] + parts["dev"]} == {"train"}
    assert not speakers(parts["train"]) & speakers(parts["dev"])
    rest = len(parts["train"]) + len(parts["dev"])
    assert abs(len(parts["dev"]) - rest / 9) <= 9
    message = run("split_manifest.py", manifest, "--out", out, code=2)
    assert message.startswith(f"error: --out {out} already holds") and message.count("\n") == 1


def test_splits_that_are_not_wanted_are_not_written(manifest, tmp_path, monkeypatch):
    parts = cut(monkeypatch, manifest, tmp_path / "out", "--fractions", 0.9, 0.1, 0)
    assert list(parts) == ["dev", "train"]


def test_mistakes_of_the_user_of_split_manifest(manifest, tmp_path, monkeypatch):
    nobody = write_lines(tmp_path / "n.jsonl", [{"audio_filepath": "a.wav", "duration": 1}] * 9)
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"audio_filepath": "a.wav", "duration": 1}\n{"audio_file', encoding="utf-8")
    rows = read_lines(manifest)
    unknown = write_lines(tmp_path / "u.jsonl", [*rows, rows[0] | {"speaker": ""}])
    both = write_lines(tmp_path / "b.jsonl", [*rows, rows[0] | {"split": "train"}])
    for arguments, message in [
        ((tmp_path / "none.jsonl",), "cannot be read"),
        ((broken,), "broken.jsonl:2: not JSON"),
        ((write_lines(tmp_path / "l.jsonl", [[1]]),), "l.jsonl:1: no audio_filepath"),
        ((write_lines(tmp_path / "e.jsonl", []),), "holds no rows"),
        ((nobody, "--stratify", "gender"), "no column 'gender'"),
        ((nobody, "--fractions", 0.98, 0.01, 0.01), "train|dev|test would be empty"),
        ((manifest, "--fractions", 0.5, 0.1, 0.1), "add up to 1"),
        ((manifest, "--test_where", "split"), "expected COLUMN=VALUE"),
        ((manifest, "--test_where", "split=dev"), "values of 'split' are: test, train"),
        ((unknown, "--disjoint", "speaker"), "1 rows have none"),
        ((both, "--disjoint", "speaker", "--test_where", "split=test"), r"\(s00\)"),
    ]:
        with pytest.raises(data.ManifestError, match=message) as error:
            cut(monkeypatch, arguments[0], tmp_path / "out", *arguments[1:])
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
