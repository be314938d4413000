"""Fetching what an item's URL names: whole, resumed where it was cut, and only what may be had."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from soundstage.core.errors import ConfigError
from soundstage.data.flow import Drop, Item, Poison, Transient
from soundstage.data.magic import HEAD, Kind, extent, sniff
from soundstage.data.origins import Origin, origin
from soundstage.data.parts import Part, held
from soundstage.data.sources.ytdlp import YtDlpFetch
from soundstage.data.store import SCRATCH
from soundstage.data.web import Cut, Manners, Refused, open_web

if TYPE_CHECKING:
    from soundstage.data.web import Web

__all__ = ["Fetch"]

CHECKSUMS = ("sha256", "sha1", "md5")
MEDIA = ("video", "audio", "image")
End = Literal["told", "untold", "cut"]


class _TooLarge(Exception):
    """More bytes than allowed; args: how many."""


@dataclass(frozen=True)
class Fetch:
    """Items with a "url" and no media become items with media; those with media pass as they are.

    parts: the folder of unfinished files and of what is known of hosts, shared by all workers of a machine and kept
    between attempts and runs ("parts" in the dataset folder unless told). media: what is wanted, of "video", "audio",
    "image"; anything else, such as a page that explains an error, is Poison. largest: bytes; a larger file is dropped
    as "too large". longest: seconds of one attempt, fewer than the runner allows it. resumes: requests in one attempt.
    pages: how items of yt-dlp are fetched.

    A fact "sha256", "sha1" or "md5" is checked; without one, a container that gives its own length (mp4, wav, avi, mkv,
    webm) must have it. The item gains "fetched": bytes, etag, type, and the last address where it was redirected.
    Drops: "robots", "noai", "forbidden" (401, 402, 403, 451), "gone" (404, 410), "too large". Nothing is done to get
    around a refusal. A proxy is used where the environment names one (http_proxy, https_proxy, no_proxy).
    """

    media: tuple[str, ...] = MEDIA
    largest: int = 16 << 30
    pages: YtDlpFetch = field(default=YtDlpFetch())
    parts: str | None = field(default=None, compare=False)
    manners: Manners = field(default=Manners(), compare=False)
    longest: float = field(default=3000.0, compare=False)
    resumes: int = field(default=30, compare=False)
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if wrong := set(self.media) - set(MEDIA):
            raise ConfigError(f"Fetch.media: {min(wrong)!r} is not one of {', '.join(MEDIA)}")

    def __call__(self, item: Item, folder: Path) -> Iterable[Item | Drop]:
        """The item with its media, or a Drop; raises Transient and Poison."""
        if "media" in item.files:
            return [item]
        url = item.facts.get("url")
        if not url:
            raise Poison("has neither media nor a url")
        parts = Path(self.parts) if self.parts else _beside(folder)
        try:
            with open_web(parts / "hosts", self.manners) as web:
                if item.facts.get("source") == "ytdlp":
                    return self.pages.fetch(item, folder, parts / "pages", web, self.manners, self.largest)
                with held(parts / "files", url) as part:
                    before = part.size
                    try:
                        return [self._fetched(item, part, folder, web)]
                    except Transient as error:
                        error.progressed = part.size > before
                        raise
                    except (Refused, Poison, _TooLarge):
                        part.discard()
                        raise
        except Refused as error:
            return [Drop(item.child(refused=error.why), error.reason)]
        except _TooLarge as error:
            return [Drop(item, "too large", float(error.args[0]))]

    def _fetched(self, item: Item, part: Part, folder: Path, web: Web) -> Item:
        """The whole file, moved from its part into `folder`."""
        facts = item.facts
        sums = {name: str(facts[name]).lower() for name in CHECKSUMS if facts.get(name)}
        source = origin(part.url, web)
        for again in (True, False):
            self._whole(source, part, bool(sums))
            wrong = [name for name, value in sums.items() if part.digest(name) != value]
            if not wrong:
                break
            if not again:
                raise Poison(f"{part.url}: its {wrong[0]} is {part.digest(wrong[0])}, not {sums[wrong[0]]} as listed")
            part.restart({})
        kind = self._kind(part)
        name = hashlib.sha256(part.url.encode()).hexdigest()[:16] + kind.suffix
        moved = source.at if source.at != part.url else None
        told = {"bytes": part.size, "etag": part.told.get("etag"), "type": part.told.get("type"), "at": moved}
        told = {key: value for key, value in told.items() if value}
        return item.child({"media": part.take(folder / name)}, fetched=told)

    def _whole(self, source: Origin, part: Part, checked: bool) -> None:
        """Ask until all bytes are there; raises Transient when no more come, and Poison when no more exist."""
        until, furthest, probed = time.monotonic() + self.longest, part.size, -1
        for _ in range(self.resumes):
            end = self._transfer(source, part, checked, until)
            size = part.size
            due = None if checked else extent(part.path)
            if end == "told" and (due is None or due <= size):
                return
            if end == "untold" and (checked or due == size):
                return
            if end == "untold" and due is None and (probed == size or part.validator is None):
                return
            if end != "cut":
                # by its own account the file goes on, or nobody said that it ended: ask for what may follow
                if probed == size:
                    raise Poison(f"{part.url}: is cut short where it lies; it has {size} bytes, and should have {due}")
                probed = size
            elif size <= furthest:
                if due == size:
                    return  # the server promised more than there is
                raise Transient(f"{part.url}: the connection ended after {size} bytes, and again no further")
            furthest = max(furthest, size)
        raise Transient(f"{part.url}: cut {self.resumes} times, at last after {part.size} bytes")

    def _transfer(self, source: Origin, part: Part, checked: bool, until: float) -> End:
        """One request, and what of its answer arrives. How it ended: as told, at a place nobody told, or cut."""
        with source.ask(part, checked) as told:
            if not told.start:
                part.restart(told.version)
            if told.total is not None and told.total > self.largest:
                raise _TooLarge(told.total)
            size, seen = part.size, part.size >= HEAD
            try:
                for chunk in told.pieces:
                    part.write(chunk)
                    size += len(chunk)
                    if size > self.largest:
                        raise _TooLarge(size)
                    if not seen and size >= HEAD:
                        self._kind(part)
                        seen = True
                    if time.monotonic() > until:
                        raise Transient(f"{part.url}: {self.longest:.0f} s were not enough; {size} bytes have come")
            except Cut:
                return "cut"
            if told.total is not None and size < told.total:
                return "cut"
            return "told" if told.total is not None or told.framed else "untold"

    def _kind(self, part: Part) -> Kind:
        """What the bytes are; raises Poison when that is not wanted."""
        size = part.size
        with part.path.open("rb") as file:
            head = file.read(HEAD)
        kind = sniff(head)
        if kind is not None and kind.medium in self.media:
            return kind
        if not size:
            raise Poison(f"{part.url}: is empty")
        what = "a page or text" if kind and kind.medium == "text" else kind.medium if kind else "of no known kind"
        raise Poison(f"{part.url}: is {what}, not {' or '.join(self.media)}; it begins with {head[:24]!r}")


def _beside(scratch: Path) -> Path:
    """The folder of unfinished files of the dataset whose scratch folder this is."""
    dataset = next((path.parent for path in scratch.parents if path.name == SCRATCH), scratch.parent)
    return dataset / "parts"
