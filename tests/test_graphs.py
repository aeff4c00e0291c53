"""Recorded training steps, on a CPU with a recorder in the place of CUDA's graphs: it notes every
operation with the tensors that it was given, and runs the same again into the same memory. And
compiled layers, as traced for a GPU and run by PyTorch. Where there is a GPU, the real ones too."""

import copy
import gc
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fairasr_min import conformer, graphs, layers, runtime
from fairasr_min.conformer import Conformer, ConformerConfig, ConformerLayer, RelativeAttention

CONFIG = ConformerConfig(
    d_model=16, n_layers=2, n_heads=2, conv_kernel=5, subsampling_channels=4, dropout=0,
    dropout_att=0,
)  # fmt: skip


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        return result

    def replay(self):
        for function, args, kwargs, result in self.calls:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again)):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)  # no view, nothing written in place


@pytest.fixture
def encoder(monkeypatch):
    """One that is recorded, and its twin, which is not."""
    torch.manual_seed(0)
    model = Conformer(CONFIG)

    @contextmanager
    def recording(graph, **options):
        """CUDA computes nothing meanwhile: put back what the recorder has computed."""
        there = [*model.buffers(), *(p.grad for p in model.parameters())]
        before = [t.clone() for t in there]
        with graph:
            yield
        for t, value in zip(there, before):
            t.copy_(value)

    class Stream:
        def wait_stream(self, other):
            pass

    for name, value in {
        "current_stream": Stream, "set_stream": lambda stream: None,
        "graph_pool_handle": int, "CUDAGraph": Recorder, "graph": recording,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(graphs, "_stream", Stream)
    plain = copy.deepcopy(model)
    graphs.record_steps(model)
    return model, plain


def batch(seed, frames, b=3):
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(b, frames, 80, generator=random)
    return x, torch.tensor([frames - 1] + [frames - 30] * (b - 1))


def step(model, x, n_frames, clear=True):
    """Backward from a weighted sum of the valid frames -> output, gradients."""
    if clear:
        for p in model.parameters():
            if p.grad is not None:
                p.grad.zero_()
    out, lengths = model(x, n_frames)
    valid = torch.arange(out.shape[1])[None, :, None] < lengths[:, None, None]
    weights = torch.linspace(-1, 1, out.shape[2], dtype=out.dtype)
    ((out * valid * weights).sum(2).square().sum() / lengths.sum()).backward()
    valid_out = torch.cat([one[:n] for one, n in zip(out, lengths)])
    return valid_out.detach().clone(), [p.grad.clone() for p in model.parameters()]


def same(one, other):
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_each_step_is_that_of_an_encoder_without_records(encoder):
    model, plain = encoder
    for i, frames in enumerate([100, 60, 100, 60, 99, 100, 60, 60]):
        x = batch(i, frames)
        same(step(model, *x), step(plain, *x))
        same(dict(model.named_buffers()), dict(plain.named_buffers()))
    assert model.forward.turn == 6  # all but the first of each shape; 99 and 100 frames share one
    assert len(model.forward.records) == 2


def test_gradients_of_several_batches_add_up(encoder):
    model, plain = encoder
    for i in range(4):
        same(step(model, *batch(i, 70), clear=False), step(plain, *batch(i, 70), clear=False))


def test_weights_may_change_between_steps(encoder):
    model, plain = encoder
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-2) for m in encoder]
    for i in range(4):
        for one, optimizer in zip(encoder, optimizers):
            step(one, *batch(i, 70))
            optimizer.step()
    same(model.state_dict(), plain.state_dict())


def test_steps_of_joined_parameters_are_recorded(encoder):
    """As train.py does: join, record, then update."""
    model, plain = encoder
    del model.forward  # the record of the fixture
    losses = []
    for one in (model, plain):
        weights = runtime.joined(one)
        if one is model:
            graphs.record_steps(model)
        optimizer = torch.optim.AdamW([weights], lr=1e-3, eps=1e-3, fused=True)
        scaler = runtime.grad_scaler("fp32", torch.device("cpu"))
        for i in range(4):
            buffers = list(one.buffers())
            before = [b.clone() for b in buffers]
            losses.append(step(one, *batch(i, 70))[0].mean())
            assert weights.grad.any()
            runtime.update(weights, optimizer, scaler, buffers, before, 1.0)
    assert model.forward.turn == 3
    same(losses[:4], losses[4:])
    same(model.state_dict(), plain.state_dict())


def test_no_garbage_is_collected_while_recording(encoder, monkeypatch):
    """It may hold another model's graphs, which cannot be freed then."""
    model, _ = encoder
    seen, eager, grad = [], model.forward.eager, torch.autograd.grad
    model.forward.eager = lambda *x: seen.append(gc.isenabled()) or eager(*x)
    monkeypatch.setattr(torch.autograd, "grad", lambda *x: seen.append(gc.isenabled()) or grad(*x))
    try:
        for i in range(2):
            step(model, *batch(i, 70))
        assert seen == [True, False, False]  # at first sight, and when recorded, both ways
        assert gc.isenabled()
        gc.disable()
        step(model, *batch(0, 100)), step(model, *batch(0, 100))
        assert not gc.isenabled()  # as it was
    finally:
        gc.enable()


