"""The benchmarks run, at toy size, and write what they found. How fast is not for a test."""

import json
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, run
from torch.autograd import DeviceType

TOY = ["--size", "tiny", "--batch", 2, "--repeats", 1, "--threads", 1, "--device", "cpu"]


def read(file):
    content = json.loads(file.read_text())
    assert content["about"]["commit"] and content["about"]["torch"]
    return content["results"]


def test_speed_of_ours(tmp_path):
    out = tmp_path / "speed.json"
    only = ["--tasks", "stage1", "--precision", "bf16", "--seconds", 0.5]
    assert "| stage1 | bf16 |" in run("benchmarks/speed.py", *TOY, *only, "--json", out)
    (one,) = read(out)
    assert one["task"] == "stage1" and one["precision"] == "bf16" and len(one["ms"]) == 1
    assert one["audio_per_second"] > 0 and one["peak_mb"] > 0


def test_ours_beside_a_peer(tmp_path):
    out = tmp_path / "peers.json"
    only = ["--tasks", "ctc", "--precision", "fp32", "--seconds", 0.5, "--peers", "torchaudio"]
    run("benchmarks/peers.py", *TOY, *only, "--json", out)
    (one,) = read(out)
    assert one["ratio"] > 0 and set(one["encoders"]) == {"ours", "theirs"}
    assert all(each["peak_mb"] > 0 for each in one["encoders"].values())


def test_scaling_goes_on_where_it_was(tmp_path):
    out = tmp_path / "scaling.json"
    command = [
        "benchmarks/scaling.py", "--json", out, "--curves", "length", "--tasks", "forward",
        "--precision", "fp32", "--lengths", 0.5, "--rounds", 1, *TOY,
    ]  # fmt: skip
    assert "| length | forward | fp32 | 0.5 |" in run(*command)
    first = out.read_text()
    assert [one["x"] for one in read(out)] == [0.5]
    run(*command)
    assert out.read_text() == first  # nothing was left to measure


def test_an_epoch_through_the_scripts(demo, tmp_path):
    out = tmp_path / "epoch.json"
    only = ["--size", "tiny", "--batch_size", 4, "--slice", 2, "--steps", 4, "--device", "cpu"]
    run("benchmarks/epoch.py", "--manifest", demo / "train.jsonl", *only, "--json", out)
    for stage, one in zip((1, 2), read(out), strict=True):
        assert one["stage"] == stage and one["steps"] == 2 * len(one["slices"]) == 2
        assert one["kept"] > 0 and 0 < one["padding"] < 1


@pytest.fixture
def epoch(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import epoch

    yield epoch
    for name in ("epoch", "speed"):
        sys.modules.pop(name)


def test_time_in_kernels_counts_what_overlaps_once_and_no_copies(epoch):
    spans = [(5, 9), (7, 8), (30, 31), (8, 12), (12, 14), (20, 20), (2, 3)]
    names = ["kernel"] * len(spans) + ["Memcpy HtoD", "Memset (Device)"]

    def event(name, start, stop, device):
        return SimpleNamespace(
            name=lambda: name,
            start_ns=lambda: start,
            duration_ns=lambda: stop - start,
            device_type=lambda: device,
        )

    on_gpu = [event(n, *s, DeviceType.CUDA) for n, s in zip(names, [*spans, (40, 60), (50, 70)])]
    events = [*on_gpu, event("aten::mm", 0, 100, DeviceType.CPU)]
    results = SimpleNamespace(events=lambda: events)
    profiler = SimpleNamespace(profiler=SimpleNamespace(kineto_results=results))
    busy = sum(any(start <= ns < stop for start, stop in spans) for ns in range(100))
    count, seconds = epoch.kernels(profiler, DeviceType.CUDA)
    assert count == len(spans) and seconds * 1e9 == pytest.approx(busy)
    assert epoch.kernels(profiler, DeviceType.CUDA, since=12) == (3, pytest.approx(3e-9))


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")
def test_time_in_kernels_reads_what_pytorchs_profiler_gives(epoch):
    x = torch.randn(300, 300)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        began = time.perf_counter()
        for _ in range(20):
            x @ x
        middle = time.time_ns()
        for _ in range(2):
            x @ x
        seconds = time.perf_counter() - began
    count, busy = epoch.kernels(profiler, DeviceType.CPU)
    assert count >= 22 and 0 < busy < 1.1 * seconds
    assert 2 <= epoch.kernels(profiler, DeviceType.CPU, since=middle)[0] < 20
