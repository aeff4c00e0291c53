"""A small synthetic corpus, made once, and a way to run the scripts as a user would."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# on a CPU, where resumed runs end bitwise where others do, and on one thread
HERE = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def run(*command, cwd=None, code=0, **env):
    """Run a script of the repository; its standard output (and errors, if code is not 0)."""
    done = subprocess.run(
        [sys.executable, str(ROOT / command[0]), *map(str, command[1:])],
        cwd=cwd or ROOT,
        env={**os.environ, **HERE, **env},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout if code == 0 else done.stdout + done.stderr


def start_torchrun(*command, processes=2):
    """A script on several processes, as a user starts them."""
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}",
         "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0",
         str(ROOT / command[0]), *map(str, command[1:])],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, **HERE},
    )  # fmt: skip


def torchrun(*command, processes=2):
    """Exit code, and what all of them printed."""
    process = start_torchrun(*command, processes=processes)
    printed, _ = process.communicate(timeout=240)
    return process.returncode, printed


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """Folder of a demo corpus of 60 + 16 + 40 utterances."""
    folder = tmp_path_factory.mktemp("corpus") / "demo"
    run("data/make_demo.py", "--out", folder, "--train", 60, "--dev", 16, "--test", 40)
    return folder
