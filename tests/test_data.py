"""Manifests with every fault a row can have, and the laws of batches, shares and streams."""

import json
import math
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from fairasr_min import data
from fairasr_min.audio import AudioError, LogMel, read_audio
from fairasr_min.data import (
    BadRow,
    Batches,
    ManifestError,
    SpeechDataset,
    Utterance,
    check_targets,
    collate,
    drop_long,
    group_columns,
    label_ids,
    label_of,
    label_values,
    read_manifest,
    require_columns,
    settle,
    stream,
)
from fairasr_min.model import samples_to_frames
from fairasr_min.text import train_tokenizer

ROOT = Path(__file__).resolve().parent.parent


def wav(path, seconds=0.5, rate=16000, seed=0):
    """A file of quiet noise, and its samples."""
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = np.random.default_rng(seed).uniform(-0.1, 0.1, round(seconds * rate))
    soundfile.write(path, samples, rate)
    return path


def row(**values):
    return {"audio_filepath": "a.wav", "text": "some words", "duration": 0.5} | values


def write(path, rows):
    """A manifest; a row is a dict, or a string to be written as it is."""
    lines = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path):
    wav(tmp_path / "a.wav")
    return tmp_path


# ---- reading -------------------------------------------------------------------------------------


def test_a_good_row(folder):
    given = row(text="Don\u2019t  SHOUT!", speaker="s1", gender="female", extra={"kept": [1]})
    (u,), bad = read_manifest(write(folder / "m.jsonl", [given]))
    assert bad == []
    assert u == Utterance(given, 1, str(folder / "a.wav"), "don't shout", 0.5, None)
    escaped = json.dumps(row(text="na\u00efve \U0001f600"))  # a whole pair is one character
    (u,), bad = read_manifest(write(folder / "m.jsonl", [escaped]))
    assert bad == [] and u.text == "na\u00efve"


BAD_ROWS = [
    ("{'single': 'quotes'}", "not JSON"),
    ('{"audio_filepath": "a.wav", "text": "x", "durat', "not JSON"),
    ("a.wav some words 0.5", "not JSON"),
    ("[" * 100_000, "not JSON"),
    (json.dumps(row(text="half a pair: \ud83d")), "surrogate"),  # could not be written again
    (json.dumps(row(audio_filepath="\ud83d.wav")), "surrogate"),
    ("[1, 2]", "expected a JSON object, found list"),
    ('"a.wav"', "expected a JSON object, found str"),
    ("null", "expected a JSON object, found NoneType"),
    ({"text": "x", "duration": 0.5}, "no audio_filepath"),
    (row(audio_filepath=None), "no audio_filepath"),
    (row(audio_filepath=""), "no audio_filepath"),
    (row(audio_filepath=["a.wav"]), "no audio_filepath"),
    ({"audio_filepath": "a.wav", "text": "x"}, "no duration"),
    (row(duration="0.5"), "no duration"),
    (row(duration=None), "no duration"),
    (row(duration=True), "no duration"),
    (row(duration=math.nan), "absurd duration nan"),
    (row(duration=math.inf), "absurd duration inf"),
    (row(duration=0), "absurd duration 0"),
    (row(duration=-1.5), "absurd duration -1.5"),
    (row(duration=3601), "absurd duration 3601"),
    (row(duration=500), "duration says 500.00 s but {folder}/a.wav lasts 0.50 s"),
    (row(duration=0.3), "duration says 0.30 s but {folder}/a.wav lasts 0.50 s"),
    ({"audio_filepath": "a.wav", "duration": 0.5}, "no text"),
    (row(text=None), "no text"),
    (row(text=7), "no text"),
    (row(text=""), "empty text"),
    (row(text=" ... \u2019 \U0001f600"), "empty text"),
    (row(audio_filepath="b.wav"), "no audio file at {folder}/b.wav"),
    (row(audio_filepath="/no/such/b.wav"), "no audio file at /no/such/b.wav"),
    (row(audio_filepath="."), "no audio file at {folder}"),
    (row(audio_filepath="a.wav\0"), "no audio file at"),
    (row(audio_filepath="x" * 300 + ".wav"), "no audio file at {folder}/xxx"),
    (row(audio_filepath="text.wav"), "{folder}/text.wav: not readable as audio"),
    (row(audio_filepath="x.raw"), "{folder}/x.raw: not readable as audio"),
    (row(audio_filepath="empty.wav"), "{folder}/empty.wav: holds no audio samples"),
    (row(audio_filepath="tiny.wav", duration=0.009), "less than one frame"),
    (row(audio_filepath="tiny.wav", duration=0.1), "less than one frame"),  # says it is longer
    (row(offset="0.1"), "offset '0.1' is not"),
    (row(offset=-0.1), "offset -0.1 is not"),
    (row(offset=math.nan), "offset nan is not"),
    (row(offset=math.inf), "offset inf is not"),
    (row(offset=True, duration=0.1), "offset True is not"),
    (row(offset=10**400), "offset 1000"),
    (row(offset=0.3), "ends at 0.80 s but {folder}/a.wav lasts 0.50 s"),
    (row(offset=7, duration=0.1), "ends at 7.10 s but {folder}/a.wav lasts 0.50 s"),
    (row(offset=0.5, duration=0.05), "less than one frame"),  # of silence after the end
]


