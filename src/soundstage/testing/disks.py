"""A real disk of a few megabytes, to be filled to its last byte."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

__all__ = ["SmallDisk", "small_disk"]

BLOCK = bytes(4096)


@dataclass(frozen=True)
class SmallDisk:
    """Where it is mounted."""

    folder: Path

    @property
    def ballast(self) -> Path:
        """The file that takes the room."""
        return self.folder / "ballast"

    def fill(self, leave: int = 0) -> None:
        """Until at most `leave` bytes are left."""
        with contextlib.suppress(OSError), self.ballast.open("ab", buffering=0) as file:
            while self.free() - leave >= len(BLOCK):
                file.write(BLOCK * max(1, min((self.free() - leave) // len(BLOCK), 256)))

    def free(self) -> int:
        """Bytes that are left."""
        told = os.statvfs(self.folder)
        return told.f_bavail * told.f_frsize

    def relieve(self) -> None:
        """Give back all that was filled."""
        self.ballast.unlink(missing_ok=True)


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[SmallDisk]:
    """A disk in memory, mounted at a folder that is made. Raises OSError where that is not allowed."""
    sudo = [] if os.geteuid() == 0 else ["sudo", "-n"]
    if not shutil.which("mount") or (sudo and not shutil.which("sudo")):
        raise OSError(errno.EPERM, "mounting a small disk needs root, or sudo without a password")
    folder.mkdir(parents=True, exist_ok=True)
    options = f"size={megabytes}m,mode=777"
    done = subprocess.run(
        [*sudo, "mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True
    )
    if done.returncode:
        raise OSError(errno.EPERM, f"mounting a small disk failed: {done.stderr.strip()}; it needs root")
    try:
        yield SmallDisk(folder)
    finally:
        subprocess.run([*sudo, "umount", "-l", str(folder)], check=True)
