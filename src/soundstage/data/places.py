"""Where shards lie: a local folder, or any fsspec URL (s3://, gs://, memory://). Files appear whole or not at all."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from soundstage.data.remote import filesystem

AHEAD = 2**18
"""Bytes read at a time of a long member of a local file; a request elsewhere asks for eight times as many."""


class Place(Protocol):
    """A folder of files that are written once. small: a member up to so many bytes is better read whole, at once."""

    url: str
    small: int

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes: ...
    def put(self, name: str, path: Path) -> None: ...
    def write(self, name: str, whole: bytes) -> None: ...
    def size(self, name: str) -> int | None: ...
    def names(self) -> list[str]: ...
    def sweep(self) -> None: ...
    def remove(self, name: str) -> None: ...


def place(url: str | Path) -> Place:
    """The place that a path or URL names; nothing is asked of it yet. Raises MissingExtra without fsspec."""
    text = str(url)
    scheme, sign, rest = text.partition("://")
    if not sign:
        return Local(Path(text).expanduser())
    return Local(Path(rest)) if scheme == "file" else Remote(text)


class Local:
    """A folder. A read is one `pread`."""

    small = 2**20

    def __init__(self, folder: Path) -> None:
        self.folder, self.url = folder, str(folder)

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        """Bytes [offset, offset + size) of a file, or up to its end; fewer where it ends before."""
        handle = os.open(self.folder / name, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        try:
            size = os.fstat(handle).st_size - offset if size is None else size
            pieces, got = [], 0
            while got < size and (piece := os.pread(handle, min(size - got, 2**30), offset + got)):
                pieces.append(piece)
                got += len(piece)
        finally:
            os.close(handle)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def put(self, name: str, path: Path) -> None:
        """A file under a name: linked where it can be, else copied."""
        self.folder.mkdir(parents=True, exist_ok=True)
        aside = self._aside(name)
        aside.unlink(missing_ok=True)
        try:
            os.link(path, aside)
        except OSError:  # another file system, or one without links
            with path.open("rb") as source, aside.open("wb") as file:
                while block := source.read(2**22):
                    file.write(block)
                _sync(file)
        self._renamed(aside, name)

    def write(self, name: str, whole: bytes) -> None:
        """A file with this content."""
        self.folder.mkdir(parents=True, exist_ok=True)
        aside = self._aside(name)
        with aside.open("wb") as file:
            file.write(whole)
            _sync(file)
        self._renamed(aside, name)

    def size(self, name: str) -> int | None:
        """Bytes of a file, None where there is none."""
        path = self.folder / name
        return path.stat().st_size if path.is_file() else None

    def names(self) -> list[str]:
        """Of all whole files, sorted."""
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted(path.name for path in found if path.is_file() and not path.name.endswith(".part"))

    def sweep(self) -> None:
        """Remove what writers that died left behind."""
        for aside in self.folder.glob(".*.part") if self.folder.is_dir() else ():
            aside.unlink(missing_ok=True)

    def remove(self, name: str) -> None:
        """Without a word where it is not there."""
        (self.folder / name).unlink(missing_ok=True)

    def _aside(self, name: str) -> Path:
        return self.folder / f".{name}.{os.getpid()}.part"

    def _renamed(self, aside: Path, name: str) -> None:
        target = self.folder / name
        if target.exists() and target.samefile(aside):
            aside.unlink()  # two links to one file, which a rename would both leave
        else:
            aside.replace(target)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


class Remote:
    """A folder behind fsspec. Object stores show an object only when all of it has arrived; elsewhere it is renamed."""

    small = 2**24
    ATOMIC = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "az", "memory"})

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._files, self._root = filesystem(self.url)

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        """Bytes [offset, offset + size) of a file, or up to its end: one request."""
        return self._files.cat_file(self._path(name), start=offset, end=None if size is None else offset + size)

    def put(self, name: str, path: Path) -> None:
        """A file, uploaded under a name."""
        self._whole(name, lambda target: self._files.put_file(str(path), target))

    def write(self, name: str, whole: bytes) -> None:
        """A file with this content."""
        self._whole(name, lambda target: self._files.pipe_file(target, whole))

    def size(self, name: str) -> int | None:
        """Bytes of a file, None where there is none."""
        self._files.invalidate_cache()
        try:
            return int(self._files.info(self._path(name))["size"])
        except FileNotFoundError:
            return None

    def names(self) -> list[str]:
        """Of all whole files, sorted."""
        self._files.invalidate_cache()
        try:
            found = self._files.ls(self._root, detail=False)
        except FileNotFoundError:
            return []
        return sorted(name for path in found if not (name := path.rsplit("/", 1)[-1]).endswith(".part"))

    def sweep(self) -> None:
        """Remove what writers that died left behind."""
        for path in self._files.glob(f"{self._root.rstrip('/')}/*.part"):
            self._files.rm_file(path)

    def remove(self, name: str) -> None:
        """Without a word where it is not there."""
        if self.size(name) is not None:
            self._files.rm_file(self._path(name))

    def _whole(self, name: str, send: Callable[[str], object]) -> None:
        self._files.makedirs(self._root, exist_ok=True)
        if self.url.partition("://")[0] in self.ATOMIC:
            send(self._path(name))
            return
        aside = self._path(f"{name}.part")
        send(aside)
        self._files.mv(aside, self._path(name))

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["url"])


class Member:
    """A file within a file, bytes [offset, offset + size) of `name` in a place: media that is read where it lies."""

    def __init__(self, where: Place, name: str, offset: int, size: int, label: str) -> None:
        self.where, self.name, self.offset, self.size, self.label = where, name, offset, size, label
        self._held: bytes | None = None

    def read(self) -> bytes:
        """All of it, in one read."""
        return self.where.read(self.name, self.offset, self.size)

    def open_bytes(self) -> BinaryIO:
        """It as a file. A small one is read once, whichever of its streams are opened; a long one in blocks."""
        if self.size > self.where.small:
            return io.BufferedReader(_Range(self), AHEAD if isinstance(self.where, Local) else 8 * AHEAD)
        if self._held is None:
            self._held = self.read()
        return io.BytesIO(self._held)

    def __fspath__(self) -> str:
        return f"{self.where.url}/{self.name}/{self.label}"

    __str__ = __fspath__

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": None}


class _Range(io.RawIOBase):
    """A member as an unbuffered file."""

    def __init__(self, member: Member) -> None:
        self._member, self._at = member, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._member.size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:  # noqa: ANN401
        count = max(0, min(len(buffer), self._member.size - self._at))
        found = self._member.where.read(self._member.name, self._member.offset + self._at, count) if count else b""
        buffer[: len(found)] = found
        self._at += len(found)
        return len(found)
