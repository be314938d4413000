"""Pages of sites that yt-dlp understands: listed with their licence, and fetched, for items that may be had."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

from soundstage.core.errors import ConfigError, MissingExtra, RequestError
from soundstage.data.flow import Drop, Item, Poison, Transient
from soundstage.data.hosts import locked
from soundstage.data.magic import HEAD, sniff
from soundstage.data.sources.address import canonical
from soundstage.data.sources.rows import facts_of
from soundstage.data.web import BUSY, FORBIDDEN, GONE, Manners, Refused, Web, open_web, retry_after

__all__ = ["YtDlp", "YtDlpFetch"]

YoutubeDL: TypeAlias = Any  # whose own types are of its inside
PLAIN = {"generic", "html5"}  # extractors of a file that lies on the page's own or another plain site
TOLD = ("license", "title", "uploader", "channel", "description", "tags", "categories")


@dataclass(frozen=True)
class YtDlp:
    """What yt-dlp finds for an address (video, playlist, channel) or a search ("ytsearch20:glass bell").

    licence: of those that tell none. details: ask for each entry's own page, where its licence is told; without it the
    list is quick, and licences are unknown until fetching. options: as on yt-dlp's command line, such as
    ("--playlist-items", "1-50") or ("--download-archive", "FILE"), whose entries are left out; cookies and proxies are
    yours to give. An entry whose details cannot be had is listed all the same, with the reason under "trouble".
    """

    query: str
    licence: str | None = None
    details: bool = True
    options: tuple[str, ...] = ()
    parts: str | None = None
    manners: Manners = field(default=Manners(), compare=False)

    def __iter__(self) -> Iterator[Item]:
        where = Path(self.parts) / "hosts" if self.parts else None
        with open_web(where, self.manners) as web, _downloader(self.options, self.manners) as tool:
            try:
                top = _extract(tool, web, self.query)
            except (Refused, Poison, Transient) as error:
                raise RequestError(f"ytdlp: {error}") from None
            for entry in _leaves(top):
                if tool.in_download_archive(entry):
                    continue
                yield self._item(tool, web, entry, top)

    def _item(self, tool: YoutubeDL, web: Web, entry: Mapping[str, Any], top: Mapping[str, Any]) -> Item:
        trouble = {}
        flat = entry.get("_type") in ("url", "url_transparent")
        url = entry["url"] if flat else entry.get("webpage_url") or top.get("webpage_url") or self.query
        if flat and self.details:
            try:
                found = list(_leaves(_extract(tool, web, url)))
                entry = found[0] if len(found) == 1 else entry
            except (Refused, Poison, Transient) as error:
                trouble = {"trouble": str(error)}
        facts = _facts(entry, url) | trouble
        # several films of one page have one address
        if not flat and entry is not top:
            facts["entry"] = entry["id"]
        if self.licence is not None:
            facts.setdefault("licence", self.licence)
        return Item({}, {"source": "ytdlp", "url": canonical(url), **facts})


@dataclass(frozen=True)
class YtDlpFetch:
    """How items of yt-dlp are fetched. format: its format selector ("" for its own choice, the best).

    Formats of separate picture and sound are put together by ffmpeg, where that is installed; without it yt-dlp takes
    one that has both. options: as on its command line. An archive is no use here: the ledger knows what is done.
    """

    format: str = ""
    options: tuple[str, ...] = ()
    version: ClassVar[int] = 1

    def fetch(
        self, item: Item, folder: Path, parts: Path, web: Web, manners: Manners, largest: int
    ) -> list[Item | Drop]:
        """The item with its media; unfinished files stay in `parts`. Raises Refused, Transient and Poison."""
        url, entry = item.facts["url"], item.facts.get("entry")
        box = parts / sha256(f"{url} {entry}".encode()).hexdigest()
        box.mkdir(parents=True, exist_ok=True)
        special = {"format": self.format} if self.format else {}
        special |= {"outtmpl": {"default": str(box / "%(id).60B.%(ext)s")}, "max_filesize": largest}
        with (
            locked(box.with_suffix(".lock")),
            web.turn(url),
            _downloader(self.options, manners, special, archive=False) as tool,
        ):
            found = [each for each in _leaves(_extract(tool, web, url)) if entry in (None, each.get("id"))]
            if len(found) != 1:
                raise Poison(f"{url}: has {len(found)} films{f' called {entry}' if entry else ''}; list it with ytdlp:")
            info = found[0]
            if info.get("_type") in ("url", "url_transparent"):
                info = _extract(tool, web, info["url"])
            if info.get("is_live"):
                return [Drop(item, "live")]
            if info.get("extractor") in PLAIN:
                for each in info.get("requested_formats") or [info]:
                    web.check(each.get("url") or url)
            try:
                done = tool.process_ie_result(info, download=True)
            except Exception as error:
                raise _verdict(error, url) from None
            saved = [Path(each["filepath"]) for each in done.get("requested_downloads") or [] if "filepath" in each]
            if not saved or not saved[0].is_file():
                said = tool.params["logger"].lines
                if any("max-filesize" in line for line in said):
                    return [Drop(item, "too large")]
                raise Poison(f"{url}: yt-dlp saved no file; it said: {' / '.join(said[-2:]) or 'nothing'}")
            fetched = _fetched(item, info, done, saved[0], folder)
        shutil.rmtree(box, ignore_errors=True)
        return [fetched]


def _fetched(item: Item, info: Mapping[str, Any], done: Mapping[str, Any], saved: Path, folder: Path) -> Item:
    """The item with the file, moved into `folder`, and with what is now known and was not."""
    with saved.open("rb") as file:
        kind = sniff(file.read(HEAD))
    if kind is None or kind.medium == "text":
        saved.unlink()
        raise Poison(f"{item.facts['url']}: yt-dlp saved {kind.medium if kind else 'a file of no known kind'}")
    size = saved.stat().st_size
    target = folder / f"{sha256(item.facts['url'].encode()).hexdigest()[:16]}{kind.suffix}"
    shutil.move(saved, target)
    facts = {key: value for key, value in _facts(info, item.facts["url"]).items() if key not in item.facts}
    fetched = {"bytes": size, "by": "yt-dlp", "format": str(done.get("format_id") or "")}
    return item.child({"media": target}, **facts, fetched=fetched)


class _Lines:
    """What yt-dlp says, kept instead of printed."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def debug(self, line: str) -> None:
        self.lines = [*self.lines[-99:], line]

    info = warning = error = debug


