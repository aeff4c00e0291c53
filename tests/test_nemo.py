"""NeMo's archives: our numbers against those that NeMo 3.0 recorded, and archives that lie."""

import gzip
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, run

from fairasr_min import checkpoint, nemo
from fairasr_min.audio import LogMel, read_audio
from fairasr_min.conformer import SIZES, ConformerConfig
from fairasr_min.losses import ctc_loss
from fairasr_min.model import ConformerCTC
from fairasr_min.nemo import CONFIG, WEIGHTS, NemoError, export, load_nemo, read_config
from fairasr_min.text import ctc_collapse, train_tokenizer

FIXTURES = Path(__file__).parent / "fixtures" / "nemo"
TINY = FIXTURES / "tiny_conformer_ctc.nemo"


# ---- the same numbers ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def audio():
    recorded = np.load(FIXTURES / "waveforms.npz")
    return torch.from_numpy(recorded["waveforms"]), torch.from_numpy(recorded["lengths"])


@pytest.fixture(scope="module", params=["tiny", "options", "extra"])
def both(request):
    """Our recogniser of an archive, and what NeMo computed from it."""
    expected = dict(np.load(FIXTURES / f"expected_{request.param}.npz"))
    return load_nemo(FIXTURES / f"{request.param}_conformer_ctc.nemo"), expected


def close(ours, lengths, theirs):
    """Within 1e-4 on the valid frames of (B, T', X) and an array of the same shape."""
    for mine, n, nemos in zip(ours, lengths, torch.from_numpy(theirs)):
        assert torch.allclose(mine[:n], nemos[:n], atol=1e-4, rtol=0)


def test_encoder_and_log_probs_are_nemos(both, audio):
    model, expected = both
    with torch.no_grad():
        encoded, lengths = model.encoder(*model.log_mel(*audio))
        log_probs, _ = model(*audio)
    assert lengths.tolist() == expected["encoded_len"].tolist()
    close(encoded, lengths, expected["encoded"].transpose(0, 2, 1))
    close(log_probs, lengths, expected["log_probs"])


def test_units_and_texts_are_nemos_in_a_batch_and_alone(both, audio):
    model, expected = both
    with torch.no_grad():
        log_probs, lengths = model(*audio)
    for i, ids in enumerate(json.loads(str(expected["greedy_ids_json"]))):
        assert ctc_collapse(log_probs[i, : lengths[i]].argmax(-1).tolist(), model.blank) == ids
    waveforms = [w[:n].numpy() for w, n in zip(*audio)]
    texts = expected["texts_spm"].tolist()
    assert model.transcribe(waveforms) == texts
    assert [model.transcribe([w])[0] for w in waveforms] == texts


def test_ctc_loss_and_every_gradient_norm_are_nemos(both, audio):
    model, expected = both
    model.zero_grad()
    targets, target_lengths = (torch.from_numpy(expected[k]) for k in ("targets", "target_lengths"))
    loss = ctc_loss(*model(*audio), targets, target_lengths).mean()
    assert loss.item() == pytest.approx(float(expected["eval_ctc_loss"]), rel=1e-5)
    loss.backward()
    theirs = json.loads(str(expected["grad_norms_json"]))
    ours = {
        name.replace("decoder.", nemo.HEAD): parameter.grad.norm().item()
        for name, parameter in model.named_parameters()
    }
    assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)


def test_features_and_utterances_alone_are_nemos(audio):
    model, expected = load_nemo(TINY), np.load(FIXTURES / "expected_tiny.npz")
    features, n_frames = model.log_mel(*audio)
    assert n_frames.tolist() == expected["features_len"].tolist()
    assert features.shape == expected["features"].transpose(0, 2, 1).shape
    close(features, [None] * 3, expected["features"].transpose(0, 2, 1))
    for i, (waveform, n) in enumerate(zip(*audio)):
        with torch.no_grad():
            log_probs, lengths = model(waveform[None, :n], n[None])
        close(log_probs, lengths, expected[f"single{i}_log_probs"].reshape(1, -1, model.blank + 1))