@pytest.mark.parametrize("line, reason", BAD_ROWS, ids=lambda x: str(x)[:40])
def test_a_bad_row_is_named_with_its_line(folder, line, reason):
    (folder / "text.wav").write_text("this is not audio")
    (folder / "x.raw").write_bytes(bytes(32000))
    wav(folder / "empty.wav", 0)
    wav(folder / "tiny.wav", 0.009)
    wav(folder / "good.wav")
    good = row(audio_filepath="good.wav")
    first = row(audio_filepath=wav(folder / "first.wav").name)
    manifest = write(folder / "m.jsonl", [first, "", "   ", line, good])
    utterances, bad = read_manifest(manifest)
    assert [u.line for u in utterances] == [1, 5]
    ((number, why, kept),) = bad
    assert number == 4
    assert reason.format(folder=folder) in why
    as_text = json.dumps(kept)  # NaN is not equal to itself
    assert as_text == (json.dumps(line) if isinstance(line, dict) else "{}")


MODES = [
    ("required", {"text": "Hi!"}, "hi", None),
    ("required", {"text": "..."}, None, "empty text"),
    ("required", {}, None, "no text"),
    ("optional", {"text": "Hi!"}, "hi", None),
    ("optional", {"text": "..."}, "", None),  # silence
    ("optional", {}, None, "no text"),
    ("optional", {"text": None}, None, "no text"),
    ("unused", {"text": "Hi!"}, "", None),
    ("unused", {"text": None}, "", None),
    ("unused", {}, "", None),
]


@pytest.mark.parametrize("mode, texts, kept, reason", MODES)
def test_text_modes(folder, mode, texts, kept, reason):
    manifest = write(folder / "m.jsonl", [{"audio_filepath": "a.wav", "duration": 0.5} | texts])
    utterances, bad = read_manifest(manifest, text=mode)
    assert [u.text for u in utterances] == ([] if kept is None else [kept])
    assert [b.reason for b in bad] == ([] if reason is None else [reason])


@pytest.mark.parametrize("content", ["", "\n\n  \n", None, b"\xff\xfe\x00junk", "folder"])
def test_an_unreadable_manifest_is_an_error(tmp_path, content):
    manifest = tmp_path / "m.jsonl"
    if content == "folder":
        manifest.mkdir()
    elif content is not None:
        manifest.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ManifestError, match="m.jsonl"):
        read_manifest(manifest)


def test_files_from_other_systems(tmp_path):
    """A byte order mark, CRLF, blank lines, no newline at the end, spaces and Unicode in names."""
    names = ["with space.wav", "\u00fcml\u00e4ut/\u4f60\u597d.wav", "percent%20,comma.wav"]
    for name in names:
        wav(tmp_path / "d\u00edr x" / name)
    lines = [json.dumps(row(audio_filepath=n), ensure_ascii=False) for n in names]
    manifest = tmp_path / "d\u00edr x" / "m \u00e9.jsonl"
    manifest.write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(lines).encode())
    utterances, bad = read_manifest(manifest)
    assert bad == [] and [u.line for u in utterances] == [1, 3, 5]
    assert [u.path for u in utterances] == [str(manifest.parent / name) for name in names]


def test_where_audio_is_looked_for(tmp_path):
    beside, under, bare = (tmp_path / p for p in ("m/x.wav", "root/sub/y.wav", "root/z.wav"))
    for path in (beside, under, bare):
        wav(path)
    names = ["x.wav", str(beside), "sub/y.wav", "/elsewhere/data/z.wav", "deep/er/z.wav"]
    missing = ["sub/no.wav", "/elsewhere/no.wav"]
    rows = [row(audio_filepath=name) for name in names + missing]
    manifest = write(tmp_path / "m" / "m.jsonl", rows)
    utterances, bad = read_manifest(manifest, audio_root=tmp_path / "root")
    assert [u.path for u in utterances] == [str(beside), str(under), str(bare)]
    m, root = tmp_path / "m", tmp_path / "root"
    assert [b.reason for b in bad] == [
        "the same audio as line 1",
        "the same audio as line 4",
        f"no audio file at {m}/sub/no.wav or {root}/sub/no.wav or {root}/no.wav",
        f"no audio file at /elsewhere/no.wav or {root}/no.wav",
    ]
    utterances, bad = read_manifest(manifest)  # without a root: beside the manifest, absolute
    assert [u.line for u in utterances] == [1] and [b.line for b in bad] == [2, 3, 4, 5, 6, 7]