def _downloader(
    words: tuple[str, ...], manners: Manners, special: Mapping[str, Any] | None = None, archive: bool = True
) -> YoutubeDL:
    """yt-dlp with the user's options and our manners: our own name, no borrowed browser, no invented country."""
    from optparse import OptParseError

    try:
        import yt_dlp
    except ImportError:
        raise MissingExtra("yt-dlp", "fetch") from None
    try:
        options: Any = yt_dlp.parse_options(list(words)).ydl_opts
    except (SystemExit, ValueError, OptParseError) as error:
        said = str(error).strip().rpartition("\n")[2]
        raise ConfigError(f"ytdlp options: yt-dlp does not understand {' '.join(words)!r}: {said}") from None
    options["http_headers"] = {"User-Agent": manners.agent} | (options.get("http_headers") or {})
    options["extractor_args"] = {"generic": {"impersonate": ["false"]}} | (options.get("extractor_args") or {})
    options |= {"quiet": True, "noprogress": True, "logger": _Lines(), "cachedir": False, "geo_bypass": False}
    options |= {"ignoreerrors": False, "extract_flat": "in_playlist", "retries": 3, "fragment_retries": 3}
    if options.get("socket_timeout") is None:
        options["socket_timeout"] = manners.timeout
    if not archive:
        options["download_archive"] = None
    settings: Any = options | dict(special or {})
    return yt_dlp.YoutubeDL(settings)


def _extract(tool: YoutubeDL, web: Web, address: str) -> dict[str, Any]:
    """What is said of an address, nothing downloaded; raises Refused, Transient and Poison."""
    if address.startswith(("http://", "https://")):
        web.check(address)
    try:
        found = tool.extract_info(address, download=False)
    except Exception as error:
        raise _verdict(error, address) from None
    if not found:
        raise Poison(f"{address}: yt-dlp found nothing there")
    return found


def _leaves(info: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The films of a list and of the lists in it."""
    if info.get("_type") in ("playlist", "multi_video"):
        for entry in info.get("entries") or []:
            if entry:
                yield from _leaves(entry)
    else:
        yield dict(info)


def _facts(info: Mapping[str, Any], url: str) -> dict[str, Any]:
    facts = facts_of({key: info.get(key) for key in TOLD}, url)
    name = info.get("extractor_key") or info.get("ie_key")
    return facts | ({"id": f"{name}:{info['id']}"} if name and info.get("id") else {})


def _verdict(error: Exception, url: str) -> Exception:
    """What one of yt-dlp's failures means for the item."""
    from yt_dlp.networking.exceptions import HTTPError, TransportError
    from yt_dlp.utils import DownloadError, ExtractorError, GeoRestrictedError, UnsupportedError

    if isinstance(error, (Refused, Transient, Poison)):
        return error
    chain: list[Any] = [error]
    while len(chain) < 10:
        last = chain[-1]
        inner = last.exc_info[1] if isinstance(last, DownloadError) and last.exc_info else None
        inner = inner or getattr(last, "cause", None) or last.__cause__ or last.__context__
        if inner is None or inner in chain:
            break
        chain.append(inner)
    words = " ".join(str(error).removeprefix("ERROR: ").split())
    for each in chain:
        if isinstance(each, HTTPError):
            if each.status in FORBIDDEN:
                return Refused("forbidden", url, f"answered {each.status}")
            if each.status in GONE:
                return Refused("gone", url, f"answered {each.status}")
            if each.status in BUSY or each.status >= 500:
                return Transient(
                    f"{url}: answered {each.status}", retry_after(each.response.headers.get("Retry-After"))
                )
            return Poison(f"{url}: answered {each.status}")
        if isinstance(each, (TransportError, TimeoutError, ConnectionError)):
            return Transient(f"{url}: {words}")
        if isinstance(each, GeoRestrictedError):
            return Refused("forbidden", url, words)
        if isinstance(each, UnsupportedError):
            return Poison(f"{url}: {words}")
    expected = [each for each in chain if isinstance(each, ExtractorError) and each.expected]
    if expected and "format is not available" not in words:
        return Refused("unavailable", url, words)
    return Poison(f"{url}: {words}")
