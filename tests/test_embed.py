"""Embeddings against a loop over single utterances; the probe on vectors whose answer is known."""

import json
import os
import pickle
import re
import subprocess
import sys
from xml.etree import ElementTree

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT
from sklearn.metrics import balanced_accuracy_score

from fairasr_min import checkpoint, data, embed, runtime, stats
from fairasr_min.audio import AudioError, read_audio
from fairasr_min.conformer import ConformerConfig
from fairasr_min.model import ConformerCTC, FairASR
from fairasr_min.nemo import export
from fairasr_min.runtime import World
from fairasr_min.text import train_tokenizer

CONFIG = ConformerConfig(d_model=16, n_layers=1, n_heads=2, conv_kernel=5, subsampling_channels=4)
HERE = World(0, 1, torch.device("cpu"))


def start(*arguments, code=0):
    """python -m ... -> what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=120,
    )  # fmt: skip
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr if code else done.stdout


# ---- write ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Twelve clips of noise from 0.2 to 1.3 s, not in order, two of them parts of one recording; a
    stage-1 file, a stage-2 file and an archive of one encoder."""
    folder = tmp_path_factory.mktemp("embed")
    random = np.random.default_rng(0)
    rows = []
    for i, seconds in enumerate(random.permutation(np.linspace(0.2, 1.3, 12))):
        samples = random.normal(size=round(seconds * 16000)) * random.uniform(0.01, 0.3)
        soundfile.write(folder / f"{i}.wav", samples.clip(-1, 1), 16000)
        rows.append({"audio_filepath": f"{i}.wav", "duration": len(samples) / 16000,
                     "speaker": f"s{i}", "gender": ["female", "male"][i % 2]})  # fmt: skip
    longest = max(rows, key=lambda row: row["duration"])
    for start in (0, 0.5):
        rows.append({**longest, "offset": start, "duration": 0.5})
    rows.remove(longest)
    lines = [json.dumps(row) + "\n" for row in rows]
    (folder / "m.jsonl").write_text("".join(lines))

    torch.manual_seed(0)
    tokenizer, _ = train_tokenizer(["call mom"], 50)
    model = ConformerCTC(CONFIG, tokenizer).eval()
    for buffer in model.buffers():  # BatchNorm as after training
        if buffer.dtype == torch.float32 and buffer.shape == (16,):
            buffer.add_(torch.rand(16))
    weights = model.state_dict()
    checkpoint.save_model(
        folder / "model.pt", "ctc", CONFIG, weights, tokenizer.model, {}, commit=""
    )
    weights = {k: w for k, w in weights.items() if not k.startswith("decoder")}
    checkpoint.save_model(folder / "pretrained.pt", "encoder", CONFIG, weights, None, {}, commit="")
    export(model, str(folder / "model.nemo"))
    return folder


def call(monkeypatch, capsys, *arguments):
    """The command in this process -> exit code, and what it printed."""
    monkeypatch.setattr(sys, "argv", ["embed", *map(str, arguments)])
    mistakes = (data.ManifestError, checkpoint.CheckpointError, AudioError, stats.StatisticsError)
    with pytest.raises(SystemExit) as ended:
        runtime.run(embed.main, mistakes)
    printed = capsys.readouterr()
    if ended.value.code:
        assert printed.err.count("error:") == 1 and "Traceback" not in printed.err
    return ended.value.code, printed.out + printed.err


def write(corpus, out, monkeypatch, capsys, *more, model="pretrained.pt"):
    code, printed = call(monkeypatch, capsys, "write", "--model", corpus / model, "--manifest",
                         corpus / "m.jsonl", "--out", out, "--device", "cpu", *more)  # fmt: skip
    assert code == 0, printed
    return dict(np.load(out, allow_pickle=False))


