"""A small synthetic corpus, made once, and a way to run the scripts as a user would."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(*command, cwd=None, code=0, **env):
    """Run a script of the repository; its standard output (and errors, if code is not 0)."""
    done = subprocess.run(
        [sys.executable, str(ROOT / command[0]), *map(str, command[1:])],
        cwd=cwd or ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout if code == 0 else done.stdout + done.stderr


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """Folder of a demo corpus of 60 + 16 + 40 utterances."""
    folder = tmp_path_factory.mktemp("corpus") / "demo"
    run("data/make_demo.py", "--out", folder, "--train", 60, "--dev", 16, "--test", 40)
    return folder
