"""Packing: items into WebDataset tars of about one size, and one Parquet manifest of them all.

Which item goes into which tar follows from the sorted ids alone, tar headers hold no time, owner or machine, and
nothing of a run enters a file: the same items give the same bytes, whatever happened on the way.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO, ClassVar, Literal

from soundstage.core.errors import ConfigError
from soundstage.data.flow import Drop, Item, Poison
from soundstage.data.manifest import MANIFEST, Manifest, Shard, read_manifest, rows_of, table_of
from soundstage.data.places import Place, place
from soundstage.media import decode
from soundstage.media.clip import Clip
from soundstage.media.errors import MediaError
from soundstage.media.probe import MediaInfo, probe

__all__ = ["Pack", "pack", "publish"]

BLOCK = tarfile.BLOCKSIZE
DRAFT = "packing.json"
"""While shards are put in place: those that are."""


@dataclass(frozen=True)
class Pack:
    """Gathers items into shards; what comes out is one item per shard, with files "shard" and "manifest".

    bytes: about so many a shard; num: at most so many samples. media: roles of the file that is packed, the first that
    an item has. also: further roles, by the extension they get. sound: how the sound is packed a second time, without
    loss (at 16 bits) and apart from the picture, so that it can be read alone; None = only within the film. An item
    with a file "sound" brings its own.
    """

    bytes: int = 10**9
    num: int = 1000
    media: tuple[str, ...] = ("view", "media")
    also: tuple[tuple[str, str], ...] = ()
    sound: Literal["flac", "wav"] | None = "flac"
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        for name in ("bytes", "num"):
            if getattr(self, name) < 1:
                raise ConfigError(f"Pack.{name}: {getattr(self, name)} is not at least 1")

    def groups(self, items: Sequence[Item]) -> Iterator[Sequence[Item]]:
        """Items in the order of their ids, cut where a shard is full."""
        group: list[Item] = []
        weight = 0
        for item in sorted(items, key=lambda item: item.id):
            if group and item.id == group[-1].id:
                raise ConfigError(f"Pack: item {item.id} is there twice; leave one of them out")
            size = sum(path.stat().st_size for path in self._files(item).values())
            if group and (weight + size > self.bytes or len(group) >= self.num):
                yield group
                group, weight = [], 0
            group.append(item)
            weight += size
        if group:
            yield group

    def gather(self, group: Sequence[Item], folder: Path) -> Iterator[Item | Drop]:
        """One shard with its part of the manifest; raises Poison for media that cannot be read."""
        shard, part = folder / "shard.tar", folder / "part.parquet"
        rows = []
        with shard.open("wb") as file:
            for item in group:
                rows.append(self._add(file, item, folder))
            file.write(b"\0" * 2 * BLOCK)
            file.write(b"\0" * (-file.tell() % tarfile.RECORDSIZE))
        with shard.open("rb") as file:
            digest = _digest(file)
        part.write_bytes(table_of(rows, [Shard("", shard.stat().st_size, digest, len(rows))]))
        facts = {"samples": len(rows), "first": group[0].id, "last": group[-1].id, "sha256": digest}
        yield Item({"shard": shard, "manifest": part}, facts)

    def _files(self, item: Item) -> dict[str, Path]:
        """The files to pack as they are, by extension."""
        role = next((role for role in self.media if role in item.files), None)
        if role is None:
            raise Poison(f"item {item.id} has no file {' or '.join(self.media)} to pack, only {', '.join(item.files)}")
        found = {item.files[role].suffix.lower().lstrip("."): item.files[role]}
        if self.sound and "sound" in item.files:
            found[item.files["sound"].suffix.lower().lstrip(".")] = item.files["sound"]
        return found | {ext: item.files[role] for role, ext in self.also if role in item.files}

    def _add(self, file: BinaryIO, item: Item, folder: Path) -> dict[str, Any]:
        """Append one sample; returns its row."""
        files = self._files(item)
        film = next(iter(files.values()))
        try:
            info = probe(film)
            if self.sound and info.video and info.audio and "sound" not in item.files:
                files[self.sound] = _sound(film, folder / f"sound.{self.sound}")
        except MediaError as error:
            raise Poison(f"item {item.id}: {error}") from error
        caption, facts = str(item.facts.get("caption") or ""), _json(item)
        members = [_member(file, item.id, ext, path.open("rb")) for ext, path in sorted(files.items())]
        members.append(_member(file, item.id, "json", io.BytesIO(facts)))
        members.append(_member(file, item.id, "txt", io.BytesIO(caption.encode())))
        if self.sound and self.sound in files and files[self.sound].parent == folder:
            files[self.sound].unlink()
        return {"key": item.id, "shard": "", "members": members, "caption": caption, **_row(item, info)}


def publish(shards: Iterable[Item], url: str | Path, name: str = "clips") -> Manifest:
    """Put the shards that `Pack` made at a URL as NAME-000000.tar onwards, with one manifest; returns it.

    Shards that are there already stay. What is there besides is removed, and the manifest is written last: where there
    is one, the set is whole. One process at a time.
    """
    ordered = sorted(shards, key=lambda item: item.facts["first"])
    if not ordered:
        raise ConfigError("pack: there is no item to pack; look where they went with soundstage data funnel")
    where = place(url)
    rows: list[dict[str, Any]] = []
    told = []
    for index, item in enumerate(ordered):
        path = item.files["shard"]
        shard = Shard(f"{name}-{index:06d}.tar", path.stat().st_size, item.facts["sha256"], item.facts["samples"])
        told.append(shard)
        rows += [{**row, "shard": shard.name} for row in rows_of(item.files["manifest"].read_bytes())]
    whole = table_of(rows, told)
    if where.size(MANIFEST) is not None and where.read(MANIFEST) == whole and _there(told, where):
        return read_manifest(url)
    where.sweep()
    known = _known(where)
    where.write(DRAFT, json.dumps(known).encode())
    where.remove(MANIFEST)
    for item, shard in zip(ordered, told, strict=True):
        if known.get(shard.name) != shard.sha256 or where.size(shard.name) != shard.bytes:
            where.put(shard.name, item.files["shard"])
            known[shard.name] = shard.sha256
            where.write(DRAFT, json.dumps(known).encode())
    for stale in sorted(set(where.names()) - {shard.name for shard in told}):
        if stale.endswith(".tar"):
            where.remove(stale)
    where.write(MANIFEST, whole)
    where.remove(DRAFT)
    return read_manifest(url)


def pack(items: Iterable[Item], url: str | Path, config: Pack | None = None, name: str = "clips") -> Manifest:
    """Committed items into shards at a URL, without a ledger: all in one go. Returns the manifest."""
    config = config or Pack()
    with TemporaryDirectory() as scratch:
        made = []
        for index, group in enumerate(config.groups(list(items))):
            folder = Path(scratch) / str(index)
            folder.mkdir()
            made += [item for item in config.gather(group, folder) if isinstance(item, Item)]
        return publish(made, url, name)


def _known(where: Place) -> dict[str, str]:
    """Digest by name of the shards that are there whole, as a manifest or a packing that was cut short tells."""
    if where.size(DRAFT) is not None:
        return json.loads(where.read(DRAFT))
    if where.size(MANIFEST) is not None:
        with suppress(ConfigError):
            return {shard.name: shard.sha256 for shard in read_manifest(where.url).shards}
    return {}


def _there(shards: Sequence[Shard], where: Place) -> bool:
    return all(where.size(shard.name) == shard.bytes for shard in shards)


def _member(file: BinaryIO, key: str, ext: str, source: BinaryIO) -> dict[str, Any]:
    """Append a file to the tar; returns where its bytes are."""
    with source:
        size = source.seek(0, io.SEEK_END)
        source.seek(0)
        header = tarfile.TarInfo(f"{key}.{ext}")
        header.size, header.mode = size, 0o644
        file.write(header.tobuf(tarfile.USTAR_FORMAT, errors="strict"))
        offset, digest = file.tell(), sha256()
        while block := source.read(2**20):
            digest.update(block)
            file.write(block)
        file.write(b"\0" * (-size % BLOCK))
    return {"ext": ext, "offset": offset, "size": size, "sha256": digest.hexdigest()}


def _sound(film: Path, target: Path) -> Path:
    """The sound of a film, from its own second 0 on, as a lossless file."""
    heard = decode.read(film, video=False)
    return Clip(wave=heard.wave, sample_rate=heard.sample_rate).save(target)


def _json(item: Item) -> bytes:
    told = {"key": item.id, "facts": dict(item.facts), "digests": dict(item.digests)}
    return json.dumps(told, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()


def _row(item: Item, info: MediaInfo) -> dict[str, Any]:
    """What the manifest says of a sample beside its bytes; measured on the very file that is packed."""
    facts, video, audio = item.facts, info.video, info.audio
    tags = [str(tag) for tag in facts.get("tags") or ()]
    return {
        "tags": tags,
        "category": str(facts.get("category") or (tags[0] if tags else "")),
        "duration": info.duration,
        "width": video.width if video else None,
        "height": video.height if video else None,
        "fps": str(video.fps) if video else None,
        "video_seconds": video.duration if video else None,
        "audio_seconds": audio.duration if audio else None,
        "sample_rate": audio.sample_rate if audio else None,
        "channels": audio.channels if audio else None,
        "licence": _text(facts.get("licence")),
        "source": _text(facts.get("source")),
        "url": _text(facts.get("url")),
        "facts": json.dumps(dict(facts), sort_keys=True, ensure_ascii=False, separators=(",", ":")),
    }


def _text(value: Any) -> str | None:  # noqa: ANN401
    return None if value is None else value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def _digest(file: BinaryIO) -> str:
    digest = sha256()
    while block := file.read(2**22):
        digest.update(block)
    return digest.hexdigest()