@torch.no_grad()
def by_hand(corpus):
    """The mean of the encoder's frames, one utterance at a time."""
    payload = checkpoint.load_model_file(corpus / "pretrained.pt")
    model = FairASR(payload["config"], 0, False).eval()
    checkpoint.load_weights(model, payload, "", ("encoder", "log_mel"))
    means = []
    for line in (corpus / "m.jsonl").read_text().splitlines():
        row = json.loads(line)
        segment = (row["offset"], row["duration"]) if "offset" in row else ()
        waveform = read_audio(corpus / row["audio_filepath"], *segment)
        h, lengths = model.encoder(*model.log_mel(waveform[None], torch.tensor([len(waveform)])))
        means.append(sum(h[0, t] for t in range(int(lengths))) / int(lengths))
    return torch.stack(means).numpy()


def test_embeddings_are_those_of_a_loop(corpus, tmp_path, monkeypatch, capsys):
    there = write(corpus, tmp_path / "new" / "e.npz", monkeypatch, capsys)
    assert there["x"].dtype == np.float32 and there["x"].shape == (13, 16)
    np.testing.assert_allclose(there["x"], by_hand(corpus), atol=1e-5)
    assert there["ids"].tolist()[:2] == ["0.wav", "1.wav"]
    assert [re.sub(r"^\d+", "", name) for name in there["ids"][-2:]] == [
        ".wav#t=0.0,0.5", ".wav#t=0.5,1.0"
    ]  # fmt: skip
    assert there["model"] == str(corpus / "pretrained.pt")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["e.npz"]


def test_embeddings_do_not_depend_on_batches(corpus, tmp_path, monkeypatch, capsys):
    whole = write(corpus, tmp_path / "a.npz", monkeypatch, capsys)
    for size in (1, 3):
        part = write(corpus, tmp_path / "b.npz", monkeypatch, capsys, "--batch_size", size)
        assert (part["ids"] == whole["ids"]).all()
        np.testing.assert_allclose(part["x"], whole["x"], atol=1e-5)
        np.testing.assert_allclose(part["x_random"], whole["x_random"], atol=1e-5)


def test_every_kind_of_model_file(corpus, tmp_path, monkeypatch, capsys):
    x = write(corpus, tmp_path / "a.npz", monkeypatch, capsys)["x"]
    for model in ("model.pt", "model.nemo"):
        other = write(corpus, tmp_path / "b.npz", monkeypatch, capsys, model=model)["x"]
        np.testing.assert_allclose(other, x, atol=1e-5)


def test_random_weights_come_from_the_seed_alone(corpus, tmp_path, monkeypatch, capsys):
    torch.manual_seed(7)
    one = write(corpus, tmp_path / "a.npz", monkeypatch, capsys)
    again = write(corpus, tmp_path / "b.npz", monkeypatch, capsys)
    other = write(corpus, tmp_path / "c.npz", monkeypatch, capsys, "--seed", 1)
    assert (one["x_random"] == again["x_random"]).all() and (one["x"] == other["x"]).all()
    assert np.abs(one["x_random"] - other["x_random"]).max() > 0.1
    assert np.abs(one["x_random"] - one["x"]).max() > 0.1


def test_two_processes_write_what_one_does(corpus, tmp_path, monkeypatch, capsys):
    one = write(corpus, tmp_path / "a.npz", monkeypatch, capsys)
    start("torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d",
        "--rdzv_endpoint=localhost:0", "--module", "fairasr_min.embed", "write", "--device", "cpu",
        "--model", corpus / "pretrained.pt", "--manifest", corpus / "m.jsonl",
        "--out", tmp_path / "b.npz")  # fmt: skip
    two = np.load(tmp_path / "b.npz", allow_pickle=False)
    assert (one["ids"] == two["ids"]).all()
    np.testing.assert_allclose(one["x"], two["x"], atol=1e-5)
    np.testing.assert_allclose(one["x_random"], two["x_random"], atol=1e-5)


