"""What a row of a list, a sidecar file or another tool's record says of an item, under our names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from soundstage.core.errors import ConfigError

__all__ = ["facts_of", "sidecar"]

# Our name for a column, by the names that other lists have for it; the first that is there counts.
NAMES = {
    "url": ("url", "webpage_url", "media_url", "contentUrl", "video_url", "link", "href"),
    "licence": ("licence", "license", "rights"),
    "caption": ("caption", "text", "TEXT", "prompt"),
    "title": ("title", "name"),
    "author": ("author", "creator", "artist", "uploader", "channel", "vendor"),
    "tags": ("tags", "keywords"),
    "sha256": ("sha256",),
    "sha1": ("sha1",),
    "md5": ("md5",),
}
KNOWN = {other for names in NAMES.values() for other in names}
# Facts that stages measure: a list that says them would pass for a measurement.
MEASURED = {"source", "span", "parent", "media", "scan", "sync", "hash", "embedding", "fetched", "refused"}
HEX = {"sha256": 64, "sha1": 40, "md5": 32}
# What yt-dlp writes beside a video (.info.json) is long; this is what says something of the content.
RECORD = ("webpage_url", "license", "title", "uploader", "channel", "description", "tags", "categories", "extractor")


def facts_of(row: Mapping[str, Any], where: str, *, others: bool = True) -> dict[str, Any]:
    """Facts of a row: known columns under our names, the others under their own. where: for errors, "list.csv:3".

    Empty values count as not told. Raises ConfigError for a column that only a stage may fill, or a bad checksum.
    """
    facts: dict[str, Any] = {}
    for ours, names in NAMES.items():
        value = next((row[name] for name in names if row.get(name) not in (None, "")), None)
        if value is not None:
            facts[ours] = value
    if others:
        facts |= {key: value for key, value in row.items() if key not in KNOWN and key and value not in (None, "")}
    if wrong := sorted(MEASURED & set(facts)):
        raise ConfigError(f"{where}: a list may not tell {wrong[0]!r}, which a stage measures; rename the column")
    for name, length in HEX.items():
        if name in facts:
            facts[name] = str(facts[name]).strip().lower()
            if len(facts[name]) != length or set(facts[name]) - set("0123456789abcdef"):
                raise ConfigError(f"{where}: {facts[name]!r} is not a {name} of {length} hexadecimal digits")
    if "caption" in facts:
        facts["caption"] = " ".join(str(facts["caption"]).split())
    if isinstance(facts.get("tags"), str):
        facts["tags"] = [tag.strip() for tag in facts["tags"].split(",") if tag.strip()]
    return facts


def sidecar(texts: Mapping[str, str], where: str) -> dict[str, Any]:
    """Facts of the files beside a media file, by suffix: ".txt" (the caption), ".json" (facts), ".info.json" (yt-dlp).

    Raises ConfigError for JSON that is broken or no object.
    """
    facts: dict[str, Any] = {}
    for suffix in (".info.json", ".json"):
        if suffix not in texts:
            continue
        try:
            row = json.loads(texts[suffix])
        except ValueError as error:
            raise ConfigError(f"{where}{suffix}: is not JSON ({error}); mend or remove it") from None
        if not isinstance(row, dict):
            raise ConfigError(f"{where}{suffix}: holds no object; write it as {{...}}")
        if suffix == ".info.json":
            row = {key: row[key] for key in RECORD if key in row}
        facts |= facts_of(row, f"{where}{suffix}")
    if caption := " ".join(texts.get(".txt", "").split()):
        facts["caption"] = caption
    return facts


SIDECARS = (".txt", ".json", ".info.json")


def beside(path: Path) -> dict[str, str]:
    """The texts of the sidecar files of a media file, by suffix."""
    found = {suffix: path.with_suffix(suffix) for suffix in SIDECARS}
    return {suffix: file.read_text(encoding="utf-8") for suffix, file in found.items() if file.is_file()}
