"""A worker's place on the disk: an empty folder for each call of a stage, and a note that outlives a sudden end."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from soundstage.data.store import Store

__all__ = ["Seat", "noted"]

NOTE = ".job"
WIDTH = 64
"""Bytes of a note, blanks at its end."""


class Seat:
    """Where one worker of a run works.

    sync: make notes visible to other hosts, at the cost of a write to the disk for each.
    """

    def __init__(self, store: Store, owner: str, name: str, *, sync: bool = False) -> None:
        self.folder = store.scratch(owner) / name
        self._note, self._sync = note_of(store, owner, name), sync
        self._handle = -1

    def begin(self, ticket: str) -> Path:
        """Note the job that is begun; its empty folder."""
        if self._handle < 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._handle = os.open(self._note, os.O_WRONLY | os.O_CREAT, 0o644)
        self._write(ticket)
        return self.folder

    def end(self) -> None:
        """The job is done with: remove what it left, and its note."""
        if self._handle >= 0:
            for left in list(os.scandir(self.folder)):
                if left.is_dir(follow_symlinks=False):
                    shutil.rmtree(left.path, ignore_errors=True)
                else:
                    Path(left.path).unlink(missing_ok=True)
            self._write("")

    def _write(self, text: str) -> None:
        os.pwrite(self._handle, text.encode().ljust(WIDTH), 0)  # of one length, so it can be read at any moment
        if self._sync:
            os.fsync(self._handle)


def note_of(store: Store, owner: str, name: str) -> Path:
    """The file of a seat's note."""
    return store.scratch(owner) / f"{name}{NOTE}"


def noted(store: Store, owner: str, name: str | None = None) -> set[str]:
    """The tickets that were worked on at a seat, or at all seats of a run."""
    folder = store.scratch(owner)
    paths = [note_of(store, owner, name)] if name is not None else list(folder.glob(f"*{NOTE}"))
    found = set()
    for path in paths:
        if path.exists():
            found.add(path.read_bytes().decode().strip())
    return found - {""}


def clear(store: Store, owner: str, name: str) -> None:
    """Remove a seat whose worker is gone."""
    note_of(store, owner, name).unlink(missing_ok=True)
    shutil.rmtree(store.scratch(owner) / name, ignore_errors=True)