def test_what_write_refuses(corpus, tmp_path, monkeypatch, capsys):
    rows = (corpus / "m.jsonl").read_text()
    (corpus / "bad.jsonl").write_text(rows + '{"audio_filepath": "none.wav", "duration": 1}\n')
    (tmp_path / "file").write_text("")
    good = {"--model": corpus / "model.pt", "--manifest": corpus / "m.jsonl",
            "--out": tmp_path / "e.npz", "--device": "cpu"}  # fmt: skip
    for changed, reason in [
        ({"--model": corpus / "m.jsonl"}, "damaged, or not a PyTorch file"),
        ({"--manifest": corpus / "none.jsonl"}, "cannot be read"),
        ({"--manifest": corpus / "bad.jsonl"}, "--max_bad 1"),
        ({"--out": tmp_path}, "is a folder"),
        ({"--out": corpus / "m.jsonl"}, "would be overwritten"),
        ({"--out": corpus / "model.pt"}, "would be overwritten"),
        ({"--out": tmp_path / "file" / "e.npz"}, "name another place"),
        ({"--precision": "fp16"}, "needs a GPU"),
    ]:
        arguments = [part for pair in (good | changed).items() for part in pair]
        code, printed = call(monkeypatch, capsys, "write", *arguments)
        assert code == 2 and reason in printed
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    arguments = [part for pair in (good | {"--manifest": corpus / "bad.jsonl"}).items()
                 for part in pair]  # fmt: skip
    assert call(monkeypatch, capsys, "write", *arguments, "--max_bad", 1)[0] == 0
    assert len(np.load(tmp_path / "e.npz")["ids"]) == 13


def test_a_model_of_nan_is_named(corpus, tmp_path, monkeypatch, capsys):
    payload = checkpoint.load(corpus / "pretrained.pt")
    payload["weights"]["encoder.pre_encode.out.bias"][:] = 3e38  # infinite, times sqrt(d_model)
    checkpoint.save(tmp_path / "nan.pt", payload)
    arguments = (
        "--model",
        tmp_path / "nan.pt",
        "--manifest",
        corpus / "m.jsonl",
        "--device",
        "cpu",
    )
    code, printed = call(monkeypatch, capsys, "write", *arguments, "--out", tmp_path / "e.npz")
    assert code == 2 and "0.wav: the model gives an embedding that is not finite" in printed


# ---- the probe -----------------------------------------------------------------------------------


def speakers_of(n, utterances=8):
    return np.repeat(np.arange(n), utterances)


def planted(kind, n=60, seed=0):
    """x (8 n, 12), labels 0 and 1, speakers: what is planted in them is known."""
    random = np.random.default_rng(seed)
    who = speakers_of(n)
    group = random.permutation(np.arange(n) % 2)
    x = random.normal(size=(len(who), 12))
    if kind == "linear":
        x[:, 0] += 6 * group[who]
    elif kind == "sign":  # of a product: no line separates it
        x[:, 0] = random.choice([-1, 1], len(who)) * 3 + 0.3 * x[:, 0]
        x[:, 1] = np.sign(x[:, 0]) * (2 * group[who] - 1) * 3 + 0.3 * x[:, 1]
    elif kind == "voice":  # each speaker is easily told, and the label is a coin's for each of them
        x += 20 * random.normal(size=(n, 12))[who]
    return x, group[who], who


def probed(x, labels, who, seed=0):
    return embed.leakage(x, None, labels.astype(str).tolist(), who.tolist(), seed)


def test_a_planted_group_is_found():
    part = probed(*planted("linear"))
    assert part["linear"]["value"] > 0.99 and part["nonlinear"]["value"] > 0.99
    assert part["groups"] == {"0": 240, "1": 240} and part["speakers"] == 60
    assert part["chance"] == part["majority"] == 0.5
    assert part["random_init_linear"] is part["random_init_nonlinear"] is None


def test_only_the_nonlinear_probe_finds_a_sign():
    part = probed(*planted("sign"))
    assert abs(part["linear"]["value"] - 0.5) < 0.1 and part["nonlinear"]["value"] > 0.95


