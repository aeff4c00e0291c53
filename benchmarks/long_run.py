"""Memory and open files of a long run: they must be flat.

    python benchmarks/long_run.py --steps 5000

Runs stage 1 and stage 2 on a part of the demo corpus (synthetic voices) with a small model, worker
processes, an epoch every 12 steps and a checkpoint every 5, and reads what the system says of the
process: resident memory and open files, at ten moments.
"""

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

from kill import ROOT, begin, command, prepare


def steps_done(log: Path) -> int:
    lines = log.read_text().splitlines() if log.exists() else []
    return int(lines[-1].split('"step": ')[1].split(",")[0]) if lines else 0


def measure(pid: int) -> tuple[float, int]:
    """Resident MB, open files."""
    status = Path(f"/proc/{pid}/status").read_text()
    resident = int(status.split("VmRSS:")[1].split()[0]) / 1000
    return resident, len(list(Path(f"/proc/{pid}/fd").iterdir()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--corpus", type=Path, default=ROOT / "data" / "demo")
    parser.add_argument("--steps", type=int, default=5000)
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="long-run-"))
    prepare(args.corpus, work)
    print("| stage | steps | resident MB | open files |\n|---|---:|---:|---:|")
    for stage in (1, 2):
        out = work / f"stage-{stage}"
        arguments = command(stage, "1 process", work, out)
        arguments[arguments.index("--epochs") + 1] = str(args.steps // 12 + 1)
        process = begin([*arguments, "--num_workers", "1", "--max_steps", str(args.steps)], out)
        due = args.steps // 10
        while process.poll() is None:
            try:
                done = steps_done(out / "log.jsonl")
                if done >= due:
                    print(f"| {stage} | {done} | {{:.0f}} | {{}} |".format(*measure(process.pid)))
                    sys.stdout.flush()
                    due += args.steps // 10
            except (OSError, IndexError):  # it has ended meanwhile
                pass
            time.sleep(0.2)
        if process.returncode:
            sys.exit(Path(f"{out}.output").read_text())
    shutil.rmtree(work)
    return 0


if __name__ == "__main__":
    sys.exit(main())