def test_bad_rows_come_in_the_order_of_the_file(folder):
    wav(folder / "b.wav")
    wav(folder / "c.wav")
    good, cut = row(audio_filepath="b.wav"), row(audio_filepath="c.wav", duration=9)
    rows = [row(), cut, "no", row(text=""), good, row(), "no"]
    utterances, bad = read_manifest(write(folder / "m.jsonl", rows))
    assert [u.line for u in utterances] == [1, 5]
    assert [b.line for b in bad] == [2, 3, 4, 6, 7]


def test_a_duration_may_be_rounded(folder):
    wav(folder / "long.wav", 20)
    wav(folder / "b.wav")
    wav(folder / "c.wav")
    stated = [(0.5, "a.wav"), (0.45, "b.wav"), (0.59, "c.wav"), (20.3, "long.wav")]
    rows = [row(duration=d, audio_filepath=name) for d, name in stated]
    assert read_manifest(write(folder / "m.jsonl", rows))[1] == []


def test_segments_of_a_longer_recording(tmp_path):
    wav(tmp_path / "long.wav", 2)
    whole = read_audio(tmp_path / "long.wav")
    cuts = [(0, 0.5), (0.75, 0.5), (1.5, 0.5)]
    rows = [row(audio_filepath="long.wav", offset=o, duration=d) for o, d in cuts]
    utterances, bad = read_manifest(write(tmp_path / "m.jsonl", rows))
    assert bad == []
    for i, (offset, seconds) in enumerate(cuts):
        first = int(offset * 16000)
        waveform = SpeechDataset(utterances)[0, i][1]
        assert torch.equal(waveform, whole[first : first + int(seconds * 16000)])


def test_every_accepted_row_can_be_read(tmp_path):
    """Whatever the durations and offsets say: at least one frame comes out, or the row is bad."""
    rng = random.Random(0)
    for name, seconds in [("x.wav", 0.005), ("y.wav", 0.2), ("z.wav", 1.0)]:
        wav(tmp_path / name, seconds)
    rows = []
    for _ in range(300):
        name, real = rng.choice([("x.wav", 0.005), ("y.wav", 0.2), ("z.wav", 1.0)])
        near = max(0.001, real + rng.uniform(-0.15, 0.15))
        if rng.random() < 0.5:
            rows.append(row(audio_filepath=name, duration=near))
        else:
            rows.append(row(audio_filepath=name, offset=near, duration=rng.uniform(0.001, 0.3)))
    utterances, bad = read_manifest(write(tmp_path / "m.jsonl", rows), text="unused")
    assert len(utterances) > 20 and len(bad) > 30
    dataset = SpeechDataset(utterances)
    for i in range(len(utterances)):
        item = dataset[0, i]
        assert not isinstance(item, AudioError), (utterances[i].row, item)
        assert len(item[1]) >= 160, utterances[i].row


# ---- what is done about bad rows -----------------------------------------------------------------


def utterance(line=1, text="some words", seconds=1.0, **columns):
    return Utterance({"text": text, **columns}, line, Path("a.wav"), text, seconds)


def test_settle_passes_what_is_whole():
    utterances, said = [utterance(1), utterance(2)], []
    assert settle("m.jsonl", utterances, [], say=said.append) == utterances and said == []


def test_settle_refuses_more_than_max_bad():
    bad = [BadRow(line, f"reason {line}", {}) for line in range(2, 32)]
    with pytest.raises(ManifestError) as caught:
        settle("dir/m.jsonl", [utterance(1), utterance(40)], bad, max_bad=29)
    message = str(caught.value)
    assert "30 of 32 rows" in message and "--max_bad 30" in message
    assert "dir/m.jsonl:2: reason 2\n" in message and "reason 21" in message
    assert "reason 22" not in message and "10 more" in message


def test_settle_goes_on_without_some_and_says_who_they_were():
    rows = [{"gender": g, "age": "x"} for g in ("female", "female", "male", "male", None)]
    utterances = [utterance(i + 1, **r) for i, r in enumerate(rows)]
    bad = [BadRow(2, "too short", rows[1]), BadRow(5, "too long", rows[4])]  # 2, 5: both lists
    bad.append(BadRow(9, "not JSON", {}))
    said = []
    left = settle("m.jsonl", utterances, bad, max_bad=3, say=said.append)
    assert [u.line for u in left] == [1, 3, 4]
    text = "\n".join(said)
    assert "without 3 bad rows" in text and "m.jsonl:2: too short" in text
    assert "gender: (missing) 2, female 1" in text and "age" not in text