def test_random_labels_give_chance():
    for name, probe in embed.probes(0).items():
        values = []
        for seed in range(6):
            x, labels, who = planted("none", n=40, seed=seed)
            values.append(embed.balanced_accuracy(
                labels, embed.held_out(probe, x, labels, who, 0)
            ))  # fmt: skip
        assert abs(np.mean(values) - 0.5) < 0.04, name


def test_knowing_a_speaker_does_not_help():
    """Within speakers, the label is easy: utterances held out one by one would give 1."""
    x, labels, who = planted("voice", n=40)
    alone = np.arange(len(who))  # each utterance for itself
    assert embed.balanced_accuracy(
        labels, embed.held_out(embed.probes(0)["nonlinear"], x, labels, alone, 0)
    ) > 0.95  # fmt: skip
    for name, probe in embed.probes(0).items():
        values = []
        for seed in range(4):
            x, labels, who = planted("voice", n=40, seed=seed)
            values.append(embed.balanced_accuracy(
                labels, embed.held_out(probe, x, labels, who, 0)
            ))  # fmt: skip
        assert abs(np.mean(values) - 0.5) < 0.15, name


def test_no_speaker_is_on_both_sides(monkeypatch):
    x, labels, who = planted("none", n=23)
    x[:, 0] = who  # so that each side can be asked who is in it
    seen = []

    def watch(probe, x, labels, x_test):
        assert not set(x[:, 0]) & set(x_test[:, 0])
        seen.extend(x_test[:, 0])
        return np.zeros(len(x_test), dtype=int)

    monkeypatch.setattr(embed, "fit_predict", watch)
    predicted = embed.held_out(None, x, labels, who, seed=0)
    assert sorted(seen) == sorted(who) and not predicted.any()


def test_groups_weigh_the_same():
    """One utterance in ten is of group 1, a little off: without weights, none would be named."""
    random = np.random.default_rng(0)
    who = speakers_of(100)
    labels = (np.arange(100) % 10 == 0).astype(int)[who]
    x = random.normal(size=(len(who), 2)) + labels[:, None]
    for probe in embed.probes(0).values():
        predicted = embed.held_out(probe, x, labels, who, 0)
        assert 0.5 < (predicted[labels == 1] == 1).mean() and 0.6 < (predicted == labels).mean()


def test_balanced_accuracy_and_its_interval():
    random = np.random.default_rng(0)
    labels, predicted = random.integers(3, size=600), random.integers(3, size=600)
    predicted[:200] = labels[:200]
    value = balanced_accuracy_score(labels, predicted)
    assert embed.balanced_accuracy(labels, predicted) == pytest.approx(value)
    assert embed.balanced_accuracy(labels, 0 * labels) == pytest.approx(1 / 3)
    wide = embed.score(labels, predicted, speakers_of(20, 30), seed=0)
    narrow = embed.score(labels, predicted, np.arange(600), seed=0)
    for part in (wide, narrow):
        assert part["value"] == pytest.approx(value)
        assert part["interval"][0] < value < part["interval"][1]
    widths = [np.ptp(part["interval"]) for part in (wide, narrow)]
    assert widths[0] > 2 * widths[1]  # all that is right is said by the same few speakers
    # half the width for independent answers, by the binomial formula for each group
    shares = [(predicted[labels == g] == g).mean() for g in range(3)]
    error = np.sqrt(sum(p * (1 - p) / (labels == g).sum() for g, p in enumerate(shares))) / 3
    assert widths[1] == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_no_error_at_all_has_no_interval():
    labels = np.arange(80) % 2
    assert embed.score(labels, labels, np.arange(80), 0) == {"value": 1.0, "interval": None}


# ---- probe, the command --------------------------------------------------------------------------

HOSTILE = '<script>alert(1)</script> & "quoted" \x1b[31m \u202e'


