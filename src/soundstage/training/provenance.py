"""What a run records about itself: configuration, code and environment."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from soundstage.core.errors import ConfigError
from soundstage.training.config import TrainConfig, describe


def record(config: TrainConfig, folder: Path) -> None:
    """Write config.json, environment.json and diff.txt into the run's folder.

    Raises ConfigError when the folder holds a run of another network.
    """
    folder.mkdir(parents=True, exist_ok=True)
    described = describe(config)
    path = folder / "config.json"
    if path.exists() and any((folder / "checkpoints").glob("step-*")):
        before = json.loads(path.read_text())
        if before.get("model") != json.loads(json.dumps(described["model"])):
            raise ConfigError(f"out: {folder} holds a run of another model; choose another folder with out=")
    write_whole(path, json.dumps(described, indent=2) + "\n")
    write_whole(folder / "environment.json", json.dumps(environment(), indent=2) + "\n")
    write_whole(folder / "diff.txt", _git("diff", "HEAD") or "")


def environment() -> dict[str, Any]:
    """Versions, hardware, command and commit; `commit` is None outside a repository."""
    return {
        "command": " ".join(sys.argv),
        "commit": (_git("rev-parse", "HEAD") or "").strip() or None,
        "changed": bool((_git("status", "--porcelain") or "").strip()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def write_whole(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)


def _git(*arguments: str) -> str | None:
    """Output of git about the package's repository; None without git or repository."""
    here = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", "-C", str(here), *arguments], capture_output=True, text=True, check=True, timeout=20
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
