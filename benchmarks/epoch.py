"""What the whole training loop keeps of the speed of its bare step, over an epoch of a real corpus.

    python benchmarks/epoch.py --manifest data/speechocean762/train.jsonl --label gender age_group
    python benchmarks/epoch.py --manifest data/demo/train.jsonl --stage 2 --json epoch.json

Runs train.py and finetune.py themselves, from scratch, with data.stream wrapped: it passes on the
script's own batches, and after every --slice of them stops the script's clock and takes the bare
step on the very same batches.

    whole loop    all that the script does from batch to batch: reading and decoding audio, putting
                  batches together, features, masks, step, sums for the log, the log itself
    bare step     masks, forward, both losses or CTC, backward, clipping, AdamW, of a second model
                  of the same size; audio is decoded and features are computed before the clock runs

The slices take turns on the same batches, so that drift and padding fall on both alike. The first
slice warms up and counts for neither. Checking the manifest, the dev set and checkpoints lie
outside of the loop measured; the epoch's last batch is not taken. With --num_workers, a slice
begins with as many uncounted batches as workers may have read ahead while the bare step ran.

Padding: the share of all feature frames that are padding, in the batches counted.

On a GPU, --trace asks something else of the same scripts: in what share of the wall-clock of their
sixth epoch (by then, nearly all shapes of batches are recorded) it runs kernels, by PyTorch's
profiler. All batches of that epoch count but the first three (of which the profiler makes one take
0.4 s) and the last, whatever --steps and --slice.
"""

import argparse
import gc
import statistics
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path

import torch
from speed import about, ctc, stage1, synchronize, updating, write_json
from torch.autograd import DeviceType
from tqdm import tqdm

import finetune
import train
from fairasr_min import checkpoint, data, runtime
from fairasr_min.audio import SAMPLE_RATE, AudioError
from fairasr_min.conformer import SIZES
from fairasr_min.graphs import record_steps
from fairasr_min.model import ConformerCTC, FairASR
from fairasr_min.runtime import at_least


class Enough(Exception):
    """Ends a script from inside its stream of batches."""


def bare_step(stage: int, dataset: data.SpeechDataset, args):
    """A new model, and the script's step for it: (features, n_frames, batch) -> None."""
    config = SIZES[args.size]
    if stage == 1:
        loss_of, model = stage1, FairASR(config, dataset.labels.shape[1], independent_space=True)
    else:
        model = ConformerCTC(config, dataset.tokenizer)
        augment = finetune.AUGMENT_TINY if args.size == "tiny" else finetune.AUGMENT

        def loss_of(model, features, n_frames, batch, precision):
            features = augment(features, n_frames, batch.draws)
            return ctc(model, features, n_frames, batch, precision)

    model.to(args.device)
    model.encoder.compiled = args.compile
    step = updating(model, loss_of, args.precision)
    if args.device.type == "cuda":
        record_steps(model.encoder)
    return model, step


def run_script(stage: int, args, wrapped, epochs: int) -> None:
    """A stage's script, from scratch, with its stream of batches wrapped until that raises
    Enough."""
    script, flag = (train, "--manifest") if stage == 1 else (finetune, "--train_manifest")
    command = [
        script.__file__, flag, args.manifest, "--size", args.size, "--epochs", epochs,
        "--batch_size", args.batch_size, "--precision", args.precision, "--max_bad", args.max_bad,
        "--device", args.device.type, "--num_workers", args.num_workers, "--save_every", 10**9,
    ]  # fmt: skip
    if stage == 1:
        command += ["--independent_space", "--label", *args.label]
    if args.compile:
        command.append("--compile")
    stream = data.stream
    with tempfile.TemporaryDirectory() as out:
        sys.argv = [*map(str, command), "--init", "none", "--out", out]
        data.stream = wrapped
        try:
            with open(Path(out) / "output", "w") as output, redirect_stdout(output):
                script.main()
        except Enough:
            pass
        finally:
            data.stream = stream
    gc.collect()  # the model, which its records hold in a circle, before another one is made


