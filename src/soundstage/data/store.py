"""The files of a dataset folder, named by what they hold: written aside, made durable, renamed, never changed again."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import file_digest
from pathlib import Path

from soundstage.core.errors import SoundstageError
from soundstage.data.flow import Item, Poison

__all__ = ["DiskFull", "Store", "digest_of", "flush", "full_disk"]

STORE, SCRATCH = "store", "work"
FULL = (errno.ENOSPC, errno.EDQUOT)
NEARLY_FULL = 64 * 1024
"""Bytes left on a disk below which a failure of any kind is laid to the disk, not to the item."""
Ref = tuple[str, str, int, int]
"""Of a file: where it is (below the folder, or absolute for one that lies outside), SHA-256, bytes, time of change."""


class DiskFull(SoundstageError, RuntimeError):
    """There is no room left where the dataset is written."""

    def __init__(self, folder: object) -> None:
        super().__init__(
            f"{folder}: the disk is full; free some space and give the same command again: what is done stays done"
        )


class Store:
    """The files below one dataset folder. Several processes and hosts may put the same file at the same time."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder).absolute()

    def scratch(self, owner: str) -> Path:
        """The folder of all that a run writes beside the store."""
        return self.folder / SCRATCH / owner

    def put(self, item: Item, scratch: Path, moved: dict[Path, Ref]) -> tuple[Item, dict[str, Ref]]:
        """The item with a digest for each of its files, those in `scratch` moved into the store; and where they are.

        moved: what this call of a stage has moved already, since items may share a file; added to.
        """
        refs: dict[str, Ref] = {}
        for role, named in item.files.items():
            path = Path(named).absolute()
            refs[role] = moved[path] if path in moved else self._put(path, scratch, item.digests.get(role))
            if path.is_relative_to(scratch):
                moved[path] = refs[role]
        digests = {role: ref[1] for role, ref in refs.items()}
        return Item({role: self.folder / ref[0] for role, ref in refs.items()}, item.facts, digests), refs

    def _put(self, path: Path, scratch: Path, digest: str | None) -> Ref:
        if path.is_relative_to(self.folder / STORE):  # handed on by the stage; a stored file never changes
            name = str(path.relative_to(self.folder))
            return name, digest or path.name.partition(".")[0], path.stat().st_size, 0
        if not path.is_relative_to(scratch):
            told = path.stat()
            return str(path), digest or digest_of(path), told.st_size, told.st_mtime_ns
        with path.open("rb") as file:
            found = file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        size = path.stat().st_size
        name = f"{STORE}/{found[:2]}/{found}{_suffix(path)}"
        target = self.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        path.chmod(0o444)
        os.utime(path)  # cleaning spares what is young, also where an older copy of it is replaced
        path.replace(target)
        flush(target.parent)
        return name, found, size, 0

    def item(self, files: dict[str, list], facts: dict) -> Item:
        """An item from its record in the ledger."""
        return Item(
            {role: self.folder / ref[0] for role, ref in files.items()},
            facts,
            {role: ref[1] for role, ref in files.items()},
        )

    def check(self, files: dict[str, list]) -> None:
        """Raises Poison where a file outside the store is no longer the one that was collected."""
        for name, _, size, changed in files.values():
            if not changed:
                continue
            told = Path(name).stat()
            if (told.st_size, told.st_mtime_ns) != (size, changed):
                raise Poison(f"{name}: it changed since it was collected; collect it again")

    def shelves(self) -> Iterator[str]:
        """The folders of stored files, as "store/ab"."""
        root = self.folder / STORE
        if root.is_dir():
            yield from (f"{STORE}/{each.name}" for each in sorted(root.iterdir()) if each.is_dir())

    def drop_scratch(self, owner: str) -> None:
        """Remove what a run has left behind."""
        shutil.rmtree(self.scratch(owner), ignore_errors=True)


def digest_of(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


@contextmanager
def full_disk(folder: Path) -> Iterator[None]:
    """Tells DiskFull from other errors: by its number, or by what is left on the disk."""
    try:
        yield
    except DiskFull:
        raise
    except Exception as error:
        if is_full(error, folder):
            raise DiskFull(folder) from error
        raise


def is_full(error: BaseException | None, folder: Path) -> bool:
    """Is a full disk the cause of this error, or of any error (None) just now?"""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        error = error.__cause__ or error.__context__
    try:
        told = os.statvfs(folder)
    except OSError:
        return False
    return told.f_bavail * told.f_frsize < NEARLY_FULL


def _suffix(path: Path) -> str:
    found = re.fullmatch(r"\.[A-Za-z0-9]{1,15}", path.suffix)
    return path.suffix.lower() if found else ""


def flush(path: Path) -> None:
    """fsync a file or a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
