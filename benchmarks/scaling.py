"""Throughput and memory over the length of the audio, the batch, the model, the processors.

    python benchmarks/scaling.py --json scaling.json
    python benchmarks/scaling.py --json forward.json --curves length batch --tasks forward

Curves of the tasks of speed.py, on synthetic audio (noise), each point in a process of its own:

    length       2 to 30 s at --batch utterances
    batch        1 to 64 utterances of --seconds
    size         small, medium, large at --batch and --seconds
    processes    steps with the optimizer, one process at twice --batch: with 1 thread, with 2; then
                 two processes (torchrun) of 1 thread each that share this batch (strong scaling),
                 or have one of this size each (weak scaling). Memory is that of one process.

All points are measured --rounds times over, so that slow minutes do not fall on one curve alone.
The file is written after each point: interrupted, the same command goes on there (points that
failed are tried again); finished, it draws the plot again. The plot needs matplotlib.
"""

import argparse
import json
import statistics
import sys
from itertools import product
from pathlib import Path

import torch
from speed import TASKS, about, launch, write_json
from tqdm import tqdm

from fairasr_min import runtime
from fairasr_min.conformer import SIZES
from fairasr_min.runtime import UserError, at_least

CURVES = {
    "length": "seconds of each utterance",
    "batch": "utterances in a batch",
    "size": "model",
    "processes": "processes x threads",
}
QUANTITIES = {"audio_per_second": "seconds of audio a second", "peak_mb": "peak MB of a process"}


def points(args, device: str) -> list[dict]:
    """What to measure in one round: arguments of speed.launch, and where it stands on its curve."""
    common = {
        "size": args.size, "batch": args.batch, "seconds": args.seconds, "threads": args.threads,
        "repeats": args.repeats, "device": device, "compile": False, "eager": False,
        "processes": 1,
    }  # fmt: skip
    twice = {"batch": 2 * args.batch}
    of_curve = {
        "length": [(n, {"seconds": n}) for n in args.lengths],
        "batch": [(n, {"batch": n}) for n in args.batches],
        "size": [(name, {"size": name}) for name in args.sizes],
        "processes": [
            ("1 x 1", {**twice, "threads": 1}),
            ("1 x 2", {**twice, "threads": 2}),
            ("2 x 1, same batch", {"threads": 1, "processes": 2}),
            ("2 x 1, twice the batch", {**twice, "threads": 1, "processes": 2}),
        ],
    }
    found = []
    for curve, precision in product(args.curves, args.precision):
        tasks = args.tasks if curve != "processes" else ["ctc_update", "stage1_update"]
        for task, (x, changed) in product(tasks, of_curve[curve]):
            spec = {**common, **changed, "task": task, "precision": precision}
            views = 2 if task.startswith("stage1") else 1
            enough = spec["batch"] * spec["processes"] >= views  # one utterance has no negatives
            if enough and views * spec["batch"] * spec["seconds"] <= args.most_audio:
                found.append({"curve": curve, "x": x, **spec})
    return found


def place(point: dict) -> tuple:
    return tuple(point[k] for k in ("curve", "task", "precision", "x"))


def pooled(results: list[dict]) -> dict[tuple, dict]:
    """The median over the rounds for each (curve, task, precision, x), in the order measured."""
    rounds = {}
    for one in results:
        if "error" not in one:
            rounds.setdefault(place(one), []).append(one)
    return {
        key: {q: statistics.median(one[q] or 0 for one in several) for q in QUANTITIES}
        for key, several in rounds.items()
    }


