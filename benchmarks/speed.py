"""How long the steps of our scripts take, and how much memory.

    python benchmarks/speed.py --json speed.json
    python benchmarks/speed.py --tasks ctc --precision bf16 --batch 16 --device cuda --compile

One batch of synthetic audio (noise; clips of one length; three units a second), front end included:

    forward         eval mode: waveforms -> log-probabilities; weights held, as decode.py does
    ctc             train mode with dropout, unmasked: waveforms -> CTC loss -> gradients
    ctc_update      and clipping and AdamW, as in finetune.py
    stage1          train mode: waveforms -> two views, one of them masked -> InfoNCE and FSC in
                    independent space -> gradients
    stage1_update   and clipping and AdamW, as in train.py

Each task has a process of its own: its peak of memory (resident, PyTorch included; on a GPU what
tensors take) is nobody else's. Two steps warm up. Stage 1 hears each utterance twice; its seconds
of audio count once. What else runs on the machine runs in these numbers: `load` is written beside.
"""

import argparse
import functools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from datetime import datetime
from itertools import product
from pathlib import Path

import torch
import torchaudio

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from fairasr_min import data, losses, runtime  # noqa: E402
from fairasr_min.audio import SAMPLE_RATE  # noqa: E402
from fairasr_min.conformer import SIZES  # noqa: E402
from fairasr_min.graphs import record_steps  # noqa: E402
from fairasr_min.layers import weights_held  # noqa: E402
from fairasr_min.model import ConformerCTC, FairASR  # noqa: E402
from fairasr_min.runtime import UserError, at_least  # noqa: E402
from train import AUGMENT  # noqa: E402

TASKS = ["forward", "ctc", "ctc_update", "stage1", "stage1_update"]
UNITS = 1024  # as stt_en_conformer_ctc_small
TORCHRUN = ["-m", "torch.distributed.run", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]


# ---- the steps -----------------------------------------------------------------------------------


def ctc(model, features, n_frames, batch, precision):
    """The loss of finetune.py, of features that are masked already, or not."""
    with runtime.autocast(precision, features.device):
        log_probs, lengths = model.log_probs(features, n_frames)
    return losses.ctc_loss(log_probs, lengths, batch.targets, batch.target_lengths).mean()


def stage1(model, features, n_frames, batch, precision):
    """The loss of train.py, without the accuracies that it watches."""
    second = AUGMENT(features, n_frames, batch.draws.chunk(2, dim=1)[1])
    with runtime.autocast(precision, features.device):
        z, reversed_z = model(torch.cat([features, second]), n_frames.repeat(2))
    loss = losses.info_nce(*map(runtime.gather, z.float().chunk(2)))
    for column, z_rev in enumerate(reversed_z):
        labels = runtime.gather(batch.labels[:, column])
        fsc = losses.sup_con(*map(runtime.gather, z_rev.float().chunk(2)), labels)
        loss = loss + 0.1 * fsc / len(reversed_z)
    return loss


def updating(model, loss_of, precision):
    """loss_of with all that our scripts do for a step: (features, n_frames, batch) -> None."""
    weights = runtime.joined(model)
    optimizer = torch.optim.AdamW([weights], lr=1e-4, weight_decay=0.01, eps=1e-6, fused=True)
    scaler, buffers = runtime.grad_scaler(precision, weights.device), list(model.encoder.buffers())

    def step(features, n_frames, batch):
        before = [b.clone() for b in buffers]
        scaler.scale(loss_of(model, features, n_frames, batch, precision)).backward()
        runtime.update(weights, optimizer, scaler, buffers, before, 1.0)

    return step


def noise(spec: dict, rank: int) -> data.Batch:
    """A batch of synthetic audio; labels of seven groups."""
    random = torch.Generator().manual_seed(rank)
    b, s = spec["batch"], round(spec["seconds"] * SAMPLE_RATE)
    u = max(2, round(3 * spec["seconds"]))
    return data.Batch(
        list(range(b)),
        0.05 * torch.randn(b, s, generator=random),
        torch.full((b,), s),
        torch.randint(0, 7, (b, 1), generator=random),
        torch.randint(0, UNITS, (b, u), generator=random),
        torch.full((b,), u),
        torch.rand(b, 2 * AUGMENT.n_draws, generator=random),
    )