def test_batches_have_few_lengths():
    before = None
    for t in range(1, 9000):
        x = conformer.recurring(torch.ones(1, t, 1))
        after = x.shape[1]
        assert t <= after <= max(t + 31, t * 17 / 16) and after % 32 == 0
        assert x[:, :t].all() and not x[:, t:].any()
        assert before is None or after >= before
        before = after
    assert len({conformer.recurring(torch.ones(1, t, 1)).shape[1] for t in range(1, 4000)}) == 64


def test_evaluation_and_checkpointing_are_not_recorded(encoder):
    model, plain = encoder
    for _ in range(3):
        with torch.no_grad():
            same(model(*batch(0, 70)), plain(*batch(0, 70)))
        model.eval(), plain.eval()
        same(model(*batch(0, 70))[0], plain(*batch(0, 70))[0])
        model.train(), plain.train()
    model.checkpointing = plain.checkpointing = True
    for i in range(3):
        same(step(model, *batch(i, 70)), step(plain, *batch(i, 70)))
    assert not model.forward.records


def test_shapes_beyond_the_most_are_not_recorded(encoder, monkeypatch):
    monkeypatch.setattr(graphs, "MOST", 1)
    model, plain = encoder
    for frames in [40, 90, 40, 90, 90]:
        same(step(model, *batch(0, frames)), step(plain, *batch(0, frames)))
    assert len(model.forward.records) == 1 and model.forward.turn == 1


def test_what_was_overwritten_is_not_used(encoder):
    model, _ = encoder
    step(model, *batch(0, 70))
    first, _ = model(*batch(1, 70))
    model(*batch(2, 70))
    with pytest.raises(RuntimeError, match="another batch"):
        first.sum().backward()


def test_a_gradient_that_was_put_away_is_missed(encoder):
    model, _ = encoder
    for i in range(2):
        step(model, *batch(i, 70))
    model.zero_grad(set_to_none=True)
    with pytest.raises(RuntimeError, match="set_to_none"):
        model(*batch(1, 70))[0].sum().backward()


@pytest.fixture
def traced(monkeypatch):
    """A GPU's paths, dropout's too, traced by torch.compile, on a CPU without generated code."""
    traced = torch.compile(ConformerLayer.forward, dynamic=True, backend="aot_eager")
    monkeypatch.setattr(conformer, "_compiled_layer", lambda: traced)
    monkeypatch.setattr(RelativeAttention, "by_hand", RelativeAttention.fused)
    monkeypatch.setattr(layers, "_onednn_takes", lambda dtype: False)

    def mask(shape, p, like):
        return torch.empty(shape, dtype=torch.bool).bernoulli_(1 - p)

    def dropout(self, x, residual=None, share=1.0):
        x = F.dropout(x, self.p, self.training)
        return x if residual is None else torch.add(residual, x, alpha=share)

    monkeypatch.setattr(conformer, "dropout_mask", mask)
    monkeypatch.setattr(layers.Dropout, "forward", dropout)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@pytest.mark.parametrize("dropout, checkpointing", [(0.0, False), (0.1, False), (0.1, True)])
def test_compiled_layers_have_the_gradients_of_others(traced, dropout, checkpointing):
    torch.manual_seed(0)
    plain = Conformer(replace(CONFIG, dropout=dropout, dropout_att=dropout))
    model = copy.deepcopy(plain)
    model.compiled, model.checkpointing = True, checkpointing
    runtime.joined(model)
    for i, frames in enumerate([100, 60, 99]):
        found = []
        for one in (model, plain):
            torch.manual_seed(i)
            found.append(step(one, *batch(i, frames)))
        same(*found)
        same(dict(model.named_buffers()), dict(plain.named_buffers()))
    stats = torch._dynamo.utils.counters["stats"]
    assert 0 < stats["unique_graphs"] <= 5  # once for both layers and all lengths
    model.eval(), plain.eval()
    with torch.no_grad():
        same(model(*batch(0, 70)), plain(*batch(0, 70)))


def gpu_steps(precision, dropout=0.1, compiled=False, recorded=False):
    """Output and gradients of four steps."""
    torch.manual_seed(0)
    model = Conformer(replace(CONFIG, dropout=dropout, dropout_att=dropout)).cuda()
    model.compiled = compiled
    if recorded:
        runtime.joined(model)
        graphs.record_steps(model)
    found = []
    for i in range(4):
        torch.manual_seed(i)
        x, n_frames = batch(i, 96)
        for p in model.parameters():
            p.grad = None if p.grad is None else p.grad.zero_()
        with torch.autocast("cuda", precision, precision != torch.float32, cache_enabled=False):
            out, _ = model(x.cuda(), n_frames.cuda())
        out.float().square().sum().backward()
        found.append([out.detach().clone(), *(p.grad.clone() for p in model.parameters())])
    return found


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_on_a_gpu_dropout_included(precision):
    plain = gpu_steps(precision)
    for one, other in zip(plain, gpu_steps(precision, recorded=True)):
        torch.testing.assert_close(one, other)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_compiled_on_a_gpu(dropout):
    plain = gpu_steps(torch.float32, dropout)
    for recorded in (False, True):
        found = gpu_steps(torch.float32, dropout, compiled=True, recorded=recorded)
        for one, other in zip(plain, found):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