def draw(found: dict[tuple, dict], file: Path, title: str) -> None:
    """A column for each curve, a row for each quantity, a line for each task and precision."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("no plot: matplotlib is not installed (pip install matplotlib)")
        return
    curves = list(dict.fromkeys(key[0] for key in found))
    figure, axes = plt.subplots(
        len(QUANTITIES), len(curves), figsize=(4.5 * len(curves), 7), squeeze=False
    )
    for row, (quantity, words) in enumerate(QUANTITIES.items()):
        for column, curve in enumerate(curves):
            axis = axes[row][column]
            for task, precision in dict.fromkeys(key[1:3] for key in found if key[0] == curve):
                line = {
                    k[3]: v[quantity] for k, v in found.items() if k[:3] == (curve, task, precision)
                }
                axis.plot(
                    list(line), list(line.values()), label=f"{task}, {precision}",
                    marker="o" if precision == "fp32" else "s",
                    linestyle="-" if precision == "fp32" else "--", color=f"C{TASKS.index(task)}",
                )  # fmt: skip
            if curve == "batch":
                axis.set_xscale("log", base=2)
            if curve == "processes":
                axis.tick_params(axis="x", labelrotation=20, labelsize=7)
            axis.set(xlabel=CURVES[curve], ylabel=words if column == 0 else "")
            axis.set_ylim(
                0, 1.05 * max(v[quantity] for k, v in found.items() if k[0] == curve) or 1
            )
            axis.legend(fontsize=7, handlelength=4, framealpha=0.5)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    try:
        figure.savefig(file, dpi=130)
    except (OSError, ValueError) as error:  # no such folder, no such format
        raise UserError(f"{file} cannot be drawn ({error})") from None
    print(f"plot: {file}")


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, seconds = p.add_argument, at_least(0.2, float)
    # fmt: off
    add("--json", required=True, metavar="FILE", help="all numbers; the same again goes on")
    add("--plot", metavar="FILE", help="its ending is its format (beside --json, as .png)")
    add("--curves", nargs="+", choices=list(CURVES), default=list(CURVES), help="(all)")
    add("--tasks", nargs="+", choices=TASKS, default=["forward", "ctc", "stage1"],
        help="of the first three curves (%(default)s)")
    add("--precision", nargs="+", choices=list(runtime.DTYPES), default=["fp32", "bf16"])
    add("--lengths", nargs="+", type=seconds, default=[2, 5, 10, 15, 20, 30], metavar="F")
    add("--batches", nargs="+", type=at_least(1), default=[1, 2, 4, 8, 16, 32, 64], metavar="N")
    add("--sizes", nargs="+", choices=list(SIZES), default=["small", "medium", "large"])
    add("--batch", type=at_least(1), default=4, metavar="N", help="elsewhere (%(default)s)")
    add("--seconds", type=seconds, default=5.0, metavar="F", help="elsewhere (%(default)s)")
    add("--size", choices=list(SIZES), default="small", help="elsewhere (%(default)s)")
    add("--most_audio", type=seconds, default=320.0, metavar="F",
        help="leave out steps over so many seconds of audio, both views counted, which is a limit "
             "of memory: size small takes about 20 MB a second in fp32 (%(default)s)")
    add("--threads", type=at_least(1), default=torch.get_num_threads(), metavar="N",
        help="of the first three curves (%(default)s)")
    add("--repeats", type=at_least(1), default=5, metavar="N", help="of a step (%(default)s)")
    add("--rounds", type=at_least(1), default=2, metavar="N", help="over all (%(default)s)")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto")
    # fmt: on
    return p.parse_args()


def main() -> int:
    args = arguments()
    device = runtime.setup(args.device).device
    for precision in args.precision:
        runtime.check_supported(precision, device)
    settings = {k: v for k, v in vars(args).items() if k not in ("json", "plot", "rounds")}
    settings["device"] = device.type
    content = {"about": about(device), "arguments": settings, "synthetic": True, "results": []}
    if Path(args.json).exists():
        try:
            content = json.loads(Path(args.json).read_text())
            there = content["arguments"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{args.json} is not a file of ours ({error!r})") from None
        if other := [f"--{k}" for k in settings if there.get(k) != settings[k]]:
            raise UserError(f"{args.json} was measured with other {', '.join(other)}; name another")
        content["results"] = [one for one in content["results"] if "error" not in one]
    done = {(*place(one), one["round"]) for one in content["results"]}
    plan = [(i, one) for i in range(args.rounds) for one in points(args, device.type)]
    todo = [(i, one) for i, one in plan if (*place(one), i) not in done]
    write_json(args.json, content)
    failed = {}
    for i, point in tqdm(todo, unit=" points", disable=not sys.stderr.isatty()):
        found = launch(point)
        found |= found.pop("encoders", {}).get("ours", {})
        content["results"].append({**point, "round": i, "commit": runtime.commit(), **found})
        write_json(args.json, content)
        if "error" in found:
            failed[place(point)] = found["error"]

    found = pooled(content["results"])
    print(
        "| curve | task | precision | at | s of audio / s | peak MB |\n|---|---|---|---|---:|---:|"
    )
    for key, one in found.items():
        numbers = f"{one['audio_per_second']:.1f} | {one['peak_mb']:.0f}"
        print(f"| {' | '.join(map(str, key))} | {numbers} |")
    for key, reason in failed.items():
        print(f"| {' | '.join(map(str, key))} | {reason} ||")
    cpu = (
        content["about"]["gpu"] or f"{content['about']['cores']} cores of {content['about']['cpu']}"
    )
    title = f"fairasr_min {content['about']['commit']}, synthetic audio, {cpu}"
    if found:
        draw(found, Path(args.plot or Path(args.json).with_suffix(".png")), title)
    return 1 if failed else 0


if __name__ == "__main__":
    runtime.run(main)
