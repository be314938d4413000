"""Lint and types, so that `make test` alone says whether a change is clean."""

import subprocess
import sys
from pathlib import Path


def _run(*command: str, cwd: Path) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_ruff_has_nothing_to_say(root: Path) -> None:
    _run("ruff", "check", "--output-format", "concise", "--no-cache", ".", cwd=root)


def test_types_of_core_objectives_and_training(root: Path) -> None:
    _run("pyright", "--pythonpath", sys.executable, cwd=root)