def test_mel_matrix_and_window_are_taken_from_the_archive(tmp_path):
    def scaled(weights):
        for name in ("fb", "window"):
            weights[nemo.FRONT + name] *= 2

    model, usual = load_nemo(changed(tmp_path, weights=scaled)), LogMel()
    assert torch.allclose(model.log_mel.mel, 2 * usual.mel, atol=1e-6)
    assert torch.equal(model.log_mel.window, 2 * usual.window)


def test_the_small_architecture_is_size_small():
    """Settings of stt_en_conformer_ctc_small, numbers as PyYAML may read them."""
    options = yaml.safe_load(member(TINY, CONFIG))
    options["encoder"] |= {"n_layers": 16, "d_model": 176, "dropout_att": "1e-1"}
    options["preprocessor"] |= {"dither": "1e-05", "preemph": 0.97}
    options["decoder"] |= {"feat_in": 176, "num_classes": 1024}
    config, _, n_units, set_aside = read_config(yaml.safe_dump(options).encode())
    assert config == SIZES["small"] and n_units == 1024
    assert set_aside == ["preprocessor.dither 1e-05"]


# ---- archives made from the tiny one -------------------------------------------------------------


def member(path, ending):
    with tarfile.open(path) as tar:
        return next(tar.extractfile(m).read() for m in tar if m.name.endswith(ending))


def changed(tmp_path, options=None, weights=None, replaced=None, more=(), mode="w"):
    """The tiny archive with its configuration or weights changed in place by a function, members
    replaced (None: left out), or more of them."""
    with tarfile.open(TINY) as tar:
        files = {m.name: tar.extractfile(m).read() for m in tar if m.isfile()}
    if options:
        settings = yaml.safe_load(files[f"./{CONFIG}"])
        options(settings)
        files[f"./{CONFIG}"] = yaml.safe_dump(settings).encode()
    if weights:
        tensors = torch.load(io.BytesIO(files[f"./{WEIGHTS}"]), weights_only=True)
        tensors = weights(tensors) or tensors
        files[f"./{WEIGHTS}"] = saved(tensors)
    files |= {f"./{name}": content for name, content in (replaced or {}).items()}
    path = tmp_path / "changed.nemo"
    with tarfile.open(path, mode) as tar:
        for name, content in files.items():
            if content is not None:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        for info in more:
            tar.addfile(info)
    return path


def saved(content, **how):
    file = io.BytesIO()
    torch.save(content, file, **how)
    return file.getvalue()


def test_an_archive_may_be_gzipped_and_of_half_precision(tmp_path, audio):
    def half(weights):
        return {k: w.half() if w.is_floating_point() else w for k, w in weights.items()}

    path = changed(tmp_path, weights=half, mode="w:gz")
    whole, halved = load_nemo(TINY), load_nemo(path)
    assert halved.decoder.weight.dtype == torch.float32
    with torch.no_grad():
        assert torch.allclose(whole(*audio)[0], halved(*audio)[0], atol=0.1)


