"""Asking the web politely: an honest name, robots rules, a rate per host, redirects followed one by one."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

from soundstage import __version__
from soundstage.core.errors import ConfigError, MissingExtra, SoundstageError
from soundstage.data.flow import Poison, Transient
from soundstage.data.hosts import LONGEST, Host, locked
from soundstage.data.robots import LARGEST, Rules, refusal

if TYPE_CHECKING:
    import httpx

__all__ = ["AGENT", "Cut", "Manners", "Refused", "Web", "chunks", "open_web", "retry_after"]

AGENT = f"soundstage/{__version__} (collects data sets; obeys robots.txt)"
HOPS = 10
FRESH = 24 * 3600.0  # seconds that rules of a host may be kept (RFC 9309, 2.4)
FORBIDDEN, GONE, BUSY = {401, 402, 403, 451}, {404, 410}, {407, 408, 425, 429}


class Refused(SoundstageError, PermissionError):
    """A site said no. reason: "robots", "noai", "forbidden" or "gone", as the funnel counts it; why: in words."""

    def __init__(self, reason: str, url: str, why: str) -> None:
        super().__init__(f"{url}: {why}")
        self.reason, self.why = reason, why


class Cut(Exception):
    """The connection ended before the answer did."""


@dataclass(frozen=True)
class Manners:
    """How we behave towards hosts.

    agent: who we say we are, NAME/VERSION (a way to reach you); rules are looked up under NAME. per_second: requests to
    one host. at_once: transfers from one host, of all processes of this machine. robots, noai: whether robots.txt and
    refusals of training are obeyed; switch them off only for a site of your own. timeout: seconds without a byte.
    patience: the longest wait for a turn in seconds; after a longer one is asked for, the item is tried again later.
    """

    agent: str = AGENT
    per_second: float = 4.0
    at_once: int = 2
    robots: bool = True
    noai: bool = True
    timeout: float = 30.0
    patience: float = 600.0

    def __post_init__(self) -> None:
        if self.per_second <= 0 or self.at_once < 1:
            raise ConfigError("Manners: per_second must be above 0, and at_once 1 or more")


class Web:
    """The web as one process sees it. folder: what all processes of a machine know of hosts."""

    def __init__(self, folder: Path, manners: Manners) -> None:
        self._folder, self._manners = folder, manners
        self._httpx = _import_httpx()
        # a connection serves one request: what a server sends beyond its answer must not begin the next one
        self._client = self._httpx.Client(
            headers={"User-Agent": manners.agent, "Accept": "*/*"},
            timeout=manners.timeout,
            limits=self._httpx.Limits(max_keepalive_connections=0),
        )
        self._rules: dict[str, tuple[float, Rules]] = {}

    def check(self, url: str) -> None:
        """Raise Refused where the rules of its host forbid an address."""
        if (self._manners.robots or self._manners.noai) and (found := self._refusal(url)):
            raise Refused(found[0], url, found[1])

    @contextmanager
    def get(self, url: str, headers: Mapping[str, str] | None = None) -> Iterator[httpx.Response]:
        """The answer (200, 206 or 416) of an address or of where it redirects to, its body not yet read.

        Every address on the way is asked only if its host's rules allow it. Raises Refused, Transient and Poison.
        """
        for _ in range(HOPS):
            self.check(url)
            with self._ask(url, headers or {}) as answer:
                if answer.is_redirect and "location" in answer.headers:
                    url = urljoin(url, answer.headers["location"])
                    continue
                self._accept(url, answer)
                yield answer
                return
        raise Poison(f"{url}: redirected more than {HOPS} times")

    def json(self, url: str) -> Any:  # noqa: ANN401
        """The JSON that an address answers with, asked up to five times; raises as get, and Poison for other text."""
        failure = Transient(f"{url}: could not be read")
        for tried in range(5):
            try:
                with self.get(url) as answer:
                    return json.loads(b"".join(chunks(answer)))
            except (json.JSONDecodeError, UnicodeDecodeError):
                raise Poison(f"{url}: is not JSON") from None
            except (Cut, Transient) as error:
                failure = Transient(f"{url}: {error}", getattr(error, "after", None))
            wait = failure.after if failure.after is not None else 2.0**tried
            if tried == 4 or wait > self._manners.patience:
                break
            time.sleep(wait)
        raise failure

    @contextmanager
    def turn(self, url: str) -> Iterator[Host]:
        """One of the places of an address's host, when it is our turn there."""
        place = urlsplit(url).netloc.rpartition("@")[2]
        host = Host(self._folder, place, self._manners.patience)
        rules = self._rules.get(_origin(url), (0.0, Rules()))[1]
        delay = rules.delay(self._manners.agent) if self._manners.robots else 0.0
        with host.slot(self._manners.at_once):
            host.turn(max(1 / self._manners.per_second, delay))
            yield host

    @contextmanager
    def _ask(self, url: str, headers: Mapping[str, str]) -> Iterator[httpx.Response]:
        """One request in its turn."""
        scheme, place = urlsplit(url)[:2]
        if scheme not in ("http", "https") or not place:
            raise Poison(f"{url}: is not an http address")
        with self.turn(url) as host, ExitStack() as stack:
            self._client.cookies.clear()
            try:
                request = self._client.build_request("GET", url, headers=dict(headers))
                answer = self._client.send(request, stream=True)
            except (self._httpx.InvalidURL, self._httpx.UnsupportedProtocol) as error:
                raise Poison(f"{url}: {error}") from None
            except self._httpx.TransportError as error:
                raise Transient(f"{url}: {_words(error)}") from None
            stack.callback(answer.close)
            if answer.status_code in BUSY or answer.status_code >= 500:
                after = retry_after(answer.headers.get("retry-after"))
                if after is not None:
                    host.rest(after)
                raise Transient(f"{url}: answered {answer.status_code}", after=after)
            yield answer

    def _accept(self, url: str, answer: httpx.Response) -> None:
        status = answer.status_code
        if status in FORBIDDEN:
            raise Refused("forbidden", url, f"answered {status}")
        if status in GONE:
            raise Refused("gone", url, f"answered {status}")
        if status not in (200, 206, 416):
            raise Poison(f"{url}: answered {status}")
        if self._manners.noai and (why := refusal(answer.headers.multi_items(), self._manners.agent)):
            raise Refused("noai", url, why)

    def _refusal(self, url: str) -> tuple[str, str] | None:
        found = self._of(url).refuses(url, self._manners.agent)
        switched_on = {"robots": self._manners.robots, "noai": self._manners.noai}
        return found if found and switched_on[found[0]] else None

    def _of(self, url: str) -> Rules:
        """The rules of an address's host: asked once a day by one of the processes, and kept for all."""
        origin = _origin(url)
        since, rules = self._rules.get(origin, (0.0, Rules()))
        if time.time() - since < FRESH:
            return rules
        folder = Host(self._folder, origin.replace("://", ".")).folder
        with locked(folder / "rules") as file:
            file.seek(0)
            try:
                since, *texts = json.loads(file.read())
                rules = Rules(*texts)
            except (ValueError, TypeError):
                since = 0.0
            if not 0 <= time.time() - since < FRESH:
                since = time.time()
                rules = Rules(self._text(f"{origin}/robots.txt"), self._text(f"{origin}/.well-known/tdmrep.json"))
                file.seek(0)
                file.truncate()
                file.write(json.dumps([since, rules.text, rules.reserved]).encode())
        self._rules[origin] = since, rules
        return rules

    def _text(self, url: str) -> str:
        """A site's file of rules; "" where it has none. Raises Transient where it cannot be known."""
        for _ in range(HOPS):
            with self._ask(url, {}) as answer:
                if answer.is_redirect and "location" in answer.headers:
                    url = urljoin(url, answer.headers["location"])
                    continue
                if answer.status_code != 200:
                    return ""
                body = bytearray()
                try:
                    for chunk in chunks(answer):
                        body += chunk
                        if len(body) > LARGEST:
                            break
                except Cut as error:
                    raise Transient(f"{url}: {error}") from None
                return bytes(body[:LARGEST]).decode("utf-8", "replace").removeprefix("\ufeff")
        return ""


