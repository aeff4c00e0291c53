"""The benchmarks run, at toy size, and write what they found. How fast is not for a test."""

import json

from conftest import run

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
