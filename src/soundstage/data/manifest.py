"""The manifest of a set of shards: one Parquet file that says of every sample where its bytes are and what is known.

A row is a sample; `members` says for each of its files ("mp4", "flac", "txt", "json") at which byte of the shard it
begins, how long it is and its SHA-256, so that any of them is one read. What is true of whole shards (names, bytes,
SHA-256) is in the file's own metadata, as JSON under "soundstage".
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from soundstage.core.errors import ConfigError, MissingExtra
from soundstage.data.places import Member, Place, place

__all__ = ["FILM", "MANIFEST", "SOUND", "Manifest", "Shard", "read_manifest", "table_of"]

MANIFEST = "manifest.parquet"
FILM = ("mp4", "mov", "mkv", "webm", "avi", "m4v", "gif")
SOUND = ("flac", "wav", "ogg", "opus", "mp3", "m4a")
"""Extensions of what is looked at and of what is listened to, the best first."""
ABOUT = b"soundstage"
FORMAT = 1


@dataclass(frozen=True)
class Shard:
    """One tar. samples: how many it holds."""

    name: str
    bytes: int
    sha256: str
    samples: int


def arrow() -> Any:  # noqa: ANN401
    """pyarrow with its parquet module. Raises MissingExtra."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtra("pyarrow", "data") from error
    return pyarrow


def schema() -> Any:  # noqa: ANN401
    """Columns of the manifest. NULL where it is not known, such as the height of a sound."""
    pa = arrow()
    member = pa.struct(
        [("ext", pa.string()), ("offset", pa.int64()), ("size", pa.int64()), ("sha256", pa.string())],
    )
    return pa.schema(
        [
            ("key", pa.string()),
            ("shard", pa.string()),
            ("members", pa.list_(member)),
            ("caption", pa.string()),
            ("tags", pa.list_(pa.string())),
            ("category", pa.string()),
            ("duration", pa.float64()),
            ("width", pa.int32()),
            ("height", pa.int32()),
            ("fps", pa.string()),
            ("video_seconds", pa.float64()),
            ("audio_seconds", pa.float64()),
            ("sample_rate", pa.int32()),
            ("channels", pa.int32()),
            ("licence", pa.string()),
            ("source", pa.string()),
            ("url", pa.string()),
            ("facts", pa.string()),
        ]
    )


def table_of(rows: Sequence[Mapping[str, Any]], shards: Sequence[Shard]) -> bytes:
    """A manifest as a Parquet file; the same rows give the same bytes."""
    pa = arrow()
    about = {"format": FORMAT, "shards": [asdict(shard) for shard in shards]}
    columns = schema().with_metadata({ABOUT: json.dumps(about, sort_keys=True).encode()})
    out = io.BytesIO()
    pa.parquet.write_table(pa.Table.from_pylist(list(rows), schema=columns), out, compression="zstd")
    return out.getvalue()


def rows_of(whole: bytes) -> list[dict[str, Any]]:
    """The rows of a manifest, or of a part of one."""
    pa = arrow()
    return pa.parquet.read_table(pa.BufferReader(whole)).to_pylist()


class Manifest:
    """What shards hold. Columns are read when they are asked for."""

    def __init__(self, where: Place, whole: bytes) -> None:
        pa = arrow()
        self.place = where
        try:
            self._file = pa.parquet.ParquetFile(pa.BufferReader(whole))
            about = json.loads(self._file.schema_arrow.metadata[ABOUT])
            self.shards = tuple(Shard(**shard) for shard in about["shards"])
        except (pa.ArrowInvalid, KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{where.url}/{MANIFEST}: is no manifest of shards ({error}); pack them again") from error
        if about["format"] != FORMAT:
            raise ConfigError(f"{where.url}/{MANIFEST}: has format {about['format']}, this version reads {FORMAT}")
        self._columns: dict[str, Any] = {}

    def __len__(self) -> int:
        return self._file.metadata.num_rows

    @property
    def urls(self) -> list[str]:
        """Of the shards, in order: what webdataset.WebDataset takes."""
        return [f"{self.place.url}/{shard.name}" for shard in self.shards]

    @cached_property
    def key(self) -> str:
        """Names the content: the same for the same shards, wherever they are."""
        from hashlib import sha256

        return sha256(json.dumps([shard.sha256 for shard in self.shards]).encode()).hexdigest()

    @property
    def names(self) -> list[str]:
        """Of the columns."""
        return self._file.schema_arrow.names

    def column(self, name: str) -> Any:  # noqa: ANN401
        """A column as an Arrow array."""
        if name not in self._columns:
            self._columns[name] = self._file.read([name]).column(name).combine_chunks()
        return self._columns[name]

    def texts(self, name: str) -> list[str]:
        """A column of texts, "" where one is missing."""
        return [text or "" for text in self.column(name).to_pylist()]

    def numbers(self, name: str) -> np.ndarray:
        """A column of numbers as float64, nan where one is missing."""
        # not by Arrow's own cast, which imports what takes longer than the first clip's decoding
        return self.column(name).to_numpy(zero_copy_only=False).astype(np.float64)

    def row(self, index: int) -> dict[str, Any]:
        """All of one sample."""
        return {name: self.column(name)[index].as_py() for name in schema().names}

    def members(self, index: int) -> dict[str, Member]:
        """The files of one sample, by extension; nothing is read yet."""
        key, shard = self.column("key")[index].as_py(), self.column("shard")[index].as_py()
        return {
            found["ext"]: Member(self.place, shard, found["offset"], found["size"], f"{key}.{found['ext']}")
            for found in self.column("members")[index].as_py()
        }

    def rows(self) -> Iterator[dict[str, Any]]:
        """Every sample, in the order of the shards."""
        for batch in self._file.iter_batches(4096):
            yield from batch.to_pylist()


def read_manifest(url: str | Path) -> Manifest:
    """The manifest of the shards at a URL. Raises ConfigError where there is none."""
    where = place(url)
    if where.size(MANIFEST) is None:
        held = "shards but no manifest: the packing did not end" if where.names() else "no shards"
        raise ConfigError(f"{url}: holds {held}; run soundstage data pack, or give the folder it wrote")
    return Manifest(where, where.read(MANIFEST))