def test_settle_needs_something_left():
    bad = [BadRow(1, "no text", {})]
    with pytest.raises(ManifestError, match="no usable row"):
        settle("m.jsonl", [], bad, max_bad=5)
    with pytest.raises(ManifestError, match="no usable row"):
        settle("m.jsonl", [utterance(1)], bad, max_bad=5)


@pytest.mark.parametrize("text, need", [("", 0), ("a", 1), ("abc", 3), ("aab", 4), ("aaaa", 7)])
def test_targets_need_frames(text, need):
    u = utterance(line=3, text=text, seconds=0.25)
    for have in range(9):
        bad = check_targets([u], list, {4000: have}.__getitem__)  # it is asked for 4000 samples
        reason = f"text needs {need} frames for CTC, audio has {have}"
        assert bad == ([BadRow(3, reason, u.row)] if have < need else [])


def test_targets_are_judged_by_the_audio_there_is(tmp_path):
    """A duration may be off by 0.1 s, but those frames cannot be spent."""
    wav(tmp_path / "x.wav", 0.91)
    given = row(audio_filepath="x.wav", duration=1.0, text="abcdefghijklmnopqrstuvwxy")
    utterances, bad = read_manifest(write(tmp_path / "m.jsonl", [given]))
    assert bad == [] and len(given["text"]) == samples_to_frames(16000)
    have = samples_to_frames(len(read_audio(tmp_path / "x.wav")))
    (bad,) = check_targets(utterances, list, samples_to_frames)
    assert bad.reason == f"text needs 25 frames for CTC, audio has {have}"


def test_drop_long_says_whose():
    lasting = [(1.0, "a"), (2.0, "b"), (3.0, "a"), (5.0, "b")]
    utterances = [utterance(i, seconds=s, g=g) for i, (s, g) in enumerate(lasting)]
    said = []
    assert [u.seconds for u in drop_long(utterances, 2.0, said.append)] == [1.0, 2.0]
    assert "left out 2 of 4" in said[0] and "g: a 1, b 1" in said[1]
    assert drop_long(utterances, 5.0, lambda _: pytest.fail("nothing was left out")) == utterances
    with pytest.raises(ManifestError, match="--max_seconds"):
        drop_long(utterances, 0.5, said.append)


# ---- groups --------------------------------------------------------------------------------------


def test_label_of():
    r = {"a": "x", "b": 3, "c": None, "d": "", "e": "  ", "f": " y ", "g": 0, "h": False}
    r |= {"i": 3.0, "j": 3.5, "k": "3"}
    expected = dict(a="x", b="3", c=None, d=None, e=None, f="y", g="0", h="false", absent=None)
    expected |= dict(i="3", j="3.5", k="3")
    assert {column: label_of(r, column) for column in expected} == expected
    assert label_of({"a": float("nan")}, "a") is None
    assert label_of(r, "a+b") == "x + 3" and label_of(r, "b+a") == "3 + x"
    assert label_of(r, "a+b+f") == "x + 3 + y"
    assert label_of(r, "a+c") is label_of(r, "d+a") is label_of(r, "a+absent") is None


def test_group_columns():
    rows = [
        {
            **row(text=f"t{i}", offset=i % 2, synthetic=i % 2 == 0, pred_text=f"p{i % 2}"),
            "speaker": f"s{i % 3}",
            "cluster": f"c{i % 3}",
            "gender": ["female", "male", None][i % 3],
            "one": "same",
            "id": str(i),
            "fifty": i % 50,
            "more": i % 51,
            "nothing": None,
        }
        for i in range(102)
    ]
    rows[7]["late"] = "x"
    rows[8]["late"] = "y"
    assert group_columns(rows) == ["gender", "fifty", "late"]
    assert group_columns([]) == []
    few = [{"id": i, "group": "ab"[i % 2]} for i in range(4)]
    assert group_columns(few) == ["group"]  # an id is no group, however few there are


def test_unknown_columns_list_those_there_are():
    rows = [row(gender="f"), row(region="n")]
    require_columns("m.jsonl", rows, ["gender", "region", "gender+region", "text"])
    for column in ("gendr", "gender+gendr"):
        with pytest.raises(ManifestError) as caught:
            require_columns("m.jsonl", rows, ["gender", column])
        assert str(caught.value) == "m.jsonl: no column 'gendr'; columns there are: gender, region"
    with pytest.raises(ManifestError, match="none"):
        label_values("m.jsonl", [utterance()], ["gender"])