def kernels(profiler, device: DeviceType, since: int = 0) -> tuple[int, float]:
    """How many kernels ran on the device since (of time.time_ns()), copies not counted, and for how
    many seconds any of them did: they may overlap."""
    events = profiler.profiler.kineto_results.events()
    events = [e for e in events if e.device_type() == device and e.start_ns() >= since]
    events = [e for e in events if not e.name().startswith(("Memcpy", "Memset"))]
    busy = end = 0
    for start, stop in sorted((e.start_ns(), e.start_ns() + e.duration_ns()) for e in events):
        busy, end = busy + max(0, stop - max(start, end)), max(end, stop)
    return len(events), busy / 1e9


def trace(stage: int, args) -> dict:
    """Run a stage's script for six epochs, the last under the profiler."""
    stream, found = data.stream, {}

    def wrapped(dataset, batches, *rest, **more):
        data.stream = stream  # the first stream is that of training
        if len(batches) < 5:
            raise runtime.UserError(
                f"{len(batches)} steps an epoch of stage {stage} are too few; lower --batch_size"
            )
        profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        first, last = 5 * len(batches), 6 * len(batches) - 1  # without the step that ends it
        began = heard = 0.0
        since = 0
        source = stream(dataset, batches, *rest, **more)
        for number in tqdm(range(last), unit=" steps", disable=not sys.stderr.isatty()):
            if number == first + 1:  # behind the dev set and the checkpoint
                profiler.start()
            elif number == first + 3:
                torch.cuda.synchronize()
                began, since = time.perf_counter(), time.time_ns()
            batch = next(source)
            heard += int(batch.n_samples.sum()) / SAMPLE_RATE if began else 0.0
            yield batch
        torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        profiler.stop()
        (count, busy), steps = kernels(profiler, DeviceType.CUDA, since), last - first - 3
        found.update(
            stage=stage, steps=steps, audio_per_second=heard / seconds, kernels=busy / seconds,
            kernels_a_step=count / steps,
        )  # fmt: skip
        raise Enough

    run_script(stage, args, wrapped, epochs=6)
    return found