def make_step(spec: dict, world: runtime.World, encoder=None):
    """One step of a task, as a function without arguments, and its model. encoder: config -> a
    module to put in the place of ours."""
    task, config, precision = spec["task"], SIZES[spec["size"]], spec["precision"]
    runtime.seed_everything(0)
    first = task.startswith("stage1")
    model = FairASR(config, 1, True) if first else ConformerCTC(config, vocab_size=UNITS)
    if encoder:
        model.encoder = encoder(config)
    model.to(world.device).train(task != "forward")
    if not encoder:
        model.encoder.compiled = spec["compile"]
    elif spec["compile"] and task != "forward":
        model.encoder.compile(mode="reduce-overhead")  # which on a GPU records, as ours does
    model.encoder.checkpointing = spec.get("activation_checkpointing", False)
    on_cpu = world.device.type == "cpu"
    batch = noise(spec, world.rank).to(world.device)
    loss_of = stage1 if first else ctc
    update = updating(model, loss_of, precision) if task.endswith("_update") else None
    if not (on_cpu or encoder or spec["eager"] or world.size > 1):  # as train.py does
        record_steps(model.encoder)
    clear = model.zero_grad
    if not on_cpu and task != "forward":  # to add to: new ones might lie in memory of a record
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        gradients = torch.optim.SGD(model.parameters(), foreach=True)  # zeroes them all at once
        clear = functools.partial(gradients.zero_grad, set_to_none=False)

    def step():
        if task == "forward":
            with torch.no_grad(), runtime.autocast(precision, world.device):
                return model(batch.waveforms, batch.n_samples)
        features, n_frames = model.log_mel(batch.waveforms, batch.n_samples)
        if update:
            return update(features, n_frames, batch)
        clear()
        loss_of(model, features, n_frames, batch, precision).backward()

    return step, model


# ---- measuring -----------------------------------------------------------------------------------


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak_mb(device: torch.device) -> float | None:
    """Most memory that this process has held so far; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6


def worker(spec: dict, encoders: dict | None = None) -> int:
    """In the fresh process: measure, print one line of JSON. Several encoders take turns."""
    world = runtime.setup(spec["device"])
    runtime.check_supported(spec["precision"], world.device)
    torch.set_num_threads(spec["threads"])
    steps, found = {}, {}
    hold = spec["task"] == "forward"  # as decode.py does

    def timed(name):
        began = time.perf_counter()
        steps[name]()
        synchronize(world.device)
        return round(1000 * (time.perf_counter() - began), 3)

    with weights_held() if hold else nullcontext():
        for name, encoder in (encoders or {"ours": None}).items():
            steps[name], model = make_step(spec, world, encoder)
            parameters = sum(p.numel() for p in model.parameters())
            found[name] = {"parameters": parameters, "first_ms": timed(name), "ms": []}
            timed(name)
        for i in range(spec["repeats"]):  # A B, B A, A B, ...
            for name in list(steps)[:: 1 if i % 2 == 0 else -1]:
                found[name]["ms"].append(timed(name))
    for one in found.values():
        one["median_ms"] = median = statistics.median(one["ms"])
        one["min_ms"], one["max_ms"] = min(one["ms"]), max(one["ms"])
        heard = spec["batch"] * spec["seconds"] * world.size
        one["audio_per_second"] = round(1000 * heard / median, 2)
    world.say(json.dumps({"encoders": found, "peak_mb": peak_mb(world.device)}))
    return 0


def launch(spec: dict, script: str = __file__) -> dict:
    """Run a script's worker in a fresh process, or several; what it found, or {"error": reason}."""
    several = [*TORCHRUN, f"--nproc_per_node={spec['processes']}"] if spec["processes"] > 1 else []
    done = subprocess.run(
        [sys.executable, *several, script, "--worker", json.dumps(spec)],
        env={**os.environ, "OMP_NUM_THREADS": str(spec["threads"])},
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        silent = f"error: exit code {done.returncode}, no message; out of memory?"
        lines = [silent, *done.stderr.splitlines()]
        return {"error": [x for x in lines if "Error: " in x or x.startswith("error: ")][-1]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def about(device: torch.device) -> dict:
    """What the numbers depend on, besides the arguments."""
    try:
        info = Path("/proc/cpuinfo").read_text()
        cpu = dict(re.findall(r"^(.+?)\s*: (.+)$", info, re.MULTILINE))
        cpu = f"{cpu['model name']} (family {cpu['cpu family']}, model {cpu['model']})"
    except (OSError, KeyError):
        cpu = platform.processor() or platform.machine()
    return {
        "commit": runtime.commit(),
        "date": datetime.now().isoformat(timespec="seconds"),
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),  # runnable processes in the minute before
        "gpu": torch.cuda.get_device_name() if device.type == "cuda" else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchaudio": torchaudio.__version__,
    }


def write_json(path: str | None, content: dict) -> None:
    """After each point, whole or not at all: an interruption leaves what was measured before."""
    if path:
        try:
            Path(f"{path}.unfinished").write_text(json.dumps(content, indent=1) + "\n")
            os.replace(f"{path}.unfinished", path)
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror or error})") from None