def chunks(answer: httpx.Response) -> Iterator[bytes]:
    """The body of an answer in pieces, as it is meant where it was sent packed; raises Cut when it ends early."""
    httpx = _import_httpx()
    packed = answer.headers.get("content-encoding", "identity").lower() != "identity"
    try:
        yield from (answer.iter_bytes() if packed else answer.iter_raw())  # as it comes: nothing is held back
    except (httpx.TransportError, httpx.DecodingError) as error:
        raise Cut(_words(error)) from None


@contextmanager
def open_web(folder: Path | None, manners: Manners) -> Iterator[Web]:
    """The web for one process; with no folder, what is learned of hosts is forgotten afterwards."""
    import tempfile

    if folder is not None:
        yield _web(folder, manners, os.getpid())
        return
    with tempfile.TemporaryDirectory(prefix="soundstage-") as aside:
        yield Web(Path(aside), manners)


@lru_cache(maxsize=8)
def _web(folder: Path, manners: Manners, process: int) -> Web:  # noqa: ARG001 - connections belong to their process
    return Web(folder, manners)


def _origin(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


def retry_after(text: str | None) -> float | None:
    """Seconds that a Retry-After asks for, as a number or as a date."""
    if not text:
        return None
    try:
        seconds = float(text)
    except ValueError:
        try:
            date = parsedate_to_datetime(text)
        except ValueError:
            return None
        date = date if date.tzinfo else date.replace(tzinfo=UTC)
        seconds = (date - datetime.now(UTC)).total_seconds()
    return min(max(0.0, seconds), LONGEST)


def _words(error: Exception) -> str:
    return str(error) or type(error).__name__


def _import_httpx() -> Any:  # noqa: ANN401
    try:
        import httpx
    except ImportError:
        raise MissingExtra("httpx", "data") from None
    return httpx
