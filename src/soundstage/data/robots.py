"""What a site says to machines: robots.txt (RFC 9309), its content signals, and the headers of a single answer."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from soundstage.core.errors import MissingExtra

__all__ = ["Rules", "refusal", "token"]

LARGEST = 500 * 1024  # bytes of a robots.txt that are read (RFC 9309, 2.5)
# Directives of X-Robots-Tag and of its kin that a data set has to obey.
REFUSALS = {"noai", "noimageai", "noml", "noindex", "noimageindex", "none"}
NO_TRAINING = re.compile(r"\b(?:ai-train|train-ai)\s*=\s*(?:no?)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Rules:
    """The rules of one host. text: its robots.txt ("" where there is none); reserved: its tdmrep.json, as text."""

    text: str = ""
    reserved: str = ""

    def refuses(self, url: str, agent: str) -> tuple[str, str] | None:
        """("robots" or "noai", the rule in words) when `agent` may not have `url`; None when it may.

        Raises MissingExtra.
        """
        if self.text and not _parsed(self.text).can_fetch(url, agent):
            return "robots", f"robots.txt disallows it for {token(agent)}"
        path = re.sub(r"^[^/]*//[^/]*", "", url) or "/"
        for prefix, line in _signals(self.text, token(agent)):
            if _matches(prefix, path):
                return "noai", f"robots.txt says {line!r}"
        for location in _reservations(self.reserved):
            if _matches(location, path):
                return "noai", f"tdmrep.json reserves {location}"
        return None

    def delay(self, agent: str) -> float:
        """Seconds between two requests that the host asks for; 0 where it asks for none."""
        if not self.text:
            return 0.0
        rules = _parsed(self.text)
        rate = rules.request_rate(agent)
        return max(rules.crawl_delay(agent) or 0.0, rate.seconds / rate.requests if rate and rate.requests else 0.0)


def token(agent: str) -> str:
    """The name by which rules call a user agent: "soundstage" of "soundstage/1.0 (...)"."""
    return re.split(r"[/\s]", agent, maxsplit=1)[0].lower()


def refusal(headers: Iterable[tuple[str, str]], agent: str) -> str | None:
    """The header of an answer that forbids to use it for training, in words; None where there is none.

    X-Robots-Tag (with or without an agent's name), TDM-Reservation, and Content-Usage or Content-Signal.
    """
    for name, value in headers:
        low = name.lower()
        if low == "x-robots-tag" and (found := _directives(value, token(agent)) & REFUSALS):
            return f"X-Robots-Tag: {', '.join(sorted(found))}"
        if low == "tdm-reservation" and value.strip() == "1":
            return "TDM-Reservation: 1"
        if low in ("content-usage", "content-signal") and NO_TRAINING.search(value):
            return f"{name}: {value}"
    return None


def _directives(value: str, name: str) -> set[str]:
    """Those of "noai, googlebot: noindex, nofollow" that speak to everyone or to `name`."""
    found, speaks = set(), True
    for each in value.lower().split(","):
        head, colon, rest = each.partition(":")
        if colon and head.strip() not in ("unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"):
            speaks, each = head.strip() in ("*", name), rest
        if speaks:
            found.add(each.strip())
    return found


@lru_cache(maxsize=256)
def _parsed(text: str) -> Any:  # noqa: ANN401
    try:
        from protego import Protego
    except ImportError:
        raise MissingExtra("protego", "data") from None
    return Protego.parse(text)


@lru_cache(maxsize=256)
def _signals(text: str, name: str) -> tuple[tuple[str, str], ...]:
    """(path, line) of the signals against training in the group of `name`, else in that of everyone."""
    groups: dict[str, list[tuple[str, str]]] = {}
    agents: list[str] = []
    heads = False
    for line in text.splitlines():
        field, colon, value = line.partition("#")[0].partition(":")
        field, value = field.strip().lower(), value.strip()
        if not colon:
            continue
        if field == "user-agent":
            agents = [*agents, value.lower()] if heads else [value.lower()]
            heads = True
            groups.setdefault(agents[-1], [])
            continue
        heads = False
        if field in ("content-signal", "content-usage") and NO_TRAINING.search(value):
            path = value.split()[0] if value.startswith("/") else "/"
            for agent in agents or ["*"]:
                groups.setdefault(agent, []).append((path, line.strip()))
    return tuple(groups.get(name, groups.get("*", [])))


@lru_cache(maxsize=256)
def _reservations(text: str) -> tuple[str, ...]:
    """Paths that a tdmrep.json reserves (TDM Reservation Protocol); none where it is not one."""
    try:
        rules = json.loads(text) if text else []
    except ValueError:
        return ()
    if not isinstance(rules, list):
        return ()
    return tuple(
        str(rule.get("location", "/"))
        for rule in rules
        if isinstance(rule, dict) and str(rule.get("tdm-reservation")) == "1"
    )


def _matches(pattern: str, path: str) -> bool:
    """Whether a path begins with a pattern of robots.txt's kind ("*" is anything, a final "$" the end)."""
    end = "$" if pattern.endswith("$") else ""
    parts = pattern.removesuffix("$").split("*")
    return re.match(".*".join(re.escape(each) for each in parts) + end, path) is not None