def test_label_values_and_ids():
    genders, ages = ["male", None, "female", "male", ""], [30, 4, 30, "30", 100]
    utterances = [utterance(gender=g, age=a) for g, a in zip(genders, ages)]
    said = []
    values = label_values("m.jsonl", utterances, ["gender", "age", "age+gender"], said.append)
    assert values == {
        "gender": ["female", "male"],
        "age": ["100", "30", "4"],
        "age+gender": ["30 + female", "30 + male"],
    }
    assert [line for line in said if "2 of 5" in line and line.startswith("gender")]
    assert not [line for line in said if line.startswith("age:") or "warning" in line]
    ids = label_ids(utterances, values)
    assert ids.tolist() == [[1, 1, 1], [-1, 2, -1], [0, 1, 0], [1, 1, 1], [-1, 0, -1]]
    assert ids.dtype == torch.long
    assert label_ids([utterance(gender="other")], {"gender": ["female"]}).tolist() == [[-1]]
    assert label_ids(utterances, {}).shape == (5, 0)
    assert label_ids([], {"a": ["b"]}).shape == (0, 1)


@pytest.mark.parametrize("genders", [["male", "male"], ["male", None], [None, ""]])
def test_one_value_is_no_group(genders):
    with pytest.raises(ManifestError, match="'gender' has [01] value.*--balance_param 0"):
        label_values("m.jsonl", [utterance(gender=g) for g in genders], ["gender"])


def test_a_value_in_every_row_is_no_group():
    with pytest.raises(ManifestError, match="'x' has another value in every row"):
        label_values("m.jsonl", [utterance(x=x) for x in (1, 2, 3, None)], ["x"])


@pytest.mark.parametrize("n, warned", [(50, False), (51, True)])
def test_many_values_are_a_warning(n, warned):
    said = []
    values = label_values("m", [utterance(x=i % n) for i in range(99)], ["x"], said.append)
    assert len(values["x"]) == n
    assert any("warning" in line and "51" in line for line in said) == warned


# ---- corpora -------------------------------------------------------------------------------------