# ---- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "section, key, value",
    [
        ("encoder", "subsampling", "vggnet"),
        ("encoder", "subsampling_factor", 3),
        ("encoder", "self_attention_model", "abs_pos"),
        ("encoder", "att_context_style", "chunked_limited"),
        ("encoder", "att_context_size", [-2, 4]),
        ("encoder", "conv_norm_type", "group_norm8"),
        ("encoder", "conv_context_size", "causal"),
        ("encoder", "conv_kernel_size", 8),
        ("encoder", "causal_downsampling", True),
        ("encoder", "reduction", "pooling"),
        ("encoder", "feat_out", 99),
        ("encoder", "feat_in", 81),
        ("encoder", "n_heads", 5),
        ("encoder", "n_layers", "many"),
        ("encoder", "dropout", "nan"),
        ("encoder", "something_new", 3),
        ("preprocessor", "normalize", "per_speaker"),
        ("preprocessor", "sample_rate", 8000),
        ("preprocessor", "frame_splicing", 2),
        ("preprocessor", "exact_pad", True),
        ("preprocessor", "window", "kaiser"),
        ("preprocessor", "n_fft", 256),
        ("preprocessor", "pad_to", "max"),
        ("preprocessor", "normalize", {"fixed_mean": [0.0], "fixed_std": [1.0]}),
        ("preprocessor", "_target_", "nemo.modules.AudioToMFCCPreprocessor"),
        ("decoder", "add_blank", False),
        ("tokenizer", "type", "wpe"),
    ],
)
def test_what_we_do_not_carry_is_refused_by_name_and_value(tmp_path, section, key, value):
    def other(options):
        options[section][key] = value

    with pytest.raises(NemoError) as error:
        load_nemo(changed(tmp_path, options=other))
    line = str(error.value)
    named = ("d_model", "32") if key == "n_heads" else (f"{section}.{key}", str(value))
    assert all(word in line for word in named) and "\n" not in line and "changed.nemo" in line


def test_all_that_is_refused_is_named_at_once(tmp_path):
    def other(options):
        options["encoder"] |= {"subsampling": "stacking", "reduction": "striding"}
        options["preprocessor"]["mel_norm"] = "htk"

    with pytest.raises(NemoError, match=r"mel_norm 'htk'.*'stacking'.*'striding'"):
        load_nemo(changed(tmp_path, options=other))


def features(waveform, **preprocessor):
    """Those of LogMel as configured by NeMo's names."""
    options = yaml.safe_load(member(TINY, CONFIG))
    options["preprocessor"] |= preprocessor
    options["encoder"]["feat_in"] = options["preprocessor"]["features"]
    config = read_config(yaml.safe_dump(options).encode())[0]
    log_mel = LogMel(config.n_mels, **config.front_end)
    return log_mel(waveform[None], torch.tensor([len(waveform)]))


def test_options_of_the_front_end(audio):
    """Each against the definition; NeMo's own numbers for them are in RESULTS.md."""
    wave = audio[0][0, : audio[1][0]]
    raw, n = features(wave, normalize=None)
    raw, n = raw[0], int(n)
    power = features(wave, normalize="NA", log=False)[0][0]
    assert torch.allclose(raw[:n], torch.log(power + 2.0**-24)[:n])
    clamped = features(wave, normalize=None, log_zero_guard_type="clamp", log_zero_guard_value=1e-3)
    assert torch.allclose(clamped[0][0, :n], torch.log(power.clamp(min=1e-3))[:n])
    smallest = features(torch.zeros(1600), normalize=None, log_zero_guard_value="eps")[0]
    assert smallest[0, 0, 0].item() == pytest.approx(np.log(2.0**-23))
    over_all = features(wave, normalize="all_features")[0][0, :n]
    assert torch.allclose(over_all, (raw[:n] - raw[:n].mean()) / (raw[:n].std() + 1e-5), atol=1e-4)
    longer, _ = features(wave, pad_to=64, pad_value=-3)
    assert longer.shape[1] % 64 == 0 and (longer[0, n:] == -3).all()
    assert torch.allclose(longer[0, :n], features(wave)[0][0, :n])
    flat = features(wave, preemph=None, normalize=None, log=False, mag_power=1.0)[0][0]
    window = torch.hann_window(400, periodic=False)
    frame = torch.nn.functional.pad(window * wave[3 * 160 - 200 : 3 * 160 + 200], (56, 56))
    assert torch.allclose(flat[3], LogMel().mel @ torch.fft.rfft(frame).abs(), atol=1e-4)
    coarse, frames = features(
        wave, window_size=0.032, window_stride="2e-2", features=40, n_fft=None
    )
    assert coarse.shape == (1, len(wave) // 320 + 1, 40) and frames == len(wave) // 320


# ---- hostile archives ----------------------------------------------------------------------------


class Payload:
    """Writes a file where it is unpickled."""

    def __reduce__(self):
        return (open, ("it-ran", "w"))


def special(name, kind=tarfile.REGTYPE, target="", size=0):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, target, size
    return info


def claiming(weights, name):
    """weights, but their index says that the bytes of this vector of 32 hold 10^9 numbers."""
    first = {name: weights[name], **weights}
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved(first))) as before, zipfile.ZipFile(out, "w") as after:
        for entry in before.infolist():
            content = before.read(entry)
            if entry.filename.endswith("data.pkl"):
                assert content.count(b"cpuq\x06K\x20") == 1  # 32 as one byte, then as four
                content = content.replace(
                    b"cpuq\x06K\x20", b"cpuq\x06J" + (10**9).to_bytes(4, "little")
                )
            after.writestr(entry, content)
    return out.getvalue()


