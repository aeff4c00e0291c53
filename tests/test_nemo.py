"""NeMo's archives: our numbers against those that NeMo 3.0 recorded, and archives that lie."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from fairasr_min import nemo
from fairasr_min.audio import LogMel
from fairasr_min.conformer import SIZES
from fairasr_min.losses import ctc_loss
from fairasr_min.nemo import CONFIG, WEIGHTS, load_nemo, read_config
from fairasr_min.text import ctc_collapse

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