# ---- the command lines of this script and of peers.py --------------------------------------------


def arguments(description: str, tasks: list[str]) -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = p.add_argument
    # fmt: off
    add("--tasks", nargs="+", choices=TASKS, default=tasks, metavar="TASK",
        help=f"of {', '.join(TASKS)} (%(default)s)")
    add("--precision", nargs="+", choices=list(runtime.DTYPES), default=["fp32", "bf16"],
        help="one or more (%(default)s)")
    add("--size", choices=list(SIZES), default="small", help="of the encoder (%(default)s)")
    add("--batch", type=at_least(2), default=8, metavar="N", help="utterances (%(default)s)")
    add("--seconds", type=at_least(0.2, float), default=10, metavar="F",
        help="of each utterance (%(default)s)")
    add("--repeats", type=at_least(1), default=7, metavar="N", help="timed steps (%(default)s)")
    add("--threads", type=at_least(1), default=torch.get_num_threads(), metavar="N",
        help="of the processor (%(default)s)")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto",
        help="auto: a GPU if there is one (%(default)s)")
    add("--eager", action="store_true",
        help="ours too starts each of a GPU's kernels by itself, instead of replaying records")
    add("--compile", action="store_true",
        help="training (not forward) by torch.compile: layers of ours, other encoders as a whole; "
             "the first step takes a minute or two (first_ms)")
    add("--json", metavar="FILE", help="where all numbers go")
    add("--worker", help=argparse.SUPPRESS)
    # fmt: on
    return p


def prepare(args, **fixed) -> tuple[dict, dict]:
    """What all points share, for launch(), and what --json will hold; both checked and shown."""
    device = runtime.setup(args.device).device
    for precision in args.precision:
        runtime.check_supported(precision, device, args.compile)
    names = ("size", "batch", "seconds", "repeats", "threads", "eager", "compile")
    common = {k: getattr(args, k) for k in names} | {"device": device.type, "processes": 1, **fixed}
    content = {"about": about(device), "synthetic": True, "results": []}
    write_json(args.json, content)
    print(" ".join(f"{k}={v}" for k, v in {**content["about"], **common}.items()))
    return common, content


def main() -> int:
    parser = arguments(__doc__, TASKS)
    text = "as that of train.py and finetune.py"
    parser.add_argument("--activation_checkpointing", action="store_true", help=text)
    args = parser.parse_args()
    if args.worker:
        return worker(json.loads(args.worker))
    common, content = prepare(args, activation_checkpointing=args.activation_checkpointing)
    print("| task | precision | median ms | min | max | s of audio / s | peak MB |")
    print("|---|---|---:|---:|---:|---:|---:|", flush=True)
    for task, precision in product(args.tasks, args.precision):
        spec = {**common, "task": task, "precision": precision}
        found = launch(spec)
        found |= found.pop("encoders", {}).get("ours", {})
        content["results"].append({**spec, **found})
        write_json(args.json, content)
        columns = ("median_ms", "min_ms", "max_ms", "audio_per_second", "peak_mb")
        numbers = found.get("error") or " | ".join(f"{found[k] or 0:.1f}" for k in columns)
        print(f"| {task} | {precision} | {numbers} |", flush=True)
    return 1 if any("error" in one for one in content["results"]) else 0


if __name__ == "__main__":
    runtime.run(main)
