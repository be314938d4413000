"""A web server on loopback that misbehaves as told, and writes down what it was asked for."""

from __future__ import annotations

import random
import re
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple, cast
from urllib.parse import urlsplit

__all__ = ["Asked", "Page", "Server", "film"]


def film(size: int, seed: int = 0) -> bytes:
    """An MP4 file of `size` bytes by its boxes; what is in them is noise."""
    head = _box(b"ftyp", b"isom\0\0\2\0isommp41") + _box(b"moov", b"")
    return head + _box(b"mdat", random.Random(seed).randbytes(size - len(head) - 8))


def _box(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(content), name) + content


class Asked(NamedTuple):
    """One request. span: its Range header; sent: bytes of body that went out; at: seconds on the monotonic clock."""

    path: str
    agent: str
    span: str
    status: int
    sent: int
    at: float


@dataclass
class Page:
    """What lies under a path, and how badly it is served. The lists hold one entry per request, the last one stays.

    cuts: bytes of body after which the connection ends (None = all). told: Content-Length of a whole answer where it
    is a lie. framing: "length", "chunked" or "close" (neither length nor chunks). ranges: whether Range is understood.
    etags: the ETag, "" for none. answers: (status, Retry-After) instead of the page, used up one by one. pace: seconds
    before every 16 KiB of body.
    """

    body: bytes = b""
    kind: str = "video/mp4"
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    cuts: list[int | None] = field(default_factory=lambda: [None])
    told: int | None = None
    framing: str = "length"
    ranges: bool = True
    etags: list[str] = field(default_factory=lambda: ["*"])
    answers: list[tuple[int, str | None]] = field(default_factory=list)
    pace: float = 0.0


class Server:
    """A server as a context manager: `with Server() as server: server.pages["/a.mp4"] = Page(...)`.

    pages may be keyed by path, or by path with its query; the latter goes first.
    """

    def __init__(self) -> None:
        self.pages: dict[str, Page] = {}
        self._log: list[Asked] = []
        self.most_at_once = 0
        self._now = 0
        self._lock = threading.Lock()
        self._server = _Quiet(("127.0.0.1", 0), _Handler)
        self._server.site = self
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> Server:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def asked(self) -> list[Asked]:
        """The requests in the order in which they ended, when none is under way."""
        until = time.monotonic() + 10
        while self._now and time.monotonic() < until:
            time.sleep(0.002)
        with self._lock:
            return list(self._log)

    def url(self, path: str = "") -> str:
        """The address of a path."""
        return f"http://127.0.0.1:{self._server.server_address[1]}{path}"

    def paths(self, *, rules: bool = False) -> list[str]:
        """The paths asked for, without those of robots rules unless wanted."""
        return [each.path for each in self.asked if rules or each.path not in RULES]

    def sent(self, path: str) -> int:
        """Bytes of body that went out for a path."""
        return sum(each.sent for each in self.asked if each.path == path)

    def _began(self) -> None:
        with self._lock:
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)

    def _ended(self, asked: Asked) -> None:
        with self._lock:
            self._now -= 1
            self._log.append(asked)


RULES = ("/robots.txt", "/.well-known/tdmrep.json")
PIECE = 1 << 14


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True
    site: Server

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ANN401
        """A client that hangs up is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: ANN401
        """Nothing is printed."""

    def do_GET(self) -> None:
        self._serve(body=True)

    def do_HEAD(self) -> None:
        self._serve(body=False)

    def _serve(self, *, body: bool) -> None:
        site, start = cast(_Quiet, self.server).site, time.monotonic()
        site._began()
        self._status, self._sent = 404, 0
        try:
            page = site.pages.get(self.path) or site.pages.get(urlsplit(self.path).path)
            if page is None:
                self._plain(404, {})
            elif page.answers:
                status, after = page.answers.pop(0)
                self._plain(status, {} if after is None else {"Retry-After": after})
            else:
                self._page(page, body)
        except OSError:
            self.close_connection = True
        finally:
            agent, span = self.headers.get("User-Agent", ""), self.headers.get("Range", "")
            site._ended(Asked(self.path, agent, span, self._status, self._sent, start))

    def _plain(self, status: int, headers: dict[str, str]) -> None:
        self._head(status, headers | {"Content-Length": "0"})

    def _page(self, page: Page, body: bool) -> None:
        cut, etag = _next(page.cuts), _next(page.etags)
        etag = f'"{sha256(page.body).hexdigest()[:12]}"' if etag == "*" else etag
        start, status = self._start(page, etag), page.status
        size = len(page.body)
        headers = {"Content-Type": page.kind} | ({"ETag": etag} if etag else {}) | page.headers
        if page.ranges:
            headers["Accept-Ranges"] = "bytes"
        if start is not None and start >= size:
            self._head(416, headers | {"Content-Range": f"bytes */{size}", "Content-Length": "0"})
            return
        if start is not None:
            status = 206
            headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
        content = page.body[start or 0 :]
        if page.framing == "length":
            headers["Content-Length"] = str(len(content) if page.told is None or start else page.told)
        elif page.framing == "chunked":
            headers["Transfer-Encoding"] = "chunked"
        else:
            headers["Connection"] = "close"
        self._head(status, headers)
        if body:
            self._body(page, content if cut is None else content[:cut], len(content))

    def _start(self, page: Page, etag: str) -> int | None:
        """The offset that is asked for and given; None when all is sent."""
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        condition = self.headers.get("If-Range")
        current = condition in (None, etag) or condition == page.headers.get("Last-Modified")
        return int(match[1]) if match and page.ranges and current and page.status == 200 else None

    def _body(self, page: Page, content: bytes, whole: int) -> None:
        for at in range(0, len(content), PIECE):
            if page.pace:
                time.sleep(page.pace)
            piece = content[at : at + PIECE]
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece) if page.framing == "chunked" else piece)
            self._sent += len(piece)
        self.wfile.flush()
        if len(content) < whole or page.told is not None or page.framing == "close":
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_WR)
        elif page.framing == "chunked":
            self.wfile.write(b"0\r\n\r\n")

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self._status = status
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


def _next(values: list[Any]) -> Any:  # noqa: ANN401
    """The first of a list, which goes unless it is the last."""
    return values.pop(0) if len(values) > 1 else values[0]
