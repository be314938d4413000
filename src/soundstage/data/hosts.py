"""One host, as all worker processes of a machine see it: whose turn it is, and how many may ask at once.

A host is a folder with a few small files, locked by the kernel (flock): a lock ends with its process, even by kill -9.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from soundstage.data.flow import Transient

__all__ = ["Host", "locked"]

PAUSE = 0.02
LONGEST = 24 * 3600.0  # a date further away than this was written by another clock


class Host:
    """The state of a host under `folder`. patience: the longest wait in seconds before Transient is raised instead."""

    def __init__(self, folder: Path, name: str, patience: float = 600.0) -> None:
        self.name, self.patience = name, patience
        self.folder = folder / re.sub(r"[^a-z0-9.-]", "_", name.lower())
        self.folder.mkdir(parents=True, exist_ok=True)

    def turn(self, interval: float) -> None:
        """Wait until `interval` seconds after the last turn that any process took, and after any rest."""
        with locked(self.folder / "turn") as file:
            now = time.time()
            mine = max(now, _read(file, now))
            if mine - now > self.patience:
                raise Transient(f"{self.name} asked to be left alone for {mine - now:.0f} s", after=mine - now)
            _write(file, mine + interval)
        time.sleep(max(0.0, mine - time.time()))

    def rest(self, seconds: float) -> None:
        """Nobody asks this host for so long, because it said so."""
        with locked(self.folder / "turn") as file:
            now = time.time()
            _write(file, max(_read(file, now), now + min(seconds, LONGEST)))

    @contextmanager
    def slot(self, at_once: int) -> Iterator[None]:
        """Hold one of `at_once` places; waits for one, and raises Transient when that takes too long."""
        import fcntl

        until = time.monotonic() + self.patience
        paths = [self.folder / f"slot-{index}" for index in range(at_once)]
        while True:
            for path in random.sample(paths, len(paths)):
                with path.open("ab") as file:
                    try:
                        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    except BlockingIOError:
                        continue
                    yield
                    return
            if time.monotonic() > until:
                raise Transient(f"{self.name}: all {at_once} places were taken for {self.patience:.0f} s")
            time.sleep(PAUSE * (1 + random.random()))


@contextmanager
def locked(path: Path) -> Iterator[BinaryIO]:
    """The file, made where it is not there, open for reading and writing, and nobody else's meanwhile."""
    import fcntl

    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def _read(file: BinaryIO, now: float) -> float:
    file.seek(0)
    try:
        told = float(file.read().decode())
    except ValueError:
        return 0.0
    return told if told - now <= LONGEST else 0.0


def _write(file: BinaryIO, value: float) -> None:
    file.seek(0)
    file.truncate()
    file.write(repr(value).encode())
    file.flush()
