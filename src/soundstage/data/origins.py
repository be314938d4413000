"""Bytes from an offset on: of a site, over HTTP, or of a store that fsspec knows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from soundstage.data.flow import Transient
from soundstage.data.parts import Part
from soundstage.data.remote import filesystem, is_remote, version_of
from soundstage.data.web import Cut, Refused, chunks

if TYPE_CHECKING:
    import httpx

    from soundstage.data.web import Web

__all__ = ["Origin", "Told", "origin"]

CHUNK = 1 << 20


@dataclass(frozen=True)
class Told:
    """An answer. start: the offset of its first byte; total: bytes of the whole file, where it was told.

    framed: whether the end of the answer can be told from a broken connection. version: "etag", "modified" and "type".
    pieces: the bytes; raises Cut when they end early.
    """

    start: int
    total: int | None
    framed: bool
    version: Mapping[str, str]
    pieces: Iterable[bytes]


class Origin(Protocol):
    """Where a file comes from. at: the address that answered, after redirects."""

    at: str

    def ask(self, part: Part, checked: bool) -> AbstractContextManager[Told]:
        """What is missing in a part; all of it where the part is of another version, or may be.

        checked: a checksum will be compared, so that bytes may be put together on trust. Raises Refused, Transient.
        """
        ...


def origin(url: str, web: Web) -> Origin:
    """The origin of an address."""
    return Store(url) if is_remote(url) else Site(url, web)


class Site:
    """A file on the web."""

    def __init__(self, url: str, web: Web) -> None:
        self.url = self.at = url
        self._web = web

    @contextmanager
    def ask(self, part: Part, checked: bool) -> Iterator[Told]:
        """GET with Range and If-Range where that can be trusted."""
        for start in (part.size if part.validator or checked else 0, 0):
            headers = {"Accept-Encoding": "identity"}
            if start:
                headers["Range"] = f"bytes={start}-"
                if part.validator:
                    headers["If-Range"] = part.validator
            with self._web.get(self.url, headers) as answer:
                self.at = str(answer.url)
                told = _told(answer, start, part)
                if told is not None:
                    yield told
                    return
        raise Transient(f"{self.url}: answers a plain request with {answer.status_code}")


class Store:
    """A file in an object store, or in any other file system of fsspec."""

    def __init__(self, url: str) -> None:
        self.url = self.at = url

    @contextmanager
    def ask(self, part: Part, checked: bool) -> Iterator[Told]:  # noqa: ARG002 - a store always tells its version
        """Open and seek."""
        with _failures(self.url):
            files, path = filesystem(self.url)
            files.invalidate_cache()
            info = files.info(path)
            version = {"etag": version_of(info)}
            if kind := info.get("ContentType"):
                version["type"] = str(kind)
            start = part.size if part.told.get("etag") == version["etag"] else 0
            with files.open(path, "rb", block_size=CHUNK, cache_type="none") as file:
                yield Told(start, info["size"], True, version, _read(file, start))


def _told(answer: httpx.Response, start: int, part: Part) -> Told | None:
    """What an answer to a request from `start` on means; None when it cannot be used and all must be asked for."""
    headers = answer.headers
    version = {"etag": headers.get("etag"), "modified": headers.get("last-modified")}
    version = {key: value for key, value in version.items() if value}
    span = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", headers.get("content-range", "").strip())
    total = int(span[2]) if span and span[2] != "*" else None
    if answer.status_code == 416:
        return Told(start, total, True, version, ()) if start and total == start else None
    if answer.status_code == 206:
        other = any(part.told.get(key, value) != value for key, value in version.items())
        if not start or span is None or span[1] != str(start) or other:
            return None
        return Told(start, total, True, version, chunks(answer))
    if headers.get("content-encoding", "identity").lower() != "identity":
        version, length = {}, None  # offsets and lengths would be those of the packed bytes
    else:
        length = headers.get("content-length")
    framed = "content-length" in headers or "chunked" in headers.get("transfer-encoding", "").lower()
    if kind := headers.get("content-type"):
        version["type"] = kind
    return Told(0, int(length) if length and length.isdigit() else None, framed, version, chunks(answer))


def _read(file: Any, start: int) -> Iterator[bytes]:  # noqa: ANN401
    try:
        file.seek(start)
        while piece := file.read(CHUNK):
            yield piece
    except (OSError, TimeoutError) as error:
        raise Cut(str(error)) from None


@contextmanager
def _failures(url: str) -> Iterator[None]:
    """What a store's failure means."""
    try:
        yield
    except (FileNotFoundError, IsADirectoryError):
        raise Refused("gone", url, "there is no such file") from None
    except Refused:
        raise
    except PermissionError as error:
        raise Refused("forbidden", url, str(error)) from None
    except OSError as error:
        raise Transient(f"{url}: {error}") from None
