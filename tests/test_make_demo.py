"""The synthetic corpus: its rows, its splits, its seed, and what a second run does."""

import hashlib
import importlib.util
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import soundfile

SCRIPT = Path(__file__).resolve().parent.parent / "data" / "make_demo.py"
SIZES = {"train": 60, "dev": 16, "test": 40}
COLUMNS = ["audio_filepath", "text", "duration", "speaker", "age", "gender", "first_language"]
COLUMNS += ["socioeconomic_bkgd", "ethnicity", "synthetic"]

spec = importlib.util.spec_from_file_location("make_demo", SCRIPT)
make_demo = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_demo)


def make(out, seed=0, script=SCRIPT, sizes=SIZES):
    command = [sys.executable, script, "--out", out, "--seed", seed, "--jobs", 2]
    for split, size in sizes.items():
        command += [f"--{split}", size]
    command = [str(word) for word in command]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def files(folder):
    """path -> SHA-256, and the time of the last change."""
    return {
        path: (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def planned(seed):
    """Rows and voices as the plan has them, without their sound."""
    return make_demo.plan(seed, SIZES)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "demo"
    done = make(out)
    assert done.returncode == 0, done.stderr
    assert "synthetic" in done.stdout and "python train.py --manifest" in done.stdout
    assert [path.name for path in out.parent.iterdir()] == ["demo"]  # nothing half made is left
    return out


@pytest.fixture(scope="module")
def rows(corpus):
    return {
        split: [json.loads(line) for line in (corpus / f"{split}.jsonl").open()] for split in SIZES
    }


def test_rows_are_complete_neutral_and_synthetic(rows):
    for split, size in SIZES.items():
        assert len(rows[split]) == size
        for row in rows[split]:
            assert list(row) == COLUMNS and row["synthetic"] is True
            for column, meaning in make_demo.MEANING.items():
                assert row[column] in meaning and row[column].startswith("group_")
            assert set(row["text"]) <= set("abcdefghijklmnopqrstuvwxyz '")


def test_audio_is_what_the_manifest_says(corpus, rows):
    digest = hashlib.sha256()
    for row in sum(rows.values(), []):
        path = corpus / row["audio_filepath"]
        header = soundfile.info(path)
        assert (header.samplerate, header.channels, header.subtype) == (16_000, 1, "PCM_16")
        assert row["duration"] == header.frames / 16_000
        assert 0.5 < row["duration"] < 7
        digest.update(path.read_bytes())
        samples, _ = soundfile.read(path, dtype="int16")
        assert samples[:400].any() and samples[-400:].any()  # 25 ms at the edges: noise, not zeros
        assert 16_000 < abs(samples.astype(int)).max() < 17_000
    about = json.loads((corpus / "corpus.json").read_text())
    assert about["audio_sha256"] == digest.hexdigest()
    assert about["synthetic"] and about["counts"]["test"]["all"]["utterances"] == SIZES["test"]
    assert "SYNTHETIC" in (corpus / "README.md").read_text()


def test_speakers_and_sentences_are_in_one_split_only(rows):
    every = sum(rows.values(), [])
    assert len({row["text"] for row in every}) == len(every)
    speakers = [{row["speaker"] for row in rows[split]} for split in SIZES]
    assert len(set.union(*speakers)) == sum(map(len, speakers))
    known = {word for row in rows["train"] for word in row["text"].split()}
    for split in ("dev", "test"):
        assert known.issuperset(word for row in rows[split] for word in row["text"].split())


def test_the_planted_share_is_rare_in_train_and_even_in_test(rows):
    def speakers(split):
        return Counter({row["speaker"]: row["ethnicity"] for row in rows[split]}.values())

    assert speakers("train") == {"group_a": 13, "group_b": 6, "group_c": 1}
    assert all(3 <= count <= 5 for count in speakers("test").values())
    assert set(speakers("dev")) == set(make_demo.VOICES)


def test_the_default_corpus_is_large_and_even_enough():
    sizes = {"train": 2500, "dev": 240, "test": 640}
    speakers = make_demo.plan(0, sizes)
    groups = Counter((speaker["split"], speaker["rows"][0]["ethnicity"]) for speaker in speakers)
    assert sum(n for (split, _), n in groups.items() if split == "train") >= 100
    assert all(n >= 13 for (split, _), n in groups.items() if split == "test")
    said = Counter(row["ethnicity"] for s in speakers if s["split"] == "train" for row in s["rows"])
    assert said["group_c"] / 2500 == pytest.approx(0.06, abs=0.01)
    for column in list(make_demo.MEANING)[:-1]:  # no other column explains the gap
        for group in make_demo.VOICES:
            values = Counter(
                s["rows"][0][column]
                for s in speakers
                if s["split"] == "test" and s["rows"][0]["ethnicity"] == group
            )
            assert max(values.values()) - min(values.values()) <= 1
            assert set(values) == set(make_demo.MEANING[column])
    voices = {
        group: {s["voice"].split("+")[1] for s in speakers if s["rows"][0]["ethnicity"] == group}
        for group in make_demo.VOICES
    }
    assert len(set.union(*voices.values())) == sum(map(len, voices.values()))


def test_the_seed_alone_decides_the_rows(rows):
    spoken = [row | {"duration": None} for row in sum(rows.values(), [])]
    assert spoken == [row for speaker in planned(0) for row in speaker["rows"]]
    assert planned(0) == planned(0) != planned(1)
    texts = [
        {row["text"] for speaker in planned(seed) for row in speaker["rows"]} for seed in (0, 1)
    ]
    assert len(texts[0] & texts[1]) < len(texts[0]) / 2


def test_a_second_run_changes_nothing(corpus):
    before = files(corpus)
    done = make(corpus)
    assert done.returncode == 0 and "same settings" in done.stdout
    assert files(corpus) == before


@pytest.mark.parametrize("case", ["seed", "size", "manifest", "stranger"])
def test_another_corpus_in_the_way_is_left_alone(corpus, tmp_path, case):
    missing = corpus / "dev.jsonl"
    before = files(corpus)
    if case == "seed":
        done, says = make(corpus, seed=1), "seed 0 there, 1 here"
    elif case == "size":
        done, says = make(corpus, sizes=SIZES | {"test": 50}), "test 40 there, 50 here"
    elif case == "manifest":
        missing.rename(tmp_path / "dev.jsonl")
        done, says = make(corpus), "no dev.jsonl"
        (tmp_path / "dev.jsonl").rename(missing)
    else:
        (tmp_path / "thesis.txt").write_text("mine")
        done, says = make(tmp_path), "no demo corpus"
        assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    assert done.returncode == 1 and says in done.stderr and done.stderr.count("\n") == 1
    assert files(corpus) == before


def test_an_unknown_voice_is_an_error(tmp_path):
    make_demo.set_voice("en-us+croak")
    for voice in ("en-us+nosuch", "en-nowhere+croak"):
        with pytest.raises(ValueError, match="no voice"):
            make_demo.set_voice(voice)
    script = tmp_path / "make_demo.py"
    script.write_text(SCRIPT.read_text().replace('"croak"', '"nosuch"'))
    done = make(tmp_path / "demo", script=script)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "no voice" in done.stderr and "nosuch" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["make_demo.py"]


def test_too_small_a_corpus_is_an_error(tmp_path):
    done = make(tmp_path / "demo", sizes=SIZES | {"dev": 2})
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and not list(tmp_path.iterdir())