@pytest.fixture
def vectors(tmp_path):
    """embeddings.npz of 16 speakers, and a manifest of more rows, in another order."""
    x, labels, who = planted("linear", n=16)
    rows = [
        {"audio_filepath": f"{i}.wav", "speaker": f"s{s}", "gender": ["f", HOSTILE][g],
         "rare": "few" if s < 4 else ["f", "m"][s % 2], "odd": None if s < 3 else "x",
         "take": str(i), "note": ["a"], "empty": None}
        for i, (s, g) in enumerate(zip(who, labels))
    ]  # fmt: skip
    ids = [row["audio_filepath"] for row in rows]
    np.savez(tmp_path / "e.npz", x=x, ids=ids, x_random=planted("none", n=16)[0], model="m.pt")
    manifest(tmp_path / "m.jsonl", [*rows[::-1], {"audio_filepath": "other.wav", "speaker": "z"}])
    return tmp_path


def manifest(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "no row\n[1]\n")


def rows_of(folder):
    return [json.loads(line) for line in (folder / "m.jsonl").read_text().splitlines()[:-2]]


def probe(folder, monkeypatch, capsys, *arguments, out="out"):
    if "--by" not in arguments:
        arguments = ("--by", "gender", *arguments)
    return call(monkeypatch, capsys, "probe", "--embeddings", folder / "e.npz", "--manifest",
                folder / "m.jsonl", "--out", folder / out, *arguments)  # fmt: skip


def test_leakage_json(vectors, monkeypatch, capsys):
    code, printed = probe(vectors, monkeypatch, capsys, "--by", "gender", "rare")
    assert code == 0
    there = json.loads((vectors / "out" / "leakage.json").read_text())
    about = {"model": "m.pt", "n": 128, "speaker_column": "speaker", "synthetic": False, "seed": 0}
    assert {name: there[name] for name in about} == about
    assert list(there["columns"]) == ["gender", "rare"]
    part = there["columns"]["gender"]
    assert part["groups"] == {"f": 64, HOSTILE: 64} and part["speakers"] == 16
    assert part["linear"]["value"] > 0.9 > 0.8 > part["random_init_linear"]["value"]
    assert set(part) == {
        "majority", "chance", "speakers", "groups", "linear", "nonlinear",
        "random_init_linear", "random_init_nonlinear",
    }  # fmt: skip
    for name in ("linear", "nonlinear", "random_init_linear", "random_init_nonlinear"):
        assert set(part[name]) == {"value", "interval"}
    assert f"{part['linear']['value']:.3f}" in printed
    assert "\x1b" not in printed and "another one may" in printed and "no proxies" in printed


def test_the_seed_fixes_everything(vectors, monkeypatch, capsys):
    printed = [probe(vectors, monkeypatch, capsys, out=out)[1] for out in ("a", "b")]
    assert printed[0].replace("/a:", "/b:") == printed[1]
    for path in (vectors / "a").iterdir():
        assert path.read_bytes() == (vectors / "b" / path.name).read_bytes()
    probe(vectors, monkeypatch, capsys, "--seed", 1, out="c")
    names = {path.name for path in (vectors / "c").iterdir()}
    assert names == {"leakage.json", "embeddings-gender.svg"}
    assert (vectors / "c" / "leakage.json").read_text() != (
        vectors / "a" / "leakage.json"
    ).read_text()


