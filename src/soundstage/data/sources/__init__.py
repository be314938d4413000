"""Where items come from: folders and buckets, lists of addresses, shops, and what yt-dlp finds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from soundstage.core.errors import ConfigError
from soundstage.data.flow import Item
from soundstage.data.remote import is_remote
from soundstage.data.sources.address import OncePerAddress, canonical
from soundstage.data.sources.folder import Bucket, Folder
from soundstage.data.sources.shop import Shop
from soundstage.data.sources.urls import LISTS, Links, Urls
from soundstage.data.sources.ytdlp import YtDlp

__all__ = ["Bucket", "Folder", "Links", "OncePerAddress", "Shop", "Source", "Urls", "YtDlp", "canonical", "parse"]

KINDS = ("folder", "urls", "shop", "ytdlp")


class Source(Protocol):
    """A frozen dataclass whose iteration gives items, in the same order each time; nothing is downloaded for them."""

    def __iter__(self) -> Iterator[Item]: ...


def parse(text: str, **settings: Any) -> Source:  # noqa: ANN401
    """The source that a word of the command line means.

    "folder:PATH" or the path of a folder; "urls:LIST" or the path of a list; "shop:https://..."; "ytdlp:ADDRESS" or
    "ytdlp:ytsearch20:WORDS"; "s3://bucket/prefix" and other URLs of fsspec; "https://..." for one file.
    settings: fields of the source, such as licence. Raises ConfigError.
    """
    source = _parsed(text.strip())
    try:
        return replace(source, **settings)  # pyright: ignore[reportArgumentType]
    except TypeError:
        names = ", ".join(sorted(settings))
        raise ConfigError(f"source {text!r}: a {type(source).__name__} has no setting among {names}") from None


def _parsed(text: str) -> Folder | Bucket | Urls | Links | Shop | YtDlp:
    kind, colon, rest = text.partition(":")
    if colon and kind in KINDS:
        if not rest:
            raise ConfigError(f"source {text!r}: nothing follows the colon; write {kind}:WHAT")
        return {"folder": Folder, "urls": Urls, "shop": Shop, "ytdlp": YtDlp}[kind](rest)
    named_list = text.lower().removesuffix(".gz").endswith(LISTS)
    if is_remote(text):
        return Urls(text) if named_list else Bucket(text)
    if text.startswith(("http://", "https://")):
        return Links((text,))
    path = Path(text).expanduser()
    if path.is_dir():
        return Folder(text)
    if path.is_file() and named_list:
        return Urls(text)
    if path.exists():
        raise ConfigError(f"source {text!r}: is neither a folder nor a list ({', '.join(LISTS)}, .gz too)")
    kinds = ", ".join(f"{each}:" for each in KINDS)
    raise ConfigError(f"source {text!r}: there is no such folder or list; others begin with {kinds}, s3:// or https://")