def measure(stage: int, args) -> dict:
    """Run a stage's script with its stream of batches wrapped."""
    stream, slices = data.stream, []
    frames, padding = 0, 0

    def wrapped(dataset, batches, *rest, **more):
        nonlocal frames, padding
        data.stream = stream  # the first stream is that of training
        runtime.seed_everything(0)
        model, bare = bare_step(stage, dataset, args)
        steps = min(args.steps or len(batches), len(batches) - 1)
        ahead = 2 * args.num_workers  # a worker reads two batches ahead
        size = args.slice + ahead
        if steps < 2 * size:
            raise runtime.UserError(
                f"{steps} steps of stage {stage} are too few: two slices have {2 * size}; "
                "lower --slice or --batch_size"
            )
        source, held, reading, began = stream(dataset, batches, *rest, **more), [], 0.0, 0.0
        for number in tqdm(range(steps // size * size), unit=" steps", disable=quiet):
            if number % size == ahead:
                synchronize(args.device)
                began, reading = time.perf_counter(), 0.0
            asked = time.perf_counter()
            batch = next(source)
            reading += time.perf_counter() - asked
            if number % size >= ahead:
                held.append(batch)
            yield batch
            if number % size == size - 1:  # asked for more: the slice's last step is done
                synchronize(args.device)
                whole = time.perf_counter() - began
                ready = [batch.to(args.device) for batch in held]
                ready = [(*model.log_mel(b.waveforms, b.n_samples), b) for b in ready]
                synchronize(args.device)
                began = time.perf_counter()
                for one in ready:
                    bare(*one)
                synchronize(args.device)
                seconds = time.perf_counter() - began
                if number >= size:
                    heard = sum(int(b.n_samples.sum()) for b in held) / SAMPLE_RATE
                    slices.append((whole, reading, seconds, heard))
                    frames += sum(f.shape[0] * f.shape[1] for f, _, _ in ready)
                    padding += sum(int((f.shape[1] - n).sum()) for f, n, _ in ready)
                held = []
        raise Enough

    quiet = not sys.stderr.isatty()
    run_script(stage, args, wrapped, epochs=1)
    whole, reading, bare, heard = map(sum, zip(*slices))
    kept = [b / w for w, _, b, _ in slices]
    return {
        "stage": stage,
        "steps": len(slices) * args.slice,
        "audio_seconds": heard,
        "whole_audio_per_second": heard / whole,
        "bare_audio_per_second": heard / bare,
        "kept": bare / whole,
        "kept_quartiles": statistics.quantiles(kept, n=4) if len(kept) > 1 else kept * 3,
        "waiting_for_batches": reading / whole,  # share of the loop's time
        "padding": padding / frames,
        "slices": [dict(zip(("whole_s", "reading_s", "bare_s", "audio_s"), s)) for s in slices],
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    # fmt: off
    add("--manifest", required=True, metavar="FILE", help="of training; dev.jsonl beside it")
    add("--stage", nargs="+", type=int, choices=[1, 2], default=[1, 2], help="(both)")
    add("--label", nargs="+", default=["ethnicity"], metavar="COL", help="of stage 1 (ethnicity)")
    add("--size", choices=list(SIZES), default="small", help="of the encoder (%(default)s)")
    add("--batch_size", type=at_least(2), default=16, metavar="N", help="(%(default)s)")
    add("--steps", type=at_least(1), metavar="N", help="at most so many (an epoch)")
    add("--slice", type=at_least(1), default=5, metavar="N", help="steps in turn (%(default)s)")
    add("--precision", choices=list(runtime.DTYPES), default="fp32", help="(%(default)s)")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="(%(default)s)")
    add("--num_workers", type=at_least(0), default=0, metavar="N", help="(%(default)s)")
    add("--compile", action="store_true", help="as that of train.py and finetune.py")
    add("--trace", action="store_true", help="the share of time in which a GPU runs kernels")
    add("--max_bad", type=at_least(0), default=0, metavar="N", help="rows to go without")
    add("--json", metavar="FILE", help="where all numbers go")
    # fmt: on
    args = parser.parse_args()
    args.device = runtime.setup(args.device).device
    if args.trace and args.device.type != "cuda":
        raise runtime.UserError("--trace is about a GPU: none is visible")
    settings = {k: v for k, v in vars(args).items() if k != "json"} | {"device": args.device.type}
    settings["threads"] = torch.get_num_threads()
    content = {"about": about(args.device), "arguments": settings, "results": []}
    write_json(args.json, content)
    print(" ".join(f"{k}={v}" for k, v in {**content["about"], **settings}.items()))
    if args.trace:
        ask, columns = trace, "stage | steps | s of audio / s | time in kernels | kernels a step"
        row = "{stage} | {steps} | {audio_per_second:.0f} | {kernels:.1%} | {kernels_a_step:.0f}"
    else:
        ask = measure
        columns = "stage | steps | loop, s of audio / s | bare step | kept | "
        columns += "waits for audio | padding"
        row = (
            "{stage} | {steps} | {whole_audio_per_second:.1f} | {bare_audio_per_second:.1f} | "
            "{kept:.1%} | {waiting_for_batches:.1%} | {padding:.1%}"
        )
    print(f"| {columns} |\n|---|{'---:|' * columns.count('|')}", flush=True)
    for stage in args.stage:
        one = ask(stage, args)
        content["results"].append(one)
        write_json(args.json, content)
        print(f"| {row.format(**one)} |", flush=True)
    return 0


if __name__ == "__main__":
    runtime.run(main, (data.ManifestError, AudioError, checkpoint.CheckpointError))