def test_pictures_are_text_whatever_the_labels(vectors, monkeypatch, capsys):
    column = "../<b>"
    rows = [{**row, column: row.get("gender")} for row in rows_of(vectors)]
    manifest(vectors / "m.jsonl", rows)
    assert probe(vectors, monkeypatch, capsys, "--by", column)[0] == 0
    (path,) = (vectors / "out").glob("*.svg")
    tree = ElementTree.fromstring(path.read_bytes())  # well-formed
    tags = {element.tag.split("}")[1] for element in tree.iter()}
    assert tags == {"svg", "title", "style", "rect", "text", "path"}
    texts = [element.text for element in tree.iter() if element.tag.endswith("text")]
    assert HOSTILE.replace("\x1b", "\ufffd").replace("\u202e", "\ufffd") in texts
    assert any(text.startswith("../<b>") for text in texts)
    assert "http" not in path.read_text().replace("http://www.w3.org/2000/svg", "")
    drawn = [element for element in tree.iter() if element.tag.endswith("path")]
    assert len(drawn) == 2 * 128 + 2  # two panels and the legend
    shapes = {(e.get("fill"), re.sub(r"^M\S+ [\d.]+", "", e.get("d"))) for e in drawn}
    assert len(shapes) == len({fill for fill, _ in shapes}) == len({s for _, s in shapes}) == 2


def test_groups_of_a_picture_all_look_different():
    labels = [f"g{i}" for i in range(49)]
    text = embed.picture("t", {"a": np.random.default_rng(0).normal(size=(49, 2))}, labels)
    looks = re.findall(r'<path fill="(\S+)" d="M\S+ [\d.]+(\S[^"]*)"', text)
    assert len(looks) == 98 and len(set(looks)) == 49


def test_large_files_are_drawn_in_part(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(embed, "DRAWN", 40)
    x, labels, who = planted("linear", n=12)
    np.savez(tmp_path / "e.npz", x=x, ids=[str(i) for i in range(96)])
    rows = [{"audio_filepath": str(i), "speaker": int(s), "gender": int(g), "synthetic": True}
            for i, (s, g) in enumerate(zip(who, labels))]  # fmt: skip
    manifest(tmp_path / "m.jsonl", rows)
    code, printed = probe(tmp_path, monkeypatch, capsys)
    picture = (tmp_path / "out" / "embeddings-gender.svg").read_text()
    assert code == 0 and "not in the file" in printed and "SYNTHETIC" in printed
    assert picture.count("<path") == 2 * 40 + 2 and "SYNTHETIC" in picture
    there = json.loads((tmp_path / "out" / "leakage.json").read_text())
    assert there["synthetic"] and there["model"] == "unknown"
    assert there["columns"]["gender"]["random_init_linear"] is None


def test_what_is_left_out_is_counted(vectors, monkeypatch, capsys):
    rows = rows_of(vectors)
    by_name = {row["audio_filepath"]: row for row in rows}
    for i in range(40, 45):  # of s5
        by_name[f"{i}.wav"]["rare"] = ""
    for i in range(48, 50):  # of s6
        by_name[f"{i}.wav"]["speaker"] = None
    gone = {"126.wav", "127.wav"}
    manifest(vectors / "m.jsonl", [row for row in rows if row["audio_filepath"] not in gone])
    code, printed = probe(vectors, monkeypatch, capsys, "--by", "rare")
    assert code == 0
    assert "2 embeddings have no row" in printed
    assert "rare: 7 rows without label or speaker" in printed
    assert "warning: rare: fewer than 5 speakers, left out: few" in printed
    there = json.loads((vectors / "out" / "leakage.json").read_text())
    assert there["n"] == 126 and there["columns"]["rare"]["speakers"] == 12
    assert sum(there["columns"]["rare"]["groups"].values()) == 128 - 32 - 7 - 2


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["--by", "accent"], "no column 'accent'"),
        (["--by", "odd"], "has 1 group(s) of 5 speakers or more"),
        (["--by", "take"], "has 0 group(s) of 5 speakers or more, and 128 smaller"),
        (["--by", "note"], "groups are words or numbers"),
        (["--speaker", "who"], "no column 'who'"),
        (["--speaker", "empty"], "no row has a value there"),
        (["--manifest", "none.jsonl"], "none.jsonl: cannot be read"),
        (["--manifest", "other.jsonl"], "has none of the 128 utterances"),
        (["--embeddings", "none.npz"], "none.npz: cannot be read"),
        (["--out", "e.npz"], "name another place"),
    ],
)
def test_what_probe_refuses(vectors, monkeypatch, capsys, arguments, reason):
    monkeypatch.chdir(vectors)
    manifest(vectors / "other.jsonl", [])
    code, printed = probe(vectors, monkeypatch, capsys, *arguments)
    assert code == 2 and reason in printed and not (vectors / "out").exists()


