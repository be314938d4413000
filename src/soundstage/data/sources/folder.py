"""Media files in a folder, and in a bucket."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from soundstage.core.errors import ConfigError
from soundstage.data.flow import Item
from soundstage.data.remote import filesystem, listing
from soundstage.data.sources.rows import SIDECARS, beside, sidecar

__all__ = ["SUFFIXES", "Bucket", "Folder"]

VIDEO = ".mp4 .m4v .mov .mkv .webm .avi .mpg .mpeg .ts .m2ts .mts .flv .wmv .ogv .mxf .3gp .gif"
AUDIO = ".wav .flac .mp3 .m4a .aac .ogg .oga .opus .aiff .aif .caf .wma"
SUFFIXES = (*VIDEO.split(), *AUDIO.split())


@dataclass(frozen=True)
class Folder:
    """Media files under `path`, sub-folders too, in the order of their names.

    `clip.txt` beside `clip.mp4` is its caption; `clip.json` tells facts (url, licence, title, author, ...), and
    yt-dlp's `clip.info.json` is understood. licence: of the files that tell none. suffixes: of what is taken; hidden
    files and unfinished ones (.part) never are. Items know their path within the folder as "name".
    """

    path: str
    licence: str | None = None
    suffixes: tuple[str, ...] = SUFFIXES

    def __iter__(self) -> Iterator[Item]:
        root = Path(self.path).expanduser()
        if not root.is_dir():
            raise ConfigError(f"folder: {self.path} is not a folder; give one that holds media files")
        for path in sorted(root.rglob("*")):
            name = path.relative_to(root)
            if path.suffix.lower() in self.suffixes and not _hidden(name) and path.is_file():
                facts = {"source": "folder", "name": name.as_posix()} | sidecar(beside(path), str(path.with_suffix("")))
                yield Item({"media": path.absolute()}, _licensed(facts, self.licence))


@dataclass(frozen=True)
class Bucket:
    """Media files below a URL that fsspec knows (s3://bucket/prefix, memory://, gs://...), in the order of their names.

    Sidecar files as in Folder. licence: of the files that tell none.
    """

    url: str
    licence: str | None = None
    suffixes: tuple[str, ...] = SUFFIXES

    def __iter__(self) -> Iterator[Item]:
        found = [url for url, _ in listing(self.url)]
        if not found:
            raise ConfigError(f"bucket: there is nothing below {self.url}; check the name and your rights")
        files, _ = filesystem(self.url)
        there = set(found)
        for url in found:
            stem, dot, suffix = url.rpartition(".")
            name = url.removeprefix(self.url.rstrip("/")).lstrip("/") or url.rpartition("/")[2]
            if f"{dot}{suffix}".lower() not in self.suffixes or _hidden(PurePosixPath(name)):
                continue
            texts = {each: files.cat_file(stem + each).decode() for each in SIDECARS if stem + each in there}
            facts = {"source": "bucket", "name": name} | sidecar(texts, stem)
            if "url" in facts:
                facts["page"] = facts["url"]
            yield Item({}, _licensed(facts | {"url": url}, self.licence))


def _hidden(name: Path | PurePosixPath) -> bool:
    return any(part.startswith(".") for part in name.parts)


def _licensed(facts: dict[str, Any], licence: str | None) -> dict[str, Any]:
    return facts if licence is None else {"licence": licence} | facts