def test_the_default_corpus(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    said = []
    demo, fair_speech = Path("data/demo"), Path("data/fair_speech")
    demo.mkdir(parents=True)
    (demo / "train.jsonl").touch()
    assert data.default_corpus(said.append) == demo and "SYNTHETIC" in said.pop()
    assert not data.is_demo(demo / "train.jsonl")
    (demo / "corpus.json").touch()
    assert data.is_demo(demo / "train.jsonl")
    fair_speech.mkdir()
    (fair_speech / "train.jsonl").touch()
    assert data.default_corpus(said.append) == fair_speech and said == []


def test_the_fingerprint_is_of_the_content(tmp_path):
    a, b, c = (tmp_path / name for name in "abc")
    for path, content in ((a, "x"), (b, "x"), (c, "y")):
        path.write_text(content)
    assert data.fingerprint(a) == data.fingerprint(b) != data.fingerprint(c)


def test_is_synthetic():
    assert data.is_synthetic([utterance(), utterance(synthetic=True)])
    assert not data.is_synthetic([utterance(), utterance(synthetic=False)])


# ---- batches -------------------------------------------------------------------------------------


def durations(n, seed=0, spread=0.5):
    return np.random.default_rng(seed).lognormal(1.0, spread, n)


PLANS = [
    (n, batch_size, world, batch_seconds)
    for n in (1, 2, 3, 5, 31, 32, 33, 200)
    for batch_size in (1, 2, 8, 64)
    for world in (1, 2, 3)
    for batch_seconds in (None, 0.5, 10.0, 1e6)
    if n >= world
]


def test_laws_of_batches():
    for number, (n, batch_size, world, batch_seconds) in enumerate(PLANS):
        seconds = durations(n, seed=number)
        batches = Batches(seconds, batch_size, number, world, batch_seconds)
        again = Batches(list(seconds), batch_size, number, world, batch_seconds)
        for epoch in range(3):
            plan = batches.epoch(epoch)
            assert len(plan) == len(batches)  # of the same number in every epoch
            assert sorted(i for batch in plan for i in batch) == list(range(n))  # each once
            sizes = [len(batch) for batch in plan]
            assert min(sizes) >= world  # something for every process
            if batch_seconds is None:
                assert max(sizes) - min(sizes) <= 1
                assert max(sizes) <= max(batch_size * world, 2 * world - 1)
            assert all(np.array_equal(a, b) for a, b in zip(plan, again.epoch(epoch)))


def test_the_number_of_batches_is_the_fewest():
    for n, batch_size, world, _ in PLANS:
        if n >= batch_size * world:
            count = len(Batches(durations(n), batch_size, 0, world))
            assert count == min(-(-n // (batch_size * world)), n // world)


def as_sets(plan):
    return [frozenset(batch.tolist()) for batch in plan]


@pytest.mark.parametrize("batch_seconds", [None, 60.0])
def test_epochs_and_seeds_differ(batch_seconds):
    plans = [
        as_sets(Batches(durations(200), 8, seed, batch_seconds=batch_seconds).epoch(epoch))
        for seed in (0, 1)
        for epoch in (0, 1, 2)
    ]
    for i, plan in enumerate(plans):
        for other in plans[:i]:
            assert plan != other  # in order
            assert len(set(plan) & set(other)) < len(plan) / 2  # nor the same batches shuffled


@pytest.mark.parametrize("batch_seconds", [None, 60.0])
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("spread", [0.03, 0.5])
def test_the_longest_utterance_comes_first(batch_seconds, world, spread):
    for seed in range(30):
        seconds = durations(100, seed, spread)
        first = Batches(seconds, 4, seed, world, batch_seconds).epoch(0)[0]
        assert seconds.argmax() in first


def test_batches_are_shuffled():
    """Not from long to short: over epochs, each place sees every length."""
    seconds = durations(400)
    batches = Batches(seconds, 8, 0)
    means = np.array([[seconds[b].mean() for b in batches.epoch(e)] for e in range(1, 41)])
    assert abs(means[:, :25].mean() / means[:, 25:].mean() - 1) < 0.1
    assert np.corrcoef(np.arange(50), means.mean(axis=0))[0, 1] < 0.6


@pytest.mark.parametrize("seed", range(3))
def test_little_padding(seed):
    seconds = durations(2000, seed)
    batches = Batches(seconds, 32, seed)
    for epoch in range(3):
        padded = sum(len(batch) * seconds[batch].max() for batch in batches.epoch(epoch))
        assert 1 - seconds.sum() / padded < 0.15


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("batch_seconds", [5.0, 20.0, 100.0])
def test_batches_by_seconds_hold_about_that_much(world, batch_seconds):
    budget = batch_seconds * world
    bound = budget * 1.1 / 0.9  # the jitter may bring in a longer utterance
    for seed in range(5):
        seconds = durations(301, seed)
        batches = Batches(seconds, 8, seed, world, batch_seconds)
        for epoch in range(3):
            over = 0
            for batch in batches.epoch(epoch):
                longest = seconds[batch].max()
                if len(batch) > world and len(batch) * longest > bound:
                    over += 1  # the last batch may take up to world - 1 left over
                    assert (len(batch) - world + 1) * longest <= bound
            assert over <= (world > 1)
        if batch_seconds > 5:  # and not much less
            assert len(batches) < 1.6 * seconds.sum() / budget + 1


@pytest.mark.parametrize("world", [1, 3])
def test_batches_by_seconds_have_few_sizes(world):
    sizes = np.array(Batches(durations(20_000), 8, 0, world, 300.0).sizes[:-1])
    assert not (sizes % world).any()
    digits = {f"{size:b}".rstrip("0") for size in sizes // world}
    assert digits == {"1", "11", "101", "111"}


def test_too_few_utterances_for_the_processes():
    with pytest.raises(ManifestError, match=r"1 utterance\(s\): too few; a batch needs 2"):
        Batches([1.0], 8, 0, world=2)
    with pytest.raises(ManifestError):
        Batches([], 8, 0)


# ---- items and batches of tensors ----------------------------------------------------------------

TEXTS = ["ba", "do ki", "", "lu lu lu", "me", "no pa ri", "su"]
LENGTHS = [0.10, 0.30, 0.20, 0.17, 0.25, 0.11, 0.05]


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    """make(...) -> a data set of seven short files; and batches of it for two processes."""
    folder = tmp_path_factory.mktemp("speech")
    utterances = [
        Utterance({}, i + 1, wav(folder / f"{i}.wav", s, seed=i), text, s)
        for i, (s, text) in enumerate(zip(LENGTHS, TEXTS))
    ]
    tokenizer, _ = train_tokenizer(TEXTS, 32)
    labels = torch.arange(14).view(7, 2)

    def make(seed=5, n_draws=4, of=slice(None)):
        return SpeechDataset(utterances[of], seed, labels[of], tokenizer, n_draws)

    return make


def plan(world=1):
    return Batches(LENGTHS, 2 if world == 2 else 4, 3, world)


def same(a, b):
    """Two batches, tensor by tensor."""
    return a.index == b.index and all(
        torch.equal(getattr(a, name), getattr(b, name))
        for name in ("waveforms", "n_samples", "labels", "targets", "target_lengths", "draws")
    )


def test_shapes_of_batches_recur():
    """The fewest samples that hold all and give a multiple of 16 feature frames."""
    for samples in [1, 159, 2399, 2400, 2401, 4959, 4960, 4961, 80_000]:
        waveforms = [torch.ones(samples), torch.ones(1)]
        batch = collate([(i, w, torch.zeros(1), torch.ones(1), torch.ones(1))
                         for i, w in enumerate(waveforms)])  # fmt: skip
        size = batch.waveforms.shape[1]
        features, _ = LogMel()(batch.waveforms, batch.n_samples)
        assert samples <= size < samples + 2560 and features.shape[1] % 16 == 0
        assert batch.waveforms.sum() == samples + 1


def test_collate_pads_at_the_end(speech):
    dataset = speech()
    (batch,) = list(stream(dataset, Batches(LENGTHS, 7, 0), 0, 1))
    assert sorted(batch.index) == list(range(7))
    assert batch.waveforms.shape == (7, 4960) and batch.waveforms.dtype == torch.float32
    assert batch.targets.shape == (7, 8) and batch.targets.dtype == torch.long
    assert batch.draws.shape == (7, 4) and batch.draws.dtype == torch.float32
    for place, i in enumerate(batch.index):
        wave = read_audio(dataset.utterances[i].path)
        n, ids = len(wave), dataset.tokenizer.encode(TEXTS[i])
        assert n == round(16000 * LENGTHS[i]) == batch.n_samples[place]
        assert torch.equal(batch.waveforms[place, :n], wave)
        assert not batch.waveforms[place, n:].any()
        assert batch.target_lengths[place] == len(ids)
        assert batch.targets[place].tolist() == ids + [0] * (8 - len(ids))
        assert batch.labels[place].tolist() == [2 * i, 2 * i + 1]


def test_without_labels_tokenizer_or_draws(speech):
    bare = SpeechDataset(speech().utterances)
    batch = collate([bare[0, 0], bare[0, 1]])
    assert batch.labels.shape == batch.targets.shape == batch.draws.shape == (2, 0)
    assert batch.target_lengths.tolist() == [0, 0]
    moved = batch.to("cpu")
    assert same(moved, batch)


def test_draws_depend_on_seed_epoch_and_index_only(speech):
    def draws(seed, epoch, index, **options):
        return tuple(speech(seed, **options)[epoch, index][4].tolist())

    keys = [(s, e, i) for s in range(3) for e in range(3) for i in range(3)]
    assert len({draws(*key) for key in keys}) == len(keys)  # all differ
    assert len({x for key in keys for x in draws(*key)}) == 4 * len(keys)
    assert all(0 <= x < 1 for key in keys for x in draws(*key))
    assert draws(1, 2, 2) == draws(1, 2, 2) == draws(1, 2, 2, of=slice(3))
    torch.manual_seed(0)
    np.random.seed(0)
    assert draws(1, 2, 2) == draws(1, 2, 2)  # whatever global generators were drawn from


def test_the_stream_goes_through_the_epochs(speech):
    batches = plan()
    n = len(batches)
    seen = list(stream(speech(), batches, 0, 3 * n))
    assert len(seen) == 3 * n
    expected = [batch.tolist() for epoch in range(3) for batch in batches.epoch(epoch)]
    assert [batch.index for batch in seen] == expected
    for number, batch in enumerate(seen):
        for place, i in enumerate(batch.index):
            assert torch.equal(batch.draws[place], speech()[number // n, i][4])


@pytest.mark.parametrize("start", [1, 2, 3, 5])
def test_a_restart_is_the_tail(speech, start):
    whole = list(stream(speech(), plan(), 0, 6))
    tail = list(stream(speech(), plan(), start, 6))
    assert len(tail) == 6 - start
    assert all(same(a, b) for a, b in zip(tail, whole[start:]))
    assert list(stream(speech(), plan(), 6, 6)) == []


def test_two_processes_share_what_one_would_see(speech):
    one = list(stream(speech(), plan(1), 0, 6))
    two = [list(stream(speech(), plan(2), 0, 6, rank, 2)) for rank in (0, 1)]
    assert len(one) == len(two[0]) == len(two[1]) == 6
    for batch, *shares in zip(one, *two):
        assert batch.index[0::2] == shares[0].index and batch.index[1::2] == shares[1].index
        for rank, share in enumerate(shares):
            size = share.waveforms.shape[1]  # each pads to its own longest
            assert torch.equal(batch.waveforms[rank::2, :size], share.waveforms)
            assert not batch.waveforms[rank::2, size:].any()
            for name in ("n_samples", "labels", "target_lengths", "draws"):
                assert torch.equal(getattr(batch, name)[rank::2], getattr(share, name))


def test_workers_change_nothing(speech):
    alone = list(stream(speech(), plan(), 0, 6))
    helped = list(stream(speech(), plan(), 0, 6, num_workers=2))
    assert len(helped) == 6 and all(same(a, b) for a, b in zip(alone, helped))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_unreadable_file_is_named(tmp_path, num_workers):
    utterances = [Utterance({}, i, wav(tmp_path / f"{i}.wav"), "", 0.5) for i in range(4)]
    Path(utterances[2].path).write_text("overwritten after the check")
    dataset, batches = SpeechDataset(utterances), Batches([0.5] * 4, 1, 0)
    with pytest.raises(AudioError) as caught:
        list(stream(dataset, batches, 0, 8, num_workers=num_workers))
    assert str(caught.value).startswith(f"{tmp_path}/2.wav: not readable")
    good = collate([dataset[0, 0], dataset[0, 1]])
    assert good.waveforms.shape == (2, 10_080)
    assert isinstance(collate([dataset[0, 1], dataset[0, 2]]), AudioError)


# ---- python -m fairasr_min.data check ------------------------------------------------------------


def check(monkeypatch, capsys, *arguments):
    """Exit code, standard output and error of the command, in this process."""
    monkeypatch.setattr(sys, "argv", ["data", "check", *map(str, arguments)])
    before = signal.getsignal(signal.SIGPIPE)
    code = data.main()
    signal.signal(signal.SIGPIPE, before)  # main() lets a closed pipe end the process: not this one
    return code, *capsys.readouterr()


def test_check_says_what_is_wrong(folder):
    names = [wav(folder / f"{i}.wav").name for i in range(4)]
    rows = [row(gender=g, audio_filepath=n) for g, n in zip(("female", "female", "male"), names)]
    long = row(gender="male", text="far too many words for half a second", audio_filepath=names[3])
    rows += [long, "not json"]
    manifest = write(folder / "m.jsonl", rows)
    command = [sys.executable, "-m", "fairasr_min.data", "check", str(manifest)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and done.stderr == ""
    named, rest = done.stdout.splitlines()[:2], done.stdout.splitlines()[2:]
    four, five = sorted(named)
    assert four == f"{manifest}:4: text needs 37 frames for CTC, audio has 13"
    assert five.startswith(f"{manifest}:5: not JSON")
    assert rest == [
        f"{manifest}: 3 good rows, 0.00 h; 2 bad rows",
        "  gender: female 2, male 1",
        "bad rows by group:",
        "  gender: (missing) 1, male 1",
    ]


def test_check_of_a_good_manifest(folder, monkeypatch, capsys):
    manifest = write(folder / "m.jsonl", [row()])
    code, out, err = check(monkeypatch, capsys, manifest)
    assert code == 0 and out == f"{manifest}: 1 good rows, 0.00 h; 0 bad rows\n" and err == ""


def test_check_without_text_and_with_audio_elsewhere(folder, monkeypatch, capsys):
    (folder / "sub").mkdir()
    rows = [{"audio_filepath": "/far/away/a.wav", "duration": 0.5}]
    manifest = write(folder / "sub" / "m.jsonl", rows)
    assert check(monkeypatch, capsys, manifest)[0] == 1
    assert check(monkeypatch, capsys, manifest, "--no_text")[0] == 1
    options = ("--no_text", "--audio_root", folder)
    assert check(monkeypatch, capsys, manifest, *options)[0] == 0


def test_check_of_no_manifest(folder, monkeypatch, capsys):
    code, out, err = check(monkeypatch, capsys, folder / "missing.jsonl")
    assert code == 2 and out == "" and "missing.jsonl" in err


def test_check_counts_frames_as_the_encoder_does(tmp_path, monkeypatch, capsys):
    samples = [640, 700, 1279, 1280, 1400, 8000]
    rows = []
    for n in samples:
        wav(tmp_path / f"{n}.wav", n / 16000)
        text = "abcdefghijklmnopqrstuvwxyz"[: samples_to_frames(n) + 1]  # one too many
        rows.append(row(audio_filepath=f"{n}.wav", text=text, duration=n / 16000))
    code, out, _ = check(monkeypatch, capsys, write(tmp_path / "m.jsonl", rows))
    assert code == 1
    assert f"0 good rows, 0.00 h; {len(samples)} bad rows" in out


def test_bare_commands_take_fair_speech_if_prepared_and_else_the_demo(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    said = []
    (tmp_path / "data" / "make_demo.py").write_text("raise SystemExit(1)")
    with pytest.raises(ManifestError, match="make_demo.py failed"):
        data.default_corpus(said.append)
    (tmp_path / "data" / "make_demo.py").write_text(
        "import pathlib\n"
        "folder = pathlib.Path(__file__).parent / 'demo'\n"
        "folder.mkdir()\n"
        "(folder / 'train.jsonl').write_text('')\n"
    )
    assert str(data.default_corpus(said.append)) == "data/demo"
    assert "SYNTHETIC" in said[-1] and "prepare_fair_speech.py" in said[-1]
    (tmp_path / "data" / "fair_speech").mkdir()
    (tmp_path / "data" / "fair_speech" / "train.jsonl").write_text("")
    said.clear()
    assert str(data.default_corpus(said.append)) == "data/fair_speech" and not said