def test_without_speakers_clusters_and_then_utterances(vectors, monkeypatch, capsys):
    rows = [
        {("cluster" if k == "speaker" else k): v for k, v in r.items()} for r in rows_of(vectors)
    ]
    manifest(vectors / "m.jsonl", rows)
    code, printed = probe(vectors, monkeypatch, capsys)
    assert code == 0 and "one value of 'cluster'" in printed and "warning" not in printed
    manifest(vectors / "m.jsonl", [{**row, "cluster": None} for row in rows])
    code, printed = probe(vectors, monkeypatch, capsys)
    there = json.loads((vectors / "out" / "leakage.json").read_text())
    assert code == 0 and "utterances are held out instead of speakers" in printed
    assert there["speaker_column"] == "utterance"
    assert there["columns"]["gender"]["speakers"] == 128


class Payload:
    def __reduce__(self):
        return (open, ("it-ran", "w"))


GOOD = {"x": np.arange(6.0).reshape(3, 2), "ids": np.array(["a", "b", "c"])}


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "damaged"),
        (b"hello", "damaged"),
        (pickle.dumps(Payload()), "plain numbers and texts"),
        ("half", "damaged"),
        ("flipped", "damaged"),
        ({"x": GOOD["x"]}, "no array 'ids'"),
        ({"ids": GOOD["ids"]}, "no array 'x'"),
        ({**GOOD, "x": np.array([Payload()] * 3)}, "plain numbers and texts"),
        ({**GOOD, "x": np.ones(3)}, "x is no matrix"),
        ({**GOOD, "x": np.array([["a", "b"]] * 3)}, "x is no matrix"),
        ({**GOOD, "x": np.ones((2, 2))}, "other rows than ids"),
        ({**GOOD, "x_random": np.full((3, 2), np.nan)}, "x_random has"),
        ({**GOOD, "ids": np.array(["a", "b", "b"])}, "a different text"),
        ({**GOOD, "ids": np.array(3)}, "damaged"),
        ({"x": np.ones((0, 2)), "ids": np.array([], dtype="U1")}, "a different text"),
        ({"x": np.ones((3, 2)), "ids": GOOD["ids"]}, "all embeddings are the same"),
    ],
)
def test_what_is_no_embeddings_file(tmp_path, monkeypatch, capsys, content, reason):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "e.npz"
    if isinstance(content, dict):
        np.savez(path, **content)
    else:
        np.savez(path, **GOOD)
        whole = bytearray(path.read_bytes())
        whole[150] ^= 255  # a number in x: its checksum is wrong
        path.write_bytes(
            {"half": whole[: len(whole) // 2], "flipped": whole}.get(content) or content
        )
    manifest(tmp_path / "m.jsonl", [{"audio_filepath": name, "g": name} for name in "abc"])
    code, printed = probe(tmp_path, monkeypatch, capsys, "--by", "g")
    assert code == 2 and reason in printed and printed.count("\n") == 1
    assert not (tmp_path / "it-ran").exists()


def test_probe_needs_one_process(vectors, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    code, printed = probe(vectors, monkeypatch, capsys)
    assert code == 2 and "without torchrun" in printed


def test_as_a_command(vectors):
    arguments = ("fairasr_min.embed", "probe", "--manifest", vectors / "m.jsonl",
                 "--by", "gender", "--out", vectors / "out", "--embeddings")  # fmt: skip
    printed = start(*arguments, vectors / "m.jsonl", code=2)
    assert printed.startswith("error:") and printed.count("\n") == 1
