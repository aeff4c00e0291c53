"""What people will feed to the three stages: each time one clear error or a counted skip, nothing
that was there changed; and input that looks odd and simply works."""

import io
import json
import os
import pickle
import re
import shutil
import signal
import struct
import subprocess
import sys
import zipfile
from dataclasses import asdict

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT

import evaluate
import finetune
import train
from fairasr_min import checkpoint, model, runtime
from fairasr_min.audio import AudioError
from fairasr_min.conformer import ConformerConfig
from fairasr_min.data import ManifestError
from fairasr_min.model import ConformerCTC
from fairasr_min.text import train_tokenizer

SCRIPTS = {"train": train, "finetune": finetune, "evaluate": evaluate}
CONFIG = ConformerConfig(
    d_model=16, n_layers=1, n_heads=2, conv_kernel=5, subsampling_channels=4, dropout=0
)
RATE = 8000


def noise(path, seconds=0.5, rate=RATE, **how):
    samples = np.random.default_rng(0).uniform(-0.1, 0.1, round(seconds * rate))
    soundfile.write(path, samples, rate, **how)
    return path


def row(i, **values):
    given = {"audio_filepath": f"{i}.wav", "text": "call mom", "duration": 0.5}
    return {**given, "gender": ["female", "male"][i % 2], **values}


def write(path, rows):
    lines = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


@pytest.fixture(scope="session")
def model_file(tmp_path_factory):
    """A small recogniser with the letters of "call mom"."""
    path = tmp_path_factory.mktemp("model") / "model.pt"
    torch.manual_seed(0)
    tokenizer, _ = train_tokenizer(["call mom"], 50)
    weights = ConformerCTC(CONFIG, tokenizer).state_dict()
    arguments = {"train_manifest": "t.jsonl", "audio_root": None}
    checkpoint.save_model(path, "ctc", CONFIG, weights, tokenizer.model, arguments, commit="")
    return path


@pytest.fixture
def folder(tmp_path, model_file):
    """Six clips with their manifest, a model, and a result of earlier days."""
    for i in range(6):
        noise(tmp_path / f"{i}.wav")
    write(tmp_path / "m.jsonl", [row(i) for i in range(6)])
    shutil.copy(model_file, tmp_path / "model.pt")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("of earlier days")
    return tmp_path


@pytest.fixture
def attempt(folder, monkeypatch, capsys):
    """Run a stage on the folder's manifest -> exit code, and what it printed."""

    def run(stage, *arguments, manifest="m.jsonl", dev=None):
        manifest, out = folder / manifest, folder / "out"
        dev = folder / dev if dev else manifest
        common = {
            "train": ["--manifest", manifest, "--dev_manifest", dev, "--init",
                      folder / "model.pt", "--label", "gender", "--epochs", 1],
            "finetune": ["--train_manifest", manifest, "--dev_manifest", dev, "--init",
                         folder / "model.pt", "--epochs", 1],
            "evaluate": ["--manifest", manifest, "--model", folder / "model.pt", "--by", "gender"],
        }[stage]  # fmt: skip
        command = [f"{stage}.py", *common, "--out", out, *arguments]
        monkeypatch.setattr(sys, "argv", [str(part) for part in command])
        handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            with pytest.raises(SystemExit) as ended:
                runtime.run(
                    SCRIPTS[stage].main, (ManifestError, AudioError, checkpoint.CheckpointError)
                )
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        printed = capsys.readouterr()
        if ended.value.code:
            assert printed.err.count("error:") == 1, printed.err
        return ended.value.code, printed.out + printed.err

    return run


