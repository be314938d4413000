"""One address for one thing: the canonical form of a URL, and the first sieve of duplicates."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
from urllib.parse import urlsplit, urlunsplit

from soundstage.core.errors import ConfigError
from soundstage.data.flow import Drop, Item

__all__ = ["OncePerAddress", "canonical"]

PORTS = {"http": 80, "https": 443}
# What tells who followed a link from where, and never which file is meant.
TRACKING = re.compile(r"utm_\w+|fbclid|gclid|dclid|gbraid|wbraid|msclkid|yclid|igshid|mc_[ce]id|_ga|_gl|srsltid")
UNRESERVED = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")
YOUTUBE = {"youtube.com", "m.youtube.com", "music.youtube.com", "www.youtube.com", "youtu.be"}


def canonical(url: str) -> str:
    """The one spelling of an address: two with the same spelling are the same thing.

    Lower-case scheme and host (IDNA), no default port, no user, no fragment, dot segments resolved, escapes in one
    form, tracking parameters gone, the others in order. Other schemes than http keep their path as it is, since there
    it is a key. Raises ConfigError for what is no absolute URL.
    """
    text = url.strip()
    try:
        parts = urlsplit(text)
        scheme, host, port = parts.scheme.lower(), (parts.hostname or "").rstrip("."), parts.port
    except ValueError as error:
        raise ConfigError(f"url: {url!r} is not an address ({error})") from None
    if not scheme or "://" not in text:
        raise ConfigError(f"url: {url!r} has no scheme; write it as https://host/path")
    if scheme not in PORTS:
        return f"{scheme}://{text.partition('://')[2]}"
    if not host:
        raise ConfigError(f"url: {url!r} names no host; write it as https://host/path")
    if not host.isascii():
        try:
            host = host.encode("idna").decode()
        except UnicodeError as error:
            raise ConfigError(f"url: {url!r} has an impossible host ({error})") from None
    path, query = _resolved(_escaped(parts.path, "/!$&'()*+,;=:@")), _ordered(_escaped(parts.query, "/?!$&'()*+,;=:@"))
    if host in YOUTUBE and (video := _youtube(host, path, query)):
        return video
    named = f"[{host}]" if ":" in host else host
    place = named if port in (None, PORTS[scheme]) else f"{named}:{port}"
    return urlunsplit((scheme, place, path, query, ""))


@dataclass(frozen=True)
class OncePerAddress:
    """Of items with one canonical URL, one goes on (one with a licence, where there is one), the others are dropped.

    Items without a URL are left alone. What has the same content under two addresses is found after fetching.
    """

    version: ClassVar[int] = 1

    def groups(self, items: Sequence[Item]) -> Iterable[Sequence[Item]]:
        """Items of one address each; those without one by themselves."""
        found: dict[str, list[Item]] = defaultdict(list)
        for item in items:
            url = item.facts.get("url")
            found[canonical(url) if url else f"item {item.id}"].append(item)
        return list(found.values())

    def gather(self, group: Sequence[Item], folder: Path) -> Iterable[Item | Drop]:  # noqa: ARG002
        """The one that stays, then a Drop("same address") for each other."""
        kept, *others = sorted(group, key=lambda item: (not item.facts.get("licence"), item.id))
        yield kept
        for item in others:
            yield Drop(item, "same address")


def _escaped(text: str, kept: str) -> str:
    """Escapes in one form: plain where they need not be, upper-case hexadecimal where they must."""

    def one(match: re.Match[str]) -> str:
        character = chr(int(match[1], 16))
        return character if character in UNRESERVED else match[0].upper()

    text = re.sub(r"%([0-9A-Fa-f]{2})", one, text)
    allowed = UNRESERVED | set(kept) | {"%"}
    return "".join(c if c in allowed else "".join(f"%{byte:02X}" for byte in c.encode()) for c in text)


def _resolved(path: str) -> str:
    """A path without "." and ".." (RFC 3986, 5.2.4)."""
    out: list[str] = []
    segments = path.split("/")[1:] or [""]
    for segment in segments:
        if segment == "..":
            out = out[:-1]
        elif segment != ".":
            out.append(segment)
    if segments[-1] in (".", ".."):
        out.append("")
    return "/" + "/".join(out)


def _ordered(query: str) -> str:
    """Parameters by name, without those of trackers; the values are left as they are."""
    kept = [each for each in query.split("&") if each and not TRACKING.fullmatch(each.partition("=")[0].lower())]
    return "&".join(sorted(kept, key=lambda each: each.partition("=")[0]))


def _youtube(host: str, path: str, query: str) -> str:
    """The page of one video, which has many addresses; "" for any other page."""
    if host == "youtu.be":
        video = path[1:]
    elif path == "/watch":
        video = next((each[2:] for each in query.split("&") if each.startswith("v=")), "")
    else:
        video = path.split("/")[2] if path.startswith(("/shorts/", "/embed/", "/live/")) else ""
    return f"https://www.youtube.com/watch?v={video}" if re.fullmatch(r"[\w-]{6,}", video) else ""
