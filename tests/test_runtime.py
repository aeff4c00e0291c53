"""Learning rate, the optimizer step and its skips, the log."""

import copy
import json
import math
import multiprocessing
import signal
import time
from types import SimpleNamespace

import pytest
import torch

from fairasr_min import runtime

ALONE = runtime.World(0, 1, torch.device("cpu"))


def test_learning_rate_warms_up_and_falls_to_the_floor():
    rates = [runtime.lr_at(s, 100, 1.0, 0.1, 0.01) for s in range(100)]
    assert rates[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert rates[10] == 1.0 and rates[10:] == sorted(rates[10:], reverse=True)
    middle = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * 45 / 90))
    assert rates[55] == pytest.approx(middle)
    assert runtime.lr_at(100, 100, 1.0, 0.1, 0.01) == pytest.approx(0.01)
    assert runtime.lr_at(0, 1, 1.0, 0.05, 0.01) == 1.0  # a single step
    low = [runtime.lr_at(s, 100, 1e-3, 0.1, 0.01) for s in range(100)]
    assert max(low) == low[-1] == 1e-3  # a floor above the peak raises nothing


def small_step(factor, steps=1, precision="fp32"):
    """A Linear + BatchNorm after `steps` updates on a loss times `factor`."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    weights = runtime.joined(model)
    optimizer = torch.optim.AdamW([weights], lr=0.1, fused=True)
    scaler = runtime.grad_scaler(precision, torch.device("cpu"))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    buffers = list(model.buffers())
    for _ in range(steps):
        old = [b.clone() for b in buffers]
        loss = (model(torch.randn(4, 3)) * factor).square().sum()
        scaler.scale(loss).backward()
        norm, done = runtime.update(weights, optimizer, scaler, buffers, old, grad_clip=1.0)
    return model, optimizer, scaler, before, norm, done


# 1e15: gradients of 1e30 are finite, their squares and so the norm are not
@pytest.mark.parametrize("factor", [float("nan"), float("inf"), 1e15])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_non_finite_step_leaves_everything_as_it_was(factor, precision):
    model, optimizer, scaler, before, norm, done = small_step(factor, 3, precision)
    assert done == 0 and not norm.isfinite()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    for state in optimizer.state.values():
        assert state["step"] == 0 and state["exp_avg"].abs().sum() == 0
    if precision == "fp16" and factor != 1e15:
        assert scaler.get_scale() == 2.0**13  # 2^16, halved three times
    assert not any(p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_finite_step_is_adamw_on_the_clipped_gradient(precision):
    model, _, _, before, norm, done = small_step(5.0, 1, precision)
    torch.manual_seed(0)
    other = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    plain = torch.optim.AdamW(other.parameters(), lr=0.1)
    (other(torch.randn(4, 3)) * 5.0).square().sum().backward()
    torch.nn.utils.clip_grad_norm_(other.parameters(), 1.0)
    plain.step()
    assert done == 1 and norm > 1
    for ours, theirs in zip(model.state_dict().values(), other.state_dict().values()):
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_joined_parameters_keep_their_values_and_layouts():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last),
        torch.nn.Flatten(),
        torch.nn.Linear(5, 7, bias=False),
    )
    model.register_parameter("tied", model[2].weight)
    other = copy.deepcopy(model)
    weights = runtime.joined(model)
    assert weights.dim() == 1 and weights.requires_grad and weights.is_leaf
    ends, base = [], weights.data_ptr()
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs) and ours.stride() == theirs.stride() and ours.is_leaf
        assert ours.grad.stride() == ours.stride() and not ours.grad.any()
        for tensor, whole in ((ours, weights), (ours.grad, weights.grad)):
            assert tensor.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
            assert (tensor.data_ptr() - whole.data_ptr()) % 256 == 0
        ends.append((ours.data_ptr() - base, ours.data_ptr() - base + 4 * ours.numel()))
    assert all(one[1] <= next_[0] for one, next_ in zip(ends, ends[1:]))  # none overlaps

    x = torch.randn(2, 3, 3, 3)
    for _ in range(2):  # gradients add up
        for one in (model, other):
            one(x).square().sum().backward()
    for ours, theirs in zip(model.parameters(), other.parameters()):
        assert torch.equal(ours.grad, theirs.grad)
    norm = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in other.parameters()]))
    assert torch.isclose(weights.grad.norm(), norm)
    weights.data.zero_()
    assert not any(p.any() for p in model.parameters())


def test_the_norm_of_many_gradients_is_exact():
    """float32 sums lose what is added to a large sum: PyTorch's over all of these, 0.1 %."""
    model = torch.nn.Linear(4000, 4000, bias=False)
    weights = runtime.joined(model)
    weights.grad.normal_(generator=torch.Generator().manual_seed(0))
    expected = weights.grad.double().norm().item()
    optimizer = torch.optim.AdamW([weights], lr=0.0, fused=True)
    scaler = runtime.grad_scaler("fp32", torch.device("cpu"))
    norm, _ = runtime.update(weights, optimizer, scaler, [], [], grad_clip=1.0)
    assert norm.item() == pytest.approx(expected, rel=1e-5)


