"""Importing anything prints nothing, writes no file, opens no socket, starts no process and touches no GPU."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import importlib, sys, threading
import numpy, rich, safetensors.torch, torch, typer
import torch.utils.checkpoint, torch.nn.functional

seen = []
WATCHED = ("socket.", "subprocess.", "os.system", "os.mkdir", "os.remove", "os.rename", "shutil.", "tempfile.")

def watch(event, args):
    writes = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
    if writes or event.startswith(WATCHED):
        seen.append((current, event, str(args[:1])))

current = ""
before = threading.active_count()
sys.addaudithook(watch)
for current in sys.argv[1:]:
    importlib.import_module(current)
assert not seen, seen
assert threading.active_count() == before, threading.enumerate()
assert not torch.cuda.is_initialized()
"""


def test_importing_everything_has_no_side_effect(modules: dict[str, Path], tmp_path: Path) -> None:
    names = [name for name in modules if not name.endswith("__main__")]
    command = [sys.executable, "-B", "-W", "error", "-c", SCRIPT, *names]
    environment = {**os.environ, "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def test_the_root_and_the_command_line_load_without_torch(tmp_path: Path) -> None:
    script = (
        "import sys, soundstage, soundstage.cli.app; assert not {'torch', 'numpy', 'rich.console'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
