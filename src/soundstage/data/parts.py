"""What of a file has come so far: bytes that outlive the attempt, and whose they are."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

__all__ = ["Part", "held"]

BOOT = Path("/proc/sys/kernel/random/boot_id")


@dataclass
class Part:
    """The beginning of a file. told: of the version that the bytes belong to, "etag", "modified", "type"."""

    path: Path
    url: str
    file: BinaryIO
    told: dict[str, str]

    @property
    def size(self) -> int:
        """Bytes there are."""
        self.file.flush()
        return os.fstat(self.file.fileno()).st_size

    @property
    def validator(self) -> str | None:
        """What If-Range may name: a strong ETag, or else the date of the last change."""
        etag = self.told.get("etag", "")
        if etag and not etag.startswith("W/"):
            return etag
        return self.told.get("modified") or None

    def restart(self, told: Mapping[str, str]) -> None:
        """Begin again with another version; the bytes go first, so that they never pass for those of the new one."""
        self.file.seek(0)
        self.file.truncate()
        self.told = dict(told)
        _save(self._notes, {"url": self.url, "boot": _boot(), **self.told})

    def write(self, chunk: bytes) -> None:
        """More bytes at the end."""
        self.file.write(chunk)

    def digest(self, name: str) -> str:
        """A checksum of all bytes, in hexadecimal. name: as hashlib has it."""
        self.file.flush()
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, name).hexdigest()

    def take(self, target: Path) -> Path:
        """Move the finished file to `target`."""
        self.file.flush()
        shutil.move(self.path, target)
        self._notes.unlink(missing_ok=True)
        return target

    def discard(self) -> None:
        """Forget everything."""
        self._notes.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)

    @property
    def _notes(self) -> Path:
        return self.path.with_suffix(".json")


@contextmanager
def held(folder: Path, url: str) -> Iterator[Part]:
    """The part of a URL, nobody else's meanwhile: a second process that wants it waits for its turn."""
    import fcntl

    key = hashlib.sha256(url.encode()).hexdigest()
    path = folder / key[:2] / f"{key}.part"
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not _same(file, path):
                continue  # it was taken away while this process waited
            told = _notes(path.with_suffix(".json"), url)
            part = Part(path, url, file, told or {})
            if told is None and part.size:
                part.restart({})
            file.seek(0, os.SEEK_END)
            try:
                yield part
            finally:
                if _same(file, path) and not part.size:
                    part.discard()
            return


def _same(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _notes(path: Path, url: str) -> dict[str, str] | None:
    """What was noted of the bytes; None where that is of another URL, or from before the machine last started.

    A process that dies leaves its bytes to the kernel, a machine that dies may leave a file longer than its content.
    """
    try:
        notes = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    if notes.pop("url", None) != url or notes.pop("boot", None) != _boot():
        return None
    return notes


def _save(path: Path, notes: Mapping[str, str]) -> None:
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(notes), encoding="utf-8")
    aside.replace(path)


def _boot() -> str:
    try:
        return BOOT.read_text(encoding="ascii").strip()
    except OSError:
        return ""