def test_meter_means_leave_skipped_steps_out():
    meter = runtime.Meter(torch.device("cpu"))

    def add(value, done):
        meter.add({"loss": torch.tensor(value)}, torch.tensor(done))

    for value, done in ((1.0, 1.0), (float("nan"), 0.0), (3.0, 1.0), (float("inf"), 0.0)):
        add(value, done)
    assert meter.skipped_in_a_row() == 1
    assert meter.read() == {"loss": 2.0, "skipped": 2}
    add(float("nan"), 0.0)
    assert meter.skipped_in_a_row() == 2
    assert meter.read() == {"loss": 0.0, "skipped": 1}
    add(5.0, 1.0)
    assert meter.skipped_in_a_row() == 0 and meter.read() == {"loss": 5.0, "skipped": 0}


def test_many_skips_in_a_row_stop_the_run_and_name_the_audio():
    meter = runtime.Meter(torch.device("cpu"))
    heard = [SimpleNamespace(row={"audio_filepath": name}) for name in ("a.wav", "b.wav", "c.wav")]
    for n in range(runtime.TOO_MANY_SKIPS):
        runtime.stop_if_diverged(meter, heard, [1]) if n else None
        meter.add({"loss": torch.tensor(float("nan"))}, torch.tensor(0.0))
    with pytest.raises(runtime.UserError, match=r"held b\.wav$"):
        runtime.stop_if_diverged(meter, heard, [1])


def test_memory_that_a_cpu_does_not_have_is_a_users_mistake(capsys):
    with pytest.raises(SystemExit) as end:
        runtime.run(lambda: torch.empty(2**60))
    printed = capsys.readouterr().err
    assert end.value.code == 2 and printed.startswith("error: out of memory (can't allocate")
    assert "--batch_size" in printed and printed.count("\n") == 1
    with pytest.raises(RuntimeError):  # any other is a mistake of ours
        runtime.run(lambda: torch.ones(2) @ torch.ones(3))


def ignore_sigterm():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)


def test_workers_do_not_keep_a_failed_run_alive(capsys):
    """They leave signals to the process above, which Python would have wait for them for ever."""
    worker = multiprocessing.get_context("fork").Process(target=ignore_sigterm, daemon=True)
    worker.start()

    def main():
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    with pytest.raises(SystemExit) as end:
        runtime.run(main)
    worker.join(20)
    alive = worker.is_alive()
    worker.kill()  # or a failure would hang, too
    assert not alive and end.value.code == 2
    assert "fewer --num_workers" in capsys.readouterr().err

    def mistake():
        raise RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nOriginal ...")

    with pytest.raises(RuntimeError, match="Caught"):  # ours, to be seen whole
        runtime.run(mistake)


def test_a_folder_that_cannot_be_written_is_found_out_at_once(tmp_path, monkeypatch):
    def read_only(dir):
        raise OSError(30, "Read-only file system")

    runtime.make_folder(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []
    monkeypatch.setattr("tempfile.TemporaryFile", read_only)
    with pytest.raises(runtime.UserError, match="new: Read-only file system; name another"):
        runtime.make_folder(tmp_path / "new")


def test_a_part_of_torchruns_variables(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as end:
        runtime.run(lambda: runtime.setup("cpu"))
    assert end.value.code == 2
    assert "WORLD_SIZE is set, but not LOCAL_RANK, MASTER_ADDR" in capsys.readouterr().err


def test_log_is_cut_back_to_what_the_checkpoint_vouches_for(tmp_path):
    log = runtime.Log(tmp_path, ALONE)
    log.write(1, loss=1.0)
    size = log.size()
    log.write(2, loss=2.0)
    log = runtime.Log(tmp_path, ALONE, size)
    assert log.size() == size
    log.write(2, loss=2.5)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1.0), (2, 2.5)]


def test_seeds_of_steps_and_ranks_differ_and_repeat():
    def draw(*stream):
        runtime.seed_everything(*stream)
        return torch.rand(1).item()

    seen = [draw(0, step, rank) for step in range(3) for rank in range(2)]
    assert len(set(seen)) == 6 and draw(0, 1, 1) == seen[3] and draw(1, 1, 1) != seen[3]


def test_what_needs_a_gpu_is_refused_without():
    with pytest.raises(runtime.UserError, match="bf16"):
        runtime.check_supported("fp16", torch.device("cpu"))
    with pytest.raises(runtime.UserError, match="--compile"):
        runtime.check_supported("fp32", torch.device("cpu"), compiled=True)


@pytest.mark.parametrize("supported", [True, False])
def test_bf16_on_a_cpu_without_it_is_slow_and_says_so(monkeypatch, capsys, supported):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    for precision in ("fp32", "bf16"):
        runtime.check_supported(precision, torch.device("cpu"))
    warned = capsys.readouterr().err
    assert warned.count("warning: this CPU") == (0 if supported else 1)
