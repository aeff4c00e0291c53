"""What a GPU would be given to do, seen without one: the models on PyTorch's "meta" device, whose
tensors have shapes and types and no numbers. There the code takes the paths of a GPU, forward and
backward; it breaks where a GPU would: tensors of two devices in one operation. And it breaks where
a GPU would have to be waited for: a number that the host wants to see, a tensor that it sends.
"""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fairasr_min import losses, runtime
from fairasr_min.audio import SpecAugment
from fairasr_min.conformer import ConformerConfig, encoder_frames
from fairasr_min.model import ConformerCTC, FairASR

CONFIG = ConformerConfig(d_model=16, n_layers=2, n_heads=2, conv_kernel=5, subsampling_channels=4)
CONFIGS = {
    "conformer": CONFIG,
    "no dropout": replace(CONFIG, dropout=0, dropout_att=0),
    "fast conformer": replace(CONFIG, subsampling_factor=8, depthwise_subsampling=True),
    "other options": replace(
        CONFIG, conv_norm="layer_norm", att_context=(3, 2), use_bias=False, dropout_emb=0.1
    ),
}


class OneDevice(TorchDispatchMode):
    """Fails on an operation with tensors here and there; numbers (of no dimension) may come along.
    So does a copy from here to there, which waits unless it is asked not to."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        places = {x.device.type for x in given if x.dim()}
        assert len(places) < 2, f"{function}: {places}"
        if str(function).startswith(("aten._to_copy", "aten.copy_")) and "cpu" in places:
            assert not result.is_meta, f"{function} waits for the device"
        return result


@pytest.fixture
def meta(monkeypatch):
    """A device of which autocast, that does not know it, takes no notice."""
    autocast, enabled = torch.autocast, torch.is_autocast_enabled
    monkeypatch.setattr(
        torch, "autocast", lambda d, *a, **k: nullcontext() if d == "meta" else autocast(d, *a, **k)
    )
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda d: d != "meta" and enabled(d))
    return torch.device("meta")


def batch(device, b=3, samples=12_000):
    n_samples = torch.full((b,), samples, device=device)
    return torch.empty(b, samples, device=device), n_samples


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_of_stage_1_stays_on_its_device(meta, name, checkpointing):
    model = FairASR(CONFIGS[name], n_adversaries=2, independent_space=True).to(meta)
    model.encoder.checkpointing = checkpointing
    augment = SpecAugment(1, 37, 1, 15)
    waveforms, n_samples = batch(meta)
    weights, buffers = runtime.joined(model), list(model.encoder.buffers())
    gradients = [p.grad for p in model.parameters()]
    # AdamW is not made for this device
    optimizer = SimpleNamespace(step=lambda: None, zero_grad=lambda set_to_none: None)
    scaler, meter = runtime.grad_scaler("fp32", meta), runtime.Meter(meta)
    with OneDevice():
        before = [b.clone() for b in buffers]
        features, n_frames = model.log_mel(waveforms, n_samples)
        draws = torch.empty(3, augment.n_draws, device=meta)
        views = torch.cat([features, augment(features, n_frames, draws)])
        z, reversed_z = model(views, n_frames.repeat(2))
        loss = losses.info_nce(*z.chunk(2)) + losses.contrastive_accuracy(*z.chunk(2))
        labels = torch.zeros(3, dtype=torch.long, device=meta)
        for r in reversed_z:
            loss = loss + losses.sup_con(*r.chunk(2), labels, own_view=False)
            loss = loss + sum(losses.group_separation(*r.chunk(2), labels))
        loss.backward()
        norm, done = runtime.update(weights, optimizer, scaler, buffers, before, 1.0)
        meter.add({"loss": loss, "grad_norm": norm}, done)
    assert all(p.grad is g and g.is_meta for p, g in zip(model.parameters(), gradients))
    assert optimizer.found_inf.is_meta


@pytest.mark.parametrize("name", CONFIGS)
def test_stage_2_stays_on_its_device(meta, name):
    """Up to the log-probabilities: PyTorch's CTC is not made for this device. (On a GPU it does
    wait, for lengths that it reads and sends.)"""
    model = ConformerCTC(CONFIGS[name], vocab_size=7).to(meta)
    waveforms, n_samples = batch(meta)
    with OneDevice():
        features, n_frames = model.log_mel(waveforms, n_samples)
        log_probs, lengths = model.log_probs(features, n_frames)
        log_probs.sum().backward()
        model.eval()
        with torch.no_grad():
            best, _ = model.best_classes(features, n_frames)
    assert all(p.grad.shape == p.shape and p.grad.is_meta for p in model.parameters())
    assert log_probs.dtype == torch.float32 and best.shape == log_probs.shape[:2]
    assert features.shape[1] == 76  # and 96 go through the encoder, in training or not
    assert best.shape[1] == encoder_frames(96, CONFIGS[name].subsampling_factor)
    assert log_probs.is_meta and lengths.is_meta and best.is_meta


def test_what_it_looks_for_is_found(meta):
    x = torch.empty(3, device=meta)
    with OneDevice():
        with pytest.raises(AssertionError, match="waits"):
            torch.tensor([1, 2]).to(meta)
        with pytest.raises((RuntimeError, AssertionError)):
            x + torch.ones(3)
        with pytest.raises((RuntimeError, AssertionError)):
            torch.empty(3, 3, device=meta) @ torch.ones(3, 3)
        with pytest.raises(RuntimeError, match="meta"):
            x.sum().item()
        x * torch.tensor(2.0)  # the host's own number