def zipped_bomb():
    """A compressed member of 100 MB of zeros."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data/0", bytes(10**8))
    return out.getvalue()


def hostile(tmp_path):
    """Name of an attack -> (a function that makes the archive, what the message says)."""
    whole = TINY.read_bytes()

    def written(content):
        path = tmp_path / "changed.nemo"
        path.write_bytes(content)
        return path

    def more(info):
        return changed(tmp_path, more=[info])

    def config(text):
        return changed(tmp_path, replaced={CONFIG: text})

    def option(section, key, value):
        def set_it(options):
            options["decoder"]["feat_in"] = None
            options[section][key] = value

        return changed(tmp_path, options=set_it)

    def weights(content):
        return changed(tmp_path, replaced={WEIGHTS: content})

    def weight(name, change):
        def set_it(tensors):
            tensors[name] = change(tensors.get(name))

        return changed(tmp_path, weights=set_it)

    def tensors():
        return torch.load(io.BytesIO(member(TINY, WEIGHTS)), weights_only=True)

    def expanded(tensors):  # a tensor of 10^9 numbers on the bytes of one
        return {**tensors, "encoder.more": torch.zeros(1).expand(10**9)}

    tokenizer = next(n for n in tarfile.open(TINY).getnames() if n.endswith("tokenizer.model"))[2:]
    bias = "encoder.layers.0.norm_out.bias"
    config_bytes = member(TINY, CONFIG)
    deep = b"[" * 100_000
    laughs = b"a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n" + config_bytes
    header = tarfile.TarInfo("pax")
    header.type, header.size = tarfile.XHDTYPE, 10**10
    return {
        "no file": (lambda: tmp_path / "nothing.nemo", "No such file"),
        "a folder": (lambda: tmp_path, "directory"),
        "empty": (lambda: written(b""), "not a .nemo archive"),
        "not a tar": (lambda: written(b"hello " * 1000), "not a .nemo archive"),
        "truncated": (lambda: written(whole[: len(whole) // 2]), "truncated"),
        "truncated in the header": (lambda: written(whole[:700]), "not a .nemo archive"),
        "truncated gzip": (lambda: written(gzip.compress(whole)[:300_000]), "ended before the end"),
        "gzip bomb": (
            lambda: written(gzip.compress(special(WEIGHTS, size=10**8).tobuf() + bytes(10**8))),
            "decompression bomb",
        ),
        "a member of 10 GB": (lambda: more(special("big", size=10**10)), "bomb|truncated"),
        "a header of 10 GB": (
            lambda: written(header.tobuf(tarfile.GNU_FORMAT) + bytes(4096)),
            "header of",
        ),
        "a sparse member": (
            lambda: more(special("sparse", tarfile.GNUTYPE_SPARSE)),
            "damaged|neither a file",
        ),
        "path traversal": (lambda: more(special("../../evil")), "leads out"),
        "absolute path": (lambda: more(special("/tmp/evil")), "leads out"),
        "symbolic link": (lambda: more(special("x", tarfile.SYMTYPE, "/etc/passwd")), "neither"),
        "hard link": (lambda: more(special("x", tarfile.LNKTYPE, "./" + WEIGHTS)), "neither"),
        "device": (lambda: more(special("x", tarfile.CHRTYPE)), "neither"),
        "two of a name": (lambda: more(special("./" + CONFIG)), "twice"),
        "2,000 members": (
            lambda: changed(tmp_path, more=[special(f"m{i}") for i in range(2000)]),
            "too many",
        ),
        "no configuration": (lambda: config(None), "model_config.yaml is missing"),
        "no weights": (lambda: weights(None), "model_weights.ckpt is missing"),
        "no tokenizer": (
            lambda: changed(tmp_path, replaced={tokenizer: None}),
            "tokenizer.model is missing",
        ),
        "a name that a terminal obeys": (
            lambda: option("tokenizer", "model_path", "nemo:\x1b[2J\nerror"),
            r"\?\[2J\?error is missing",
        ),
        "a number of 10^400": (lambda: option("encoder", "n_layers", 10**400), "n_layers"),
        "tokenizer of noise": (
            lambda: changed(tmp_path, replaced={tokenizer: b"noise" * 99}),
            "no sentencepiece model",
        ),
        "YAML with a Python tag": (
            lambda: config(b"!!python/object/apply:os.system ['touch it-ran']"),
            "could not determine a constructor",
        ),
        "YAML of aliases": (lambda: config(laughs), "aliases"),
        "YAML of a hundred lists": (lambda: config(b"[" * 100), "lists in more than"),
        # the parser itself may refuse first, as that of PyYAML 6.0.4 does
        "YAML of a hundred thousand lists": (lambda: config(deep), "lists in more than|flow level"),
        "YAML that is text": (lambda: config(b"hello"), "no settings"),
        "YAML without sections": (
            lambda: config(b"target: x.EncDecCTCModelBPE"),
            "no section 'preprocessor'",
        ),
        "another kind of model": (
            lambda: config(b"target: nemo.collections.asr.models.EncDecRNNTBPEModel"),
            "target 'EncDecRNNTBPEModel'",
        ),
        "configuration of 20 MB": (lambda: config(bytes(20_000_000)), "at most"),
        "10^9 layers": (lambda: option("encoder", "n_layers", 10**9), "n_layers is 1000000000"),
        "a model of 10^6": (lambda: option("encoder", "d_model", 10**6), "do not fit"),
        "a model of 10^9": (lambda: option("encoder", "d_model", 10**9), "do not fit"),
        "10^9 heads": (lambda: option("encoder", "n_heads", 10**9), "not supported"),
        "a kernel of 10^9": (
            lambda: option("encoder", "conv_kernel_size", 10**9 + 1),
            "do not fit",
        ),
        "an FFT of 10^12": (lambda: option("preprocessor", "n_fft", 10**12), "do not fit"),
        "10^9 classes": (lambda: option("decoder", "num_classes", 10**9), "has 64 units"),
        "pickle": (lambda: weights(pickle.dumps(Payload())), "damaged"),
        "pickle in a PyTorch file": (lambda: weights(saved({"x": Payload()})), "would run code"),
        "old PyTorch format": (
            lambda: weights(saved({}, _use_new_zipfile_serialization=False)),
            "older than",
        ),
        "compressed weights": (lambda: weights(zipped_bomb()), "decompression bomb"),
        "weights that are a list": (lambda: weights(saved([torch.zeros(1)])), "no dictionary"),
        "weights cut off": (lambda: weights(member(TINY, WEIGHTS)[:-2000]), "damaged"),
        "a claim of 10^9 numbers": (
            lambda: weights(claiming(tensors(), bias)),
            "record size .* does not match",
        ),
        "10^9 numbers on the bytes of one": (
            lambda: changed(tmp_path, weights=expanded),
            "larger than itself",
        ),
        "another shape": (lambda: weight(bias, lambda w: w[:-1]), "norm_out.bias is \\(31,\\)"),
        "a weight too many": (lambda: weight("encoder.more", lambda w: torch.zeros(1)), "absent"),
        "a weight missing": (
            lambda: changed(tmp_path, weights=lambda w: {k: v for k, v in w.items() if k != bias}),
            "norm_out.bias is missing",
        ),
    }


@pytest.mark.parametrize("attack", list(hostile(Path("."))))
def test_a_hostile_archive_is_one_line(tmp_path, monkeypatch, attack):
    monkeypatch.chdir(tmp_path)
    make, message = hostile(tmp_path)[attack]
    path = make()
    before = set(tmp_path.rglob("*"))
    with pytest.raises(NemoError, match=message) as error:
        load_nemo(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    assert set(tmp_path.rglob("*")) == before, "something was written"


def test_every_attack_ends_a_command_with_one_line_and_code_2(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for make, _ in hostile(tmp_path).values():
        monkeypatch.setattr("sys.argv", ["checkpoint", "info", str(make())])
        assert checkpoint.main() == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    "command",
    [
        ("-m", "fairasr_min.checkpoint", "info"),
        ("evaluate.py", "--audio", "x.wav", "--model"),
        ("finetune.py", "--train_manifest", "x.jsonl", "--init"),
        ("train.py", "--manifest", "x.jsonl", "--init"),
    ],
    ids=lambda command: command[0].strip("-"),
)
def test_scripts_refuse_an_archive_without_a_traceback(tmp_path, command):
    def other(options):
        options["encoder"]["subsampling"] = "vggnet"

    path = changed(tmp_path, options=other)
    (tmp_path / "x.jsonl").write_text("")
    done = subprocess.run(
        [sys.executable, *command, str(path)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith(f"error: {path}: not supported: encoder.subsampling 'vggnet'")
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux for the peak")
@pytest.mark.parametrize("zipped", [False, True])
def test_memory_stays_about_twice_that_of_the_weights(tmp_path, zipped):
    """The high-water mark of a process of its own, for weights of 100 MB."""
    config = replace(SIZES["tiny"], d_model=512, n_heads=8, n_layers=4)
    tokenizer, _ = train_tokenizer(["call mom"], 20)
    path = tmp_path / "big.nemo"
    export(ConformerCTC(config, tokenizer), path)
    megabytes = path.stat().st_size / 1e6
    if zipped:
        path.write_bytes(gzip.compress(path.read_bytes(), 0))
    code = "import re, sys; from pathlib import Path; from fairasr_min.nemo import load_nemo\n"
    code += "status = Path('/proc/self/status')\n"
    code += "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', status.read_text())[1]) / 1e3\n"
    code += "before = peak(); load_nemo(sys.argv[1]); print(peak() - before)"
    command = [sys.executable, "-c", code, str(path)]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert megabytes > 90 and 0.9 * megabytes < float(out) < 2.3 * megabytes


# ---- giving back ---------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["tiny", "options", "extra"])
def test_what_is_exported_is_what_was_read(tmp_path, which):
    model = load_nemo(FIXTURES / f"{which}_conformer_ctc.nemo")
    export(model, tmp_path / "again.nemo")
    again = load_nemo(tmp_path / "again.nemo")
    assert again.config == model.config and again.tokenizer.model == model.tokenizer.model
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name])
    # each setting that NeMo wrote and that shapes the model is written as it was
    ours, theirs = (
        yaml.safe_load(member(path, CONFIG))
        for path in (tmp_path / "again.nemo", FIXTURES / f"{which}_conformer_ctc.nemo")
    )
    theirs["encoder"]["subsampling_conv_channels"] = model.config.subsampling_channels
    for section in ("preprocessor", "encoder", "decoder"):
        common = ours[section].keys() & theirs[section].keys()
        assert len(common) > 3
        assert {k: ours[section][k] for k in common} == {k: theirs[section][k] for k in common}
    before, after = (
        torch.load(io.BytesIO(member(path, WEIGHTS)), weights_only=True)
        for path in (FIXTURES / f"{which}_conformer_ctc.nemo", tmp_path / "again.nemo")
    )
    assert {k: w.shape for k, w in before.items()} == {k: w.shape for k, w in after.items()}
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_all_options_of_a_model_of_ours_survive(tmp_path):
    tokenizer, _ = train_tokenizer(["call mom", "don't stop"], 50)
    front_end = {
        "window": 1001, "hop": 321, "n_fft": 1024, "window_type": "hamming", "low_freq": 50.0,
        "high_freq": 7000.0, "mel_norm": None, "pre_emphasis": 0.0, "mag_power": 1.0, "log": False,
        "log_guard": 1e-5, "log_guard_type": "clamp", "normalize": "none", "pad_to": 8,
        "pad_value": -1.0,
    }  # fmt: skip
    config = ConformerConfig(
        n_mels=20, d_model=12, n_layers=1, n_heads=3, ff_expansion=2, conv_kernel=5,
        subsampling_channels=4, dropout=0.2, dropout_att=0.3, subsampling_factor=2,
        depthwise_subsampling=True, xscaling=False, use_bias=False, tied_position_biases=True,
        conv_norm="layer_norm", att_context=(3, 0), dropout_pre_encoder=0.0, dropout_emb=0.4,
        front_end=front_end,
    )  # fmt: skip
    usual = ConformerConfig()
    assert all(getattr(config, f.name) != getattr(usual, f.name) for f in fields(config))
    export(ConformerCTC(config, tokenizer), tmp_path / "ours.nemo")
    assert load_nemo(tmp_path / "ours.nemo").config == config


def test_a_failed_export_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "model.nemo"
    path.write_text("precious")
    with pytest.raises(NemoError, match="without a tokenizer"):
        export(ConformerCTC(SIZES["tiny"], vocab_size=5), path)
    model = load_nemo(TINY)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(NemoError, match="No space left"):
        export(model, path)
    assert path.read_text() == "precious" and list(tmp_path.iterdir()) == [path]


# ---- all three stages ----------------------------------------------------------------------------


def test_the_stages_start_from_an_archive_and_carry_its_head_and_units(demo, tmp_path):
    archive = FIXTURES / "options_conformer_ctc.nemo"
    train, test = demo / "train.jsonl", demo / "test.jsonl"
    run(
        "train.py",
        "--manifest",
        train,
        "--init",
        archive,
        "--max_steps",
        0,
        "--out",
        tmp_path / "a",
    )
    stage1 = checkpoint.load_model_file(tmp_path / "a" / "pretrained.pt")
    whole = load_nemo(archive)
    assert stage1["kind"] == "encoder" and stage1["config"] == whole.config
    assert stage1["tokenizer"] == whole.tokenizer.model
    for name, weight in whole.state_dict().items():
        assert torch.equal(stage1["weights"][name], weight)
    once = ("--max_steps", 1, "--lr", 0, "--max_bad", 60)
    pretrained = tmp_path / "a" / "pretrained.pt"
    run("finetune.py", "--init", pretrained, *once, "--out", tmp_path / "b")
    run("finetune.py", "--init", archive, "--train_manifest", train, *once, "--out", tmp_path / "c")
    for folder in ("b", "c"):
        tuned = checkpoint.load_model(tmp_path / folder / "model.pt")
        assert tuned.config == whole.config and tuned.tokenizer.model == whole.tokenizer.model
        assert torch.equal(tuned.decoder.weight, whole.decoder.weight)
    run("evaluate.py", "--model", archive, "--manifest", test, "--out", tmp_path / "d")
    rows = [json.loads(line) for line in (tmp_path / "d" / "hyps.jsonl").open()]
    waveform = read_audio(demo / rows[0]["audio_filepath"])
    assert rows[0]["pred_text"] == whole.transcribe([waveform])[0]