def contents(folder):
    return {p: p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


# ---- one bad row among good ones -----------------------------------------------------------------


def cut(path, share=0.5):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path.name


def bad_samples(folder, value):
    samples = np.random.default_rng(0).uniform(-0.1, 0.1, RATE // 2)
    samples[999] = value
    soundfile.write(folder / "bad.wav", samples, RATE, subtype="FLOAT")
    return row(2, audio_filepath="bad.wav")


def file_of(folder, content):
    (folder / "bad.wav").write_bytes(content)
    return row(2, audio_filepath="bad.wav")


def named(path, **values):
    return row(2, audio_filepath=path.name, **values)


def fifo(path):
    os.mkfifo(path)
    return path


LONG_FLAC = dict(seconds=4, format="FLAC", subtype="PCM_16")
ALL = ("train", "finetune", "evaluate")
BAD_ROWS = {  # name: what makes the row, the reason given, by which stages
    "broken JSON": (lambda f: '{"audio_filepath": "2.wav", "text', "not JSON", ALL),
    "not an object": (lambda f: "[1, 2]", "expected a JSON object, found list", ALL),
    "deep JSON": (lambda f: "[" * 100_000, "not JSON", ALL),
    "half a surrogate pair": (lambda f: '{"text": "\\ud83d"}', "not JSON", ALL),
    "no audio_filepath": (lambda f: {"text": "a", "duration": 1}, "no audio_filepath", ALL),
    "number as path": (lambda f: row(2, audio_filepath=3), "no audio_filepath", ALL),
    "missing audio": (lambda f: row(2, audio_filepath="gone.wav"), "no audio file at .*gone", ALL),
    "folder as audio": (lambda f: row(2, audio_filepath="out"), "no audio file at", ALL),
    "pipe as audio": (lambda f: named(fifo(f / "pipe.wav")), "no audio file at", ALL),
    "null byte in path": (lambda f: row(2, audio_filepath="a\0.wav"), "no audio file at", ALL),
    "file of zero bytes": (lambda f: file_of(f, b""), "bad.wav: not readable as audio", ALL),
    "wav without samples": (lambda f: named(noise(f / "b.wav", 0)), "no audio samples", ALL),
    "text named .wav": (lambda f: file_of(f, b"hello " * 99), "not readable as audio", ALL),
    "pickle named .wav": (lambda f: file_of(f, pickle.dumps([1])), "not readable as audio", ALL),
    "truncated wav": (
        lambda f: row(2, audio_filepath=cut(noise(f / "b.wav", 4)), duration=4), "lasts 2.0", ALL,
    ),
    "truncated flac": (
        lambda f: row(2, audio_filepath=cut(noise(f / "b.flac", **LONG_FLAC)), duration=4),
        "b.flac: (not readable as audio|cut short)", ALL,
    ),
    "truncated mp3": (
        lambda f: row(2, audio_filepath=cut(noise(f / "b.mp3", 4, 16000)), duration=4),
        "b.mp3: (cut short|not readable)|lasts", ALL,
    ),
    "NaN": (lambda f: bad_samples(f, np.nan), "bad.wav: holds NaN or infinite samples", ALL),
    "Inf": (lambda f: bad_samples(f, -np.inf), "bad.wav: holds NaN or infinite samples", ALL),
    "absurd samples": (
        lambda f: bad_samples(f, 1e30), r"bad.wav: holds a sample of 1e\+30", ALL,
    ),
    "silence": (
        lambda f: file_of(f, silent_wav()), "bad.wav: digital silence, every sample is 0", ALL,
    ),
    "1 ms": (
        lambda f: named(noise(f / "b.wav", 0.001), duration=0.001), "less than one frame", ALL,
    ),
    "more than an hour": (lambda f: row(2, duration=3601), "absurd duration 3601", ALL),
    "NaN duration": (lambda f: row(2, duration=float("nan")), "absurd duration nan", ALL),
    "duration as text": (lambda f: row(2, duration="0.5"), "no duration", ALL),
    "wrong duration": (lambda f: row(2, duration=0.9), "says 0.90 s but .* lasts 0.50", ALL),
    "beyond the end": (lambda f: row(2, offset=0.4), "ends at 0.90 s but", ALL),
    "negative offset": (lambda f: row(2, offset=-1), "offset -1 is not", ALL),
    "odd sample rate": (
        lambda f: named(noise(f / "b.wav", rate=44101)), "44101 Hz has no simple ratio", ALL,
    ),
    "duplicate": (lambda f: row(1), "the same audio as line 2", ALL),
    "duplicate by another name": (
        lambda f: row(1, audio_filepath=str(f / "1.wav")), "the same audio as line 2", ALL,
    ),
    "no text": (lambda f: row(2, text=None), "no text", ("finetune", "evaluate")),
    "empty text": (lambda f: row(2, text=" "), "empty text", ("finetune",)),
    "emoji alone": (lambda f: row(2, text="\U0001f600!"), "empty text", ("finetune",)),
    "too much text": (
        lambda f: row(2, text="call mom " * 9), "text needs 89 frames for CTC, audio has 13",
        ("finetune",),
    ),
    "letters without units": (
        lambda f: row(2, text="call m\u00f6m \u0436"), "text has \u00f6, \u0436: not in the units",
        ("finetune",),
    ),
    "Hebrew without units": (
        lambda f: row(2, text="\u05e9\u05dc\u05d5\u05dd"), "not in the units", ("finetune",),
    ),
}  # fmt: skip


def silent_wav():
    file = io.BytesIO()
    soundfile.write(file, np.zeros(RATE // 2), RATE, format="WAV")
    return file.getvalue()


@pytest.mark.parametrize(
    "name, stage", [(name, stage) for name, (_, _, stages) in BAD_ROWS.items() for stage in stages]
)
def test_a_bad_row_is_refused_or_counted(folder, attempt, name, stage):
    make, reason, _ = BAD_ROWS[name]
    rows = [row(i) for i in range(6)]
    rows[2] = make(folder)
    write(folder / "bad.jsonl", rows)
    good = [r for i, r in enumerate(rows) if i != 2]
    write(folder / "good.jsonl", good)
    before = contents(folder)
    code, printed = attempt(stage, manifest="bad.jsonl", dev="good.jsonl")
    assert code == 2 and re.search(f"bad.jsonl:3: .*{reason}", printed), printed
    assert "1 of 6 rows cannot be used" in printed and "--max_bad 1" in printed
    assert contents(folder) == before
    code, printed = attempt(
        stage, "--max_bad", 1, "--max_steps", 0, manifest="bad.jsonl", dev="good.jsonl"
    ) if stage != "evaluate" else attempt(stage, "--max_bad", 1, manifest="bad.jsonl")  # fmt: skip
    assert code == 0 and "going on without 1 bad rows" in printed, printed
    after = contents(folder)
    assert all(after[path] == before[path] for path in before)


def test_a_bad_row_of_the_dev_set_is_refused_too(folder, attempt):
    write(folder / "dev.jsonl", [row(0), bad_samples(folder, np.nan)])
    before = contents(folder)
    for stage in ("train", "finetune"):
        code, printed = attempt(stage, dev="dev.jsonl")
        assert code == 2 and "dev.jsonl:2: " in printed and "NaN" in printed
    assert contents(folder) == before


# ---- an hour in one clip -------------------------------------------------------------------------


def test_a_clip_of_an_hour(folder, attempt, monkeypatch, capsys):
    monkeypatch.setattr(model, "LONGEST", 10.0)  # a short window costs a short while
    monkeypatch.setattr(model, "CONTEXT", 1.0)
    noise(folder / "hour.wav", 3600, 1000, subtype="PCM_U8")
    hour = row(6, audio_filepath="hour.wav", duration=3600)
    write(folder / "long.jsonl", [*(row(i) for i in range(6)), hour])
    code, printed = attempt("evaluate", manifest="long.jsonl")
    assert code == 0 and "7 utterances, 1.00 h" in printed
    heard = (folder / "out" / "hyps.jsonl").read_text().splitlines()
    text = json.loads(heard[6])["pred_text"]
    assert len(text) > 3600 and len(heard) == 7  # noise all along gives letters all along
    command = ["evaluate.py", "--model", folder / "model.pt", "--audio", folder / "hour.wav"]
    monkeypatch.setattr(sys, "argv", [str(part) for part in command])
    assert evaluate.main() == 0 and text in capsys.readouterr().out
    shutil.rmtree(folder / "out")
    for stage in ("train", "finetune"):
        code, printed = attempt(stage, "--max_steps", 0, manifest="long.jsonl", dev="m.jsonl")
        assert code == 0 and "left out 1 of 7 utterances over 17.5 s" in printed
        shutil.rmtree(folder / "out")


# ---- a manifest that is none ---------------------------------------------------------------------

MANIFESTS = {
    "empty": (b"", "holds no rows"),
    "blank lines": (b"\n  \r\n\n", "holds no rows"),
    "a byte-order mark alone": (b"\xef\xbb\xbf", "holds no rows"),
    "binary": (bytes(range(256)), "cannot be read .*UTF-8 is expected"),
    "UTF-16": (json.dumps(row(0)).encode("utf-16"), "cannot be read .*UTF-8 is expected"),
    "a table": (b"audio_filepath,text\n0.wav,call mom\n", "2 of 2 rows cannot be used"),
    "one JSON list": (json.dumps([row(0), row(1)]).encode(), "expected a JSON object, found list"),
}


@pytest.mark.parametrize("stage", ALL)
@pytest.mark.parametrize("name", MANIFESTS)
def test_what_is_no_manifest(folder, attempt, name, stage):
    content, reason = MANIFESTS[name]
    (folder / "bad.jsonl").write_bytes(content)
    before = contents(folder)
    code, printed = attempt(stage, manifest="bad.jsonl", dev="m.jsonl")
    assert code == 2 and re.search(f"bad.jsonl.*{reason}", printed), printed
    assert contents(folder) == before


@pytest.mark.parametrize("stage", ALL)
def test_no_manifest_and_no_usable_row(folder, attempt, stage):
    write(folder / "bad.jsonl", ["no", "row"])
    before = contents(folder)
    code, printed = attempt(stage, manifest="gone.jsonl", dev="m.jsonl")
    assert code == 2 and "gone.jsonl: cannot be read" in printed
    code, printed = attempt(stage, manifest="out", dev="m.jsonl")
    assert code == 2 and "out: cannot be read" in printed
    code, printed = attempt(stage, "--max_bad", 9, manifest="bad.jsonl", dev="m.jsonl")
    assert code == 2 and "bad.jsonl: no usable row is left" in printed
    assert contents(folder) == before


# ---- columns -------------------------------------------------------------------------------------

COLUMNS = {
    "absent": ([{}] * 6, "no column 'x'; columns there are: gender"),
    "one value": ([{"x": "a"}] * 6, "column 'x' has 1 value"),
    "no value": ([{"x": None}, {"x": ""}] * 3, "column 'x' has 0 value"),
    "a value in every row": ([{"x": i} for i in range(6)], "'x' has another value in every row"),
    "lists": ([{"x": ["a", i % 2]} for i in range(6)], r"column 'x' holds \[\"a\", 0\]; groups"),
    "objects": ([{"x": "a"}] * 5 + [{"x": {"y": 1}}], r"column 'x' holds {\"y\": 1}; groups"),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_what_is_no_group(folder, attempt, name):
    columns, reason = COLUMNS[name]
    write(folder / "m.jsonl", [row(i, **x) for i, x in enumerate(columns)])
    before = contents(folder)
    code, printed = attempt("train", "--label", "gender", "x")
    assert code == 2 and re.search(f"m.jsonl: .*{reason}", printed), printed
    if name in ("absent", "lists", "objects"):
        code, printed = attempt("evaluate", "--by", "gender+x")
        assert code == 2 and re.search(f"m.jsonl: .*{reason}", printed), printed
    assert contents(folder) == before


def test_values_of_mixed_types_are_groups_by_what_they_say(folder, attempt):
    values = [30, 30.0, "30", True, None, 1.5]
    write(folder / "m.jsonl", [row(i, x=x) for i, x in enumerate(values)])
    code, printed = attempt("train", "--label", "x", "--max_steps", 0)
    assert code == 0 and "hiding {'x': ['1.5', '30', 'true']}" in printed
    assert "x: 1 of 6 utterances unlabelled" in printed
    code, printed = attempt("evaluate", "--by", "x")
    groups = json.loads((folder / "out" / "report.json").read_text())["by"]["x"]["groups"]
    sizes = {name: counts["utterances"] for name, counts in groups.items()}
    assert code == 0 and sizes == {"1.5": 1, "30": 3, "true": 1, "(missing)": 1}


# ---- arguments -----------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ALL)
@pytest.mark.parametrize("out", ["m.jsonl", "m.jsonl/deeper"])
def test_the_output_folder_is_a_file(folder, attempt, stage, out):
    before = contents(folder)
    code, printed = attempt(stage, "--out", folder / out)
    assert code == 2 and "m.jsonl" in printed and "--out" in printed, printed
    assert contents(folder) == before


def test_batches_of_one(folder, attempt):
    before = contents(folder)
    code, printed = attempt("train", "--batch_size", 1)
    assert code == 2 and "--batch_size 1: nothing to contrast" in printed
    write(folder / "one.jsonl", [row(0)])
    code, printed = attempt("train", "--balance_param", 0, manifest="one.jsonl")
    assert code == 2 and "one.jsonl: 1 utterance(s) left, too few" in printed
    code, printed = attempt("train", dev="one.jsonl")
    assert code == 2 and "one.jsonl: 1 utterance(s) left, too few" in printed
    (folder / "one.jsonl").unlink()
    assert contents(folder) == before
    code, printed = attempt("train", "--batch_size", 5)  # six: not five and one
    lines = map(json.loads, open(folder / "out" / "log.jsonl"))
    losses = [line["nce"] for line in lines if "nce" in line]
    assert code == 0 and min(losses) > 0
    shutil.rmtree(folder / "out")
    code, printed = attempt("finetune", "--batch_size", 1)
    assert code == 0 and "stage 2 done" in printed
    code, printed = attempt("evaluate", "--batch_size", 1)
    assert code == 0


@pytest.mark.parametrize("stage", ["train", "finetune"])
def test_no_steps_give_the_model_they_began_with(folder, attempt, stage):
    code, printed = attempt(stage, "--max_steps", 0)
    assert code == 0 and f"stage {1 + (stage == 'finetune')} done" in printed
    name = {"train": "pretrained.pt", "finetune": "model.pt"}[stage]
    result = checkpoint.load_model_file(folder / "out" / name)["weights"]
    given = checkpoint.load_model_file(folder / "model.pt")["weights"]
    assert result.keys() == given.keys()
    assert all(torch.equal(result[k], given[k]) for k in given)


@pytest.mark.parametrize("stage", ["train", "finetune"])
@pytest.mark.parametrize("steps", [6, 40])
def test_a_learning_rate_that_diverges(folder, attempt, stage, steps):
    code, printed = attempt(stage, "--lr", 1e30, "--epochs", 40, "--max_steps", steps)
    assert code == 2 and "training has diverged. Try a lower --lr" in printed, printed
    assert "The last step held" in printed and ".wav" in printed
    assert not (folder / "out" / "pretrained.pt").exists()


def test_an_encoder_that_collapses(folder, attempt):
    size = ("--init", "none", "--size", "tiny")
    code, printed = attempt("train", *size, "--lr", 1, "--epochs", 60, "--batch_size", 6)
    assert code == 2 and re.search("the encoder has collapsed: .*lower --lr", printed), printed


@pytest.mark.parametrize("found, code", [(0.9, 2), (1.0, 0)])
def test_no_gradient_left_is_no_collapse_if_every_view_is_found(
    folder, attempt, monkeypatch, found, code
):
    nce = train.losses.info_nce
    monkeypatch.setattr(train.losses, "info_nce", lambda *given: 1e-12 * nce(*given))
    monkeypatch.setattr(train.losses, "contrastive_accuracy", lambda *_: torch.tensor(found))
    options = ("--init", "none", "--size", "tiny", "--balance_param", 0, "--batch_size", 4)
    ended, printed = attempt("train", *options, "--epochs", 10, "--max_steps", 10)
    assert ended == code and ("collapsed" in printed) == (code == 2), printed


# ---- files from strangers ------------------------------------------------------------------------


class Payload:
    def __reduce__(self):
        return (open, ("it-ran", "w"))


def changed(path, **changes):
    payload = torch.load(path, weights_only=True)
    for name, change in changes.items():
        if change is None:
            del payload[name]
        else:
            payload[name] = change(payload[name])
    torch.save(payload, path)


def rezipped(path, compression, data=lambda name, content: content):
    with zipfile.ZipFile(path) as archive:
        members = [(m.filename, archive.read(m)) for m in archive.infolist()]
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members:
            archive.writestr(name, data(name, content))


def flipped(path):
    """One bit of the largest tensor."""
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda m: m.file_size)
    content = bytearray(path.read_bytes())
    name, extra = struct.unpack_from("<HH", content, largest.header_offset + 26)
    content[largest.header_offset + 30 + name + extra + 9] ^= 1
    path.write_bytes(content)


def claim(path):
    """Say that a tensor of float32 has 10^9 elements."""

    def enlarge(name, content):
        n = ConformerCTC(CONFIG, vocab_size=5).encoder.layers[0].conv.depthwise_conv.weight.numel()
        short = b"K" + bytes([n])
        assert not name.endswith("data.pkl") or short in content
        return content.replace(short, b"J" + (10**9).to_bytes(4, "little"))

    rezipped(path, zipfile.ZIP_STORED, enlarge)


def config(**values):
    return lambda path: changed(path, config=lambda before: {**before, **values})


MODELS = {
    "missing": (lambda p: p.unlink(), "no such file|is not there"),
    "zero bytes": (lambda p: p.write_bytes(b""), "not a PyTorch file"),
    "text": (lambda p: p.write_text("hello"), "not a PyTorch file"),
    "cut in half": (lambda p: cut(p), "damaged"),
    "one bit flipped": (flipped, "damaged"),
    "a pickle": (lambda p: p.write_bytes(pickle.dumps(Payload())), "not a PyTorch file"),
    "code inside": (lambda p: torch.save(Payload(), p), "not plain data"),
    "a list": (lambda p: torch.save([1], p), "not a file of this project"),
    "plain weights": (lambda p: torch.save({"a": torch.zeros(3)}, p), "not a file of this project"),
    "a later format": (lambda p: changed(p, format=lambda f: f + 1), "format 1"),
    "another kind": (lambda p: changed(p, kind=lambda k: "vocoder"), "kind 'vocoder'"),
    "compressed": (lambda p: rezipped(p, zipfile.ZIP_DEFLATED), "compressed"),
    "10^9 elements": (claim, "damaged"),
    "a billion layers": (config(n_layers=10**9), "1000000000 layers, and weights of 1"),
    "a huge width": (config(d_model=10**9), "damaged, or made by another version"),
    "width as text": (config(d_model="16"), "damaged, or made by another version"),
    "unknown option": (config(depth=3), "unexpected keyword"),
    "no config": (lambda p: changed(p, config=None), "another version"),
    "no weights": (lambda p: changed(p, weights=None), "another version"),
    "weights as a list": (lambda p: changed(p, weights=lambda w: [1]), "another version"),
    "no tokenizer": (lambda p: changed(p, tokenizer=lambda t: None), "another version"),
    "a broken tokenizer": (lambda p: changed(p, tokenizer=lambda t: b"\x08" * 99), "another ver"),
    "a broken weight": (
        lambda p: changed(p, weights=lambda w: {**w, "decoder.bias": torch.zeros(3)}),
        "weights do not fit",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_what_is_no_model_file(folder, attempt, name, monkeypatch):
    monkeypatch.chdir(folder)
    change, reason = MODELS[name]
    change(folder / "model.pt")
    before = contents(folder)
    for stage in ("evaluate", "finetune", "train"):
        if name == "a broken weight" and stage == "train":
            continue  # the head, which stage 1 does not build: it travels on, and stage 2 refuses
        code, printed = attempt(stage)
        assert code == 2 and re.search(f"model.pt.*({reason})", printed), printed
    assert contents(folder) == before  # and no "it-ran"


def test_the_state_of_a_run_is_no_model_and_the_other_way_round(folder, attempt):
    assert attempt("train", "--max_steps", 1)[0] == 0
    state = folder / "out" / "checkpoint.pt"
    before = contents(folder)
    code, printed = attempt("finetune", "--init", state, "--out", folder / "new")
    assert code == 2 and "checkpoint.pt: the state of a run; its model is" in printed
    code, printed = attempt(
        "finetune", "--resume_ckpt", folder / "model.pt", "--out", folder / "new"
    )
    assert code == 2 and "a model file, not the state of a run" in printed
    assert contents(folder) == before


# ---- checkpoints that do not fit -----------------------------------------------------------------


@pytest.mark.parametrize("stage", ["train", "finetune"])
@pytest.mark.parametrize("damage", ["cut in half", "zero bytes", "a model file", "one bit flipped"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(folder, attempt, stage, damage):
    arguments = (stage, "--epochs", 4, "--batch_size", 3, "--save_every", 1)
    assert attempt(*arguments, "--out", folder / "whole")[0] == 0
    assert attempt(*arguments, "--max_steps", 3)[0] == 0
    last = folder / "out" / "checkpoint.pt"
    if damage == "a model file":
        shutil.copy(folder / "model.pt", last)
    else:
        MODELS[damage][0](last)
    code, printed = attempt(*arguments)
    assert code == 0 and "going on from step 2" in printed
    assert re.search("warning: .*checkpoint.pt.*going on from .*previous.pt", printed), printed
    one, two = (torch.load(folder / d / "checkpoint.pt") for d in ("whole", "out"))
    assert all(torch.equal(one["model"][k], two["model"][k]) for k in one["model"])


@pytest.mark.parametrize("stage", ["train", "finetune"])
def test_a_checkpoint_of_another_size_or_run(folder, attempt, stage):
    begun = (stage, "--epochs", 3)
    assert attempt(*begun, "--max_steps", 1)[0] == 0
    assert attempt(*begun, "--max_steps", 1, "--seed", 5, "--out", folder / "other")[0] == 0
    last = folder / "out" / "checkpoint.pt"
    changed(last, model=lambda m: {k: torch.zeros(3) for k in m})
    before = contents(folder)
    code, printed = attempt(*begun)
    assert code == 2 and "checkpoint.pt: its model is of another size or kind" in printed
    code, printed = attempt(*begun, "--max_steps", 1)  # whose result is there
    assert code == 0 and "finished before, at step 1" in printed
    assert contents(folder) == before
    shutil.copy(folder / "other" / "checkpoint.pt", last)
    before = contents(folder)
    code, printed = attempt(*begun)
    assert code == 2 and "seed: 5 there, 0 now" in printed
    changed(last, arguments=None)
    code, printed = attempt(*begun)
    assert code == 2 and "arguments is 'None': not the state of a run" in printed


def test_the_best_model_comes_along_to_another_folder(folder, attempt):
    begun = ("finetune", "--epochs", 4, "--batch_size", 3)
    assert attempt(*begun)[0] == 0
    assert attempt(*begun, "--max_steps", 3, "--out", folder / "parts")[0] == 0
    there = ("--resume_ckpt", folder / "parts" / "checkpoint.pt", "--out", folder / "new")
    assert torch.load(folder / "parts" / "checkpoint.pt")["best"] is not None
    (folder / "parts" / "model.pt").rename(folder / "model of parts.pt")
    code, printed = attempt(*begun, *there)
    assert code == 2 and "the best model of this run so far, is missing" in printed
    shutil.copy(folder / "model of parts.pt", folder / "parts" / "model.pt")
    changed(folder / "parts" / "model.pt", dev=lambda _: {"dev_wer": 0.123})  # of another time
    code, printed = attempt(*begun, *there)
    assert code == 2 and "the best model of this run so far, is missing" in printed
    assert not (folder / "new").exists()
    (folder / "model of parts.pt").rename(folder / "parts" / "model.pt")
    last = (*there[:2], "--max_steps", 3, "--out", folder / "done")  # with no step left
    assert attempt(*begun, *last)[0] == 0
    one, two = ((folder / d / "model.pt").read_bytes() for d in ("parts", "done"))
    assert one == two
    assert attempt(*begun, *there)[0] == 0
    one, two = (torch.load(folder / d / "model.pt") for d in ("out", "new"))
    assert one["step"] == two["step"]
    assert all(torch.equal(one["weights"][k], two["weights"][k]) for k in one["weights"])


@pytest.mark.parametrize("stage", ["train", "finetune"])
def test_more_batches_a_step_than_there_are(folder, attempt, stage):
    code, printed = attempt(stage, "--grad_accum", 1000)
    assert code == 2 and re.search(r"--grad_accum 1000: there are \d+ batches in all", printed)


def test_two_runs_in_one_folder(folder, attempt):
    """The first holds the folder until it ends, however it ends."""
    holder = subprocess.Popen(
        [sys.executable, "-c", "import sys; from pathlib import Path; "
         "from fairasr_min import checkpoint; checkpoint.start(Path(sys.argv[1]), {}); "
         "print('held', flush=True); sys.stdin.read()", str(folder / "new")],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout.readline() == "held\n"
    (folder / "new" / "args.json").unlink()
    before = contents(folder)
    code, printed = attempt("train", "--max_steps", 0, "--out", folder / "new")
    assert code == 2 and "another process is at work there" in printed
    assert contents(folder) == before
    holder.kill()
    holder.wait()
    assert attempt("train", "--max_steps", 0, "--out", folder / "new")[0] == 0


# ---- no room on the disk -------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["train", "finetune"])
def test_a_full_disk_leaves_the_last_good_checkpoint(folder, attempt, stage):
    """No file may grow past 100 kB: the system refuses, as it does on a full disk."""
    import resource

    arguments = (stage, "--epochs", 4, "--batch_size", 3, "--save_every", 1)
    assert attempt(*arguments, "--out", folder / "whole")[0] == 0
    assert attempt(*arguments, "--max_steps", 2)[0] == 0
    before = contents(folder / "out")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        code, printed = attempt(*arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2 and re.search(r"could not be written \(.*too large.*Make room", printed)
    after = contents(folder / "out")
    assert {p for p in after if p.suffix == ".pt"} <= {p for p in before}
    assert all(after[p] == before[p] for p in after if p.suffix == ".pt" and "model" not in p.name)
    assert not [p for p in after if "unfinished" in p.name]
    assert attempt(*arguments)[0] == 0
    one, two = (torch.load(folder / d / "checkpoint.pt") for d in ("whole", "out"))
    assert all(torch.equal(one["model"][k], two["model"][k]) for k in one["model"])


def test_a_report_without_room_leaves_the_one_before(folder, attempt, monkeypatch):
    import resource

    assert attempt("evaluate")[0] == 0
    before = contents(folder)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, limits[1]))
    try:
        code, printed = attempt("evaluate", "--batch_size", 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2 and "what was there is as it was" in printed
    assert contents(folder) == before


def test_what_fails_after_decoding_costs_no_decoding(folder, attempt, monkeypatch):
    def fail(*_, **__):
        raise ManifestError("no report today")

    monkeypatch.setattr(evaluate.report, "make_report", fail)
    code, printed = attempt("evaluate")
    assert code == 2 and "no report today" in printed
    assert len((folder / "out" / "hyps.jsonl").read_text().splitlines()) == 6


# ---- predictions of others -----------------------------------------------------------------------

PREDICTIONS = {
    "broken JSON": ('{"text": "a"', r"p.jsonl:2: "),
    "no pred_text": ('{"text": "a"}', "p.jsonl:2: missing 'pred_text'"),
    "pred_text is null": (
        '{"text": "a", "pred_text": null}',
        "p.jsonl:2: pred_text must be a text, not None",
    ),
    "a list": ('["a", "b"]', "p.jsonl:2: expected a JSON object"),
}


@pytest.mark.parametrize("name", PREDICTIONS)
def test_predictions_that_cannot_be_read(folder, attempt, name):
    line, reason = PREDICTIONS[name]
    write(folder / "p.jsonl", [row(0, pred_text="a"), line])
    before = contents(folder)
    code, printed = attempt("evaluate", "--predictions", folder / "p.jsonl")
    assert code == 2 and re.search(reason, printed), printed
    assert contents(folder) == before


# ---- odd, and simply works -----------------------------------------------------------------------

WORKS = {
    "stereo": dict(channels=2),
    "a hundred channels": dict(channels=100),
    **{f"{rate} Hz": dict(rate=rate) for rate in (8000, 11025, 16000, 22050, 24000, 44100, 48000)},
    **{kind: dict(subtype=kind) for kind in ("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT",
                                             "DOUBLE", "ULAW", "ALAW")},
    "flac": dict(suffix="flac"),
    "flac, 24 bit": dict(suffix="flac", subtype="PCM_24"),
    "ogg": dict(suffix="ogg", rate=16000),
    "opus": dict(suffix="opus", rate=48000, format="OGG", subtype="OPUS"),
    "mp3": dict(suffix="mp3", rate=16000),
    "mp3, 44.1 kHz, stereo": dict(suffix="mp3", rate=44100, channels=2),
}  # fmt: skip


@pytest.mark.parametrize("stage", ALL)
def test_every_kind_of_audio_works(folder, attempt, stage):
    rows = []
    for i, (suffix, channels, rate, how) in enumerate(
        (h.pop("suffix", "wav"), h.pop("channels", 1), h.pop("rate", 16000), h)
        for h in map(dict, WORKS.values())
    ):
        samples = np.random.default_rng(i).uniform(-0.1, 0.1, (rate, channels))
        soundfile.write(folder / f"kind{i}.{suffix}", samples, rate, **how)
        rows.append(row(i, audio_filepath=f"kind{i}.{suffix}", duration=1.0))
    write(folder / "m.jsonl", rows)
    code, printed = attempt(stage)
    assert code == 0, printed
    if stage == "evaluate":
        assert len((folder / "out" / "hyps.jsonl").read_text().splitlines()) == len(WORKS)


@pytest.mark.parametrize("stage", ALL)
def test_windows_lines_a_byte_order_mark_and_any_path_work(folder, attempt, stage):
    deep = folder / "my data" / "\u0434\u0430\u043d\u043d\u044b\u0435 \u97f3\u58f0 \U0001f3a4"
    deep.mkdir(parents=True)
    rows = []
    for i in range(6):
        name = f"clip {i} \u00e9\u05d0.wav"
        noise(deep / name)
        rows.append(json.dumps(row(i, audio_filepath=name), ensure_ascii=i % 2 == 0))
    manifest = deep / "m \u00fc.jsonl"
    manifest.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(rows).encode() + b"\r\n\r\n")
    code, printed = attempt(stage, "--out", deep / "out put", manifest=manifest)
    assert code == 0, printed
    assert (deep / "out put").is_dir()


def test_any_script_and_emoji_are_learned_from_scratch(folder, attempt):
    texts = [
        "\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd",
        "\u0645\u0631\u062d\u0628\u0627",
        "\u4f60\u597d",
        "na\u00efve \U0001f600 caf\u00e9",
        "\u043f\u0440\u0438\u0432\u0435\u0442",
        "a",
    ]
    for i in range(6):
        noise(folder / f"{i}.wav", 1.5)
    write(folder / "m.jsonl", [row(i, text=t, duration=1.5) for i, t in enumerate(texts)])
    code, printed = attempt("finetune", "--init", "none", "--size", "tiny", "--batch_size", 3)
    assert code == 0, printed
    code, printed = attempt("evaluate", "--model", folder / "out" / "model.pt")
    assert code == 0
    kept = [json.loads(line) for line in open(folder / "out" / "hyps.jsonl", encoding="utf-8")]
    assert [r["text"] for r in kept] == texts


def test_a_terminal_that_lacks_letters_is_no_reason_to_fail(folder):
    write(folder / "m.jsonl", [row(i, gender=g) for i, g in enumerate(["\u5973", "\u7537"] * 3)])
    done = subprocess.run(
        [sys.executable, str(ROOT / "evaluate.py"), "--model", str(folder / "model.pt"),
         "--manifest", str(folder / "m.jsonl"), "--by", "gender", "--out", str(folder / "out")],
        capture_output=True, text=True, env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert done.returncode == 0 and "\\u5973" in done.stdout, done.stderr


def test_config_of_the_model_is_the_one_that_was_saved(model_file):
    assert asdict(checkpoint.load_model_file(model_file)["config"]) == asdict(CONFIG)
