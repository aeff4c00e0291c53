"""Kill stage 1 and stage 2 at random moments, start them again, compare bit by bit.

    python benchmarks/kill.py --kills 50

Each trial starts a short run on a part of the demo corpus (synthetic voices), kills the process and
all its children with SIGKILL, gives the same command again, and compares what is there with the
uninterrupted run: model, optimizer, counters, best score, result file and log (without its times).
The moment is drawn uniformly from the time that training took without interruption, in every tenth
trial from the time before it. The settings take turns: one process; workers with bf16 and
accumulation; two processes. Exit code 1 if any trial differs.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from fairasr_min import checkpoint  # noqa: E402
from fairasr_min.conformer import SIZES  # noqa: E402
from fairasr_min.model import ConformerCTC  # noqa: E402
from fairasr_min.text import normalize, train_tokenizer  # noqa: E402

SETTINGS = {
    "1 process": ["--batch_size", "8"],
    "workers, bf16, accumulation": [
        "--batch_size", "4", "--grad_accum", "2", "--precision", "bf16", "--num_workers", "2",
    ],
    "2 processes": ["--batch_size", "4"],
}  # fmt: skip
TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d",
            "--rdzv_endpoint=localhost:0"]  # fmt: skip


def prepare(corpus: Path, work: Path) -> None:
    """A part of the corpus, and a small recogniser with dropout to start from."""
    texts = []
    for name, count in (("train", 96), ("dev", 24)):
        lines = (corpus / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines[:: max(1, len(lines) // count)][:count]]
        for row in rows:
            row["audio_filepath"] = str((corpus / row["audio_filepath"]).resolve())
        texts += [normalize(row["text"]) for row in rows]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (work / f"{name}.jsonl").write_text(text, encoding="utf-8")
    config = replace(SIZES["tiny"], d_model=32, n_layers=2, dropout=0.1, dropout_att=0.1)
    tokenizer, _ = train_tokenizer(texts, 256)
    torch.manual_seed(0)
    weights = ConformerCTC(config, tokenizer).state_dict()
    checkpoint.save_model(work / "init.pt", "ctc", config, weights, tokenizer.model, {}, commit="")


def command(stage: int, setting: str, work: Path, out: Path) -> list[str]:
    script, manifest = [("train.py", "--manifest"), ("finetune.py", "--train_manifest")][stage - 1]
    parallel = TORCHRUN if setting == "2 processes" else []
    return [
        sys.executable, *parallel, str(ROOT / script), manifest, str(work / "train.jsonl"),
        "--init", str(work / "init.pt"), "--epochs", "4", "--save_every", "5", "--lr", "1e-3",
        "--out", str(out), *SETTINGS[setting],
    ]  # fmt: skip


def begin(arguments: list[str], out: Path) -> subprocess.Popen:
    with open(f"{out}.output", "ab") as output:
        return subprocess.Popen(
            arguments, stdout=output, stderr=output, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )


def kill_all(process: subprocess.Popen) -> bool:
    """SIGKILL for a process and all that it has started; whether it was still running."""
    running, family = process.poll() is None, [process.pid]
    for pid in family:  # grows while we go through it
        for children in Path("/proc").glob(f"{pid}/task/*/children"):
            try:
                family += map(int, children.read_text().split())
            except OSError:
                pass
    for pid in family:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    process.wait()
    return running


def outcome(out: Path):
    """All that a run leaves behind, but for times and its own path."""
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    (result,) = [out / n for n in ("pretrained.pt", "model.pt") if (out / n).exists()]
    result = torch.load(result, weights_only=True)
    for payload in (state, result):
        payload.pop("arguments")
    state.pop("log_size")
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return state, result, [{k: v for k, v in line.items() if k != "time"} for line in lines]


def same(a, b) -> bool:
    """Two nested structures, tensors equal bit by bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def timed(arguments: list[str], out: Path) -> tuple[float, float]:
    """Seconds of an uninterrupted run before and after it begins to train."""
    began = time.time()
    process = begin(arguments, out)
    if process.wait():
        sys.exit(Path(f"{out}.output").read_text())
    training = (out / "args.json").stat().st_mtime
    return training - began, time.time() - training


def trial(stage, setting, seconds, seed, work, expected) -> tuple[bool, str]:
    """Whether a killed run ended as the uninterrupted one, and when it was killed."""
    out = work / f"{stage}-{seed}"
    arguments = command(stage, setting, work, out)
    moment = random.Random(f"{stage} {seed}")
    while True:
        process = begin(arguments, out)
        if seed % 10 == 9:
            time.sleep(moment.uniform(0, seconds[0]))
        else:
            while not (out / "args.json").exists() and process.poll() is None:
                time.sleep(0.001)
            time.sleep(moment.uniform(0, seconds[1]))
        if kill_all(process):
            break
        shutil.rmtree(out)  # it had ended: another moment
    if not (out / "args.json").exists():
        when = "while starting"
    elif not any((out / name).exists() for name in ("checkpoint.pt", "previous.pt")):
        when = "before the first checkpoint"
    else:
        when = "after it"
    again = begin(arguments, out)
    ok = again.wait() == 0 and same(expected, outcome(out))
    if ok:
        shutil.rmtree(out)
    else:
        print(f"DIFFERS: stage {stage}, {setting}, killed {when}; see {out}", flush=True)
    return ok, when


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--corpus", type=Path, default=ROOT / "data" / "demo")
    parser.add_argument("--kills", type=int, default=50, help="for each stage (%(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="trials at a time (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="kill-"))
    prepare(args.corpus, work)
    plan = [(stage, list(SETTINGS)[i % 3], i) for stage in (1, 2) for i in range(args.kills)]
    uninterrupted = {}
    for stage, setting in dict.fromkeys(task[:2] for task in plan):
        out = work / f"whole-{len(uninterrupted)}"
        seconds = timed(command(stage, setting, work, out), out)
        uninterrupted[stage, setting] = seconds, outcome(out)

    def one(task):
        stage, setting, i = task
        seconds, expected = uninterrupted[stage, setting]
        return trial(stage, setting, seconds, args.seed + i, work, expected)

    with ThreadPoolExecutor(args.jobs) as pool:
        results = list(pool.map(one, plan))
    counts = Counter((task[0], task[1], when, ok) for task, (ok, when) in zip(plan, results))
    print("| stage | setting | killed | trials | the same in the end |\n|---|---|---|---:|---:|")
    for stage, setting, when in sorted({key[:3] for key in counts}):
        good, bad = counts[stage, setting, when, True], counts[stage, setting, when, False]
        print(f"| {stage} | {setting} | {when} | {good + bad} | {good} |")
    good = sum(ok for ok, _ in results)
    print(f"{good} of {len(results)} runs ended bitwise as the uninterrupted ones")
    if good == len(results):
        shutil.rmtree(work)
    return 0 if good == len(results) else 1


if __name__ == "__main__":
    sys.exit(main())
