from __future__ import annotations

import hashlib
import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from soundstage.core.errors import ConfigError
from soundstage.data.flow import Item
from soundstage.data.manifest import read_manifest, table_of
from soundstage.data.shards import Pack, pack
from soundstage.data.validate import Problem, validate
from soundstage.media.clip import Clip

pytest.importorskip("pyarrow")


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    items = []
    for index in range(3):
        frames = np.full((8, 16, 16, 3), 40 * index, np.uint8)
        path = Clip(frames, Fraction(8), np.zeros((1, 16000), np.float32), 16000).save(tmp_path / f"{index}.mp4")
        items.append(Item({"media": path}, {"index": index}, {"media": hashlib.sha256(path.read_bytes()).hexdigest()}))
    pack(items, tmp_path / "s", Pack(num=2))
    return tmp_path / "s"


def test_a_whole_set(shards: Path) -> None:
    told: list[tuple[int, int]] = []
    report = validate(shards, progress=lambda done, of: told.append((done, of)))
    assert report.whole, report.problems
    assert (report.shards, report.samples, report.members, report.decoded) == (2, 3, 12, 3)
    assert report.bytes == sum(path.stat().st_size for path in shards.glob("*.tar"))
    assert told == [(1, 2), (2, 2)]


def changed(shards: Path, name: str, at: int, data: bytes) -> None:
    path = shards / name
    whole = bytearray(path.read_bytes())
    whole[at : at + len(data)] = data
    path.unlink()
    path.write_bytes(whole)


def test_exactly_what_is_wrong_is_said(shards: Path) -> None:
    manifest = read_manifest(shards)
    first, second = manifest.row(0), manifest.row(1)
    film = next(member for member in first["members"] if member["ext"] == "mp4")
    changed(shards, first["shard"], film["offset"] + film["size"] // 2, b"\xff\x00\xff")
    assert validate(shards).problems == (Problem(first["shard"], first["key"], ".mp4 differs from what was packed"),)
    assert validate(shards, hashes=False, decoded=0).whole
    text = next(member for member in second["members"] if member["ext"] == "json")
    changed(shards, first["shard"], text["offset"] - 512, b"other")
    assert [str(problem).split(": ")[1][:40] for problem in validate(shards, hashes=False, decoded=0).problems] == [
        ".json has a damaged tar header (bad chec"
    ]


def test_what_is_missing_cut_or_too_much(shards: Path) -> None:
    manifest = read_manifest(shards)
    last = manifest.shards[1].name
    whole = (shards / last).read_bytes()
    (shards / last).unlink()
    assert validate(shards, decoded=0).problems == (Problem(last, "", "is missing"),)
    (shards / last).write_bytes(whole[:1500])
    found = validate(shards, decoded=0).problems
    assert found[0] == Problem(last, "", f"has 1500 bytes instead of {len(whole)}")
    assert all("is cut off" in problem.what for problem in found[1:])
    assert len(found) >= 4
    (shards / last).write_bytes(whole)
    (shards / "clips-000009.tar").write_bytes(whole)
    assert "is no shard of the manifest" in validate(shards, decoded=0).problems[0].what
    (shards / "clips-000009.tar").unlink()
    changed(shards, last, len(whole) - 10, b"x")
    assert "outside of the files it holds" in validate(shards, decoded=0).problems[0].what


def test_a_film_that_never_was_one(shards: Path) -> None:
    """The bytes are those that were packed, and still nothing can be decoded."""
    manifest = read_manifest(shards)
    rows = list(manifest.rows())
    film = next(member for member in rows[0]["members"] if member["ext"] == "mp4")
    changed(shards, rows[0]["shard"], film["offset"], b"\0" * film["size"])
    film["sha256"] = hashlib.sha256(b"\0" * film["size"]).hexdigest()
    (shards / "manifest.parquet").write_bytes(table_of(rows, manifest.shards))
    first = validate(shards).problems
    assert [problem.what for problem in first] == ["differs from what was packed, outside of the files it holds"]
    told = [
        type(shard)(
            shard.name, shard.bytes, hashlib.sha256((shards / shard.name).read_bytes()).hexdigest(), shard.samples
        )
        for shard in manifest.shards
    ]
    (shards / "manifest.parquet").write_bytes(table_of(rows, told))
    (problem,) = validate(shards).problems
    assert (problem.key, problem.what[:25]) == (rows[0]["key"], ".mp4 cannot be decoded: i")


def test_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no shards"):
        validate(tmp_path)
    (tmp_path / "manifest.parquet").write_text(json.dumps({}))
    with pytest.raises(ConfigError, match="is no manifest of shards"):
        validate(tmp_path)
