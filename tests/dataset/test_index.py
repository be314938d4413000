from __future__ import annotations

import hashlib
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from soundstage.core.errors import ConfigError
from soundstage.data.flow import Item
from soundstage.data.index import build_index, export, query, search
from soundstage.data.shards import Pack, pack
from soundstage.media.clip import Clip

pytest.importorskip("pyarrow")

CAPTIONS = ("a red ball bounces on wood", "a piano plays in a café", 'somebody says "hello", a ball rolls')


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, items = tmp_path_factory.mktemp("shards"), []
    for index, caption in enumerate(CAPTIONS):
        frames = np.full((8, 16, 16, 3), 40 * index, np.uint8)
        path = Clip(frames, Fraction(8), np.zeros((1, 16000), np.float32), 16000).save(folder / f"{index}.mp4")
        facts = {"caption": caption, "tags": ["wood", "ball"][: 2 - index], "category": "music", "licence": "CC0"}
        scan = {"scan": {"blur": index / 10}, "title": f"title\0{index}"}
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        items.append(Item({"media": path}, facts | scan, {"media": digest}))
    pack(items, folder / "s", Pack(num=2))
    return folder / "s"


def test_words_are_found(shards: Path, tmp_path: Path) -> None:
    file = tmp_path / "index.sqlite"
    assert build_index(shards, file) == 3
    assert build_index(shards, file) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["index.sqlite"]

    def captions(words: str, limit: int = 20) -> list[str]:
        return [row["caption"] for row in search(file, words, limit)]

    assert captions("piano") == [CAPTIONS[1]]
    assert captions("cafe") == [CAPTIONS[1]]
    assert sorted(captions("caption: ball")) == [CAPTIONS[0], CAPTIONS[2]]
    assert captions("tags: ball") == [CAPTIONS[0]]
    assert captions("ball", 1) == [CAPTIONS[0]]
    assert captions('"ball rolls"') == [CAPTIONS[2]]
    assert captions("bounc* OR piano") and captions("nothing") == []
    row = search(file, "red")[0]
    assert (row["tags"], row["licence"], row["width"]) == (["wood", "ball"], "CC0", 16)
    assert row["rank"] < 0
    with pytest.raises(ConfigError, match="search: '\"' cannot be read"):
        search(file, '"')
    with pytest.raises(ConfigError, match="there is no index"):
        search(tmp_path / "none.sqlite", "a")


def test_sql_over_the_manifest(shards: Path, tmp_path: Path) -> None:
    pytest.importorskip("duckdb")
    (row,) = query(shards, "SELECT count(*) AS n, max((facts->>'$.scan.blur')::DOUBLE) AS blur FROM clips")
    assert row == {"n": 3, "blur": 0.2}
    with pytest.raises(ConfigError, match="the columns are key, shard, caption"):
        query(shards, "SELECT colour FROM clips")
    with pytest.raises(ConfigError, match="cannot be asked"):
        query(shards, f"COPY clips TO '{tmp_path}/out.csv'")
    assert export(shards, str(tmp_path / "all.parquet")) == 3
    import duckdb

    told = duckdb.sql(f"SELECT caption FROM '{tmp_path}/all.parquet' ORDER BY facts->>'$.scan.blur'").fetchall()
    assert [caption for (caption,) in told] == list(CAPTIONS)
    with pytest.raises(ConfigError, match=r"neither a .parquet file nor a postgresql"):
        export(shards, "table.csv")


def test_a_table_in_postgresql(shards: Path, postgres: Any) -> None:  # noqa: ANN401
    psycopg = pytest.importorskip("psycopg")
    url = postgres.database()
    assert export(shards, url) == 3
    assert export(shards, url) == 3
    with psycopg.connect(url) as base:
        found = base.execute("SELECT caption FROM clips WHERE words @@ plainto_tsquery('simple', 'ball')").fetchall()
        assert sorted(caption for (caption,) in found) == [CAPTIONS[0], CAPTIONS[2]]
        assert base.execute("SELECT sum((facts->'scan'->>'blur')::float) FROM clips").fetchone()[0] == pytest.approx(
            0.3
        )
    with pytest.raises(ConfigError, match=r"PostgreSQL at /nowhere says: .*does not exist"):
        export(shards, url.partition("@")[0] + "@/nowhere?" + url.rpartition("?")[2])
