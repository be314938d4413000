"""Finding clips: full text over captions, tags and facts (SQLite), SQL over the manifest (DuckDB), exports."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from soundstage.core.errors import ConfigError, MissingExtra
from soundstage.data.manifest import Manifest, arrow, read_manifest

__all__ = ["build_index", "chosen", "export", "query", "search"]

INDEX = "index.sqlite"
COLUMNS = ("key", "shard", "caption", "tags", "category", "duration", "width", "height", "licence", "source", "url")
TABLE = "clips"


def build_index(url: str | Path, file: str | Path) -> int:
    """Write a full-text index of the shards at a URL to a SQLite file, whole or not at all; returns the clips in it."""
    manifest, file = read_manifest(url), Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f".{file.name}.{os.getpid()}.part")
    aside.unlink(missing_ok=True)
    names = ", ".join(COLUMNS)
    marks = ", ".join("?" * (len(COLUMNS) + 2))
    with closing(sqlite3.connect(aside)) as base:
        base.execute(f"CREATE TABLE {TABLE} (id INTEGER PRIMARY KEY, {names}, facts)")
        base.execute(
            f"CREATE VIRTUAL TABLE words USING fts5(caption, tags, category, facts, content='{TABLE}', "
            "content_rowid='id', tokenize='unicode61 remove_diacritics 2')"
        )
        rows = ((i, *_values(row), row["facts"]) for i, row in enumerate(manifest.rows()))
        base.executemany(f"INSERT INTO {TABLE} VALUES ({marks})", rows)
        base.execute("INSERT INTO words (words) VALUES ('rebuild')")
        base.execute(f"CREATE UNIQUE INDEX by_key ON {TABLE} (key)")
        base.execute("PRAGMA user_version = 1")
        base.commit()
    with aside.open("rb") as written:
        os.fsync(written.fileno())
    aside.replace(file)
    return len(manifest)


def search(file: str | Path, words: str, limit: int = 20) -> list[dict[str, Any]]:
    """Clips whose caption, tags, category or facts hold the words, the best first, with "rank" (lower is better).

    words: as SQLite's FTS5 has them: all of several words; "a phrase"; dog OR cat; dan*; caption: piano. Raises
    ConfigError for words that it cannot read, or where there is no index.
    """
    file = Path(file)
    if not file.is_file():
        raise ConfigError(f"{file}: there is no index; run soundstage data index")
    asked = (
        f"SELECT {', '.join(f'c.{name}' for name in COLUMNS)}, bm25(words, 4.0, 2.0, 2.0, 1.0) AS rank FROM words "
        f"JOIN {TABLE} c ON c.id = words.rowid WHERE words MATCH ? ORDER BY rank, c.key LIMIT ?"
    )
    with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as base:
        base.row_factory = sqlite3.Row
        try:
            found = [dict(row) for row in base.execute(asked, (words, limit))]
        except sqlite3.DatabaseError as error:
            raise ConfigError(
                f"search: {words!r} cannot be read ({error}); put words with signs in double quotes"
            ) from error
    return [{**row, "tags": row["tags"].split(", ") if row["tags"] else []} for row in found]


def query(url: str | Path, sql: str) -> list[dict[str, Any]]:
    """What DuckDB answers to SQL on the table `clips`, the manifest; `facts` is JSON: facts->>'$.scan.blur'.

    Raises ConfigError for SQL that cannot be asked, MissingExtra without duckdb.
    """
    with _duck(read_manifest(url)) as base:
        found = _ask(base, sql, "sql")
        names = [column[0] for column in found.description]
        return [dict(zip(names, row, strict=True)) for row in found.fetchall()]


def chosen(manifest: Manifest, where: str) -> np.ndarray:
    """(M,) rows of a manifest for which SQL holds, in order."""
    with _duck(manifest) as base:
        found = _ask(base, f"SELECT row FROM {TABLE} WHERE ({where}) ORDER BY row", "where", shown=where)
        return np.asarray(found.fetchnumpy()["row"], np.int64)


def export(url: str | Path, target: str) -> int:
    """Write the clips as a table elsewhere: a .parquet file, or "postgresql://..." (its table `clips`, made anew).

    The table of PostgreSQL has a column `words` for full-text search and appears whole. Returns the clips written.
    """
    manifest = read_manifest(url)
    if target.startswith(("postgresql://", "postgres://")):
        return _to_postgres(manifest, target)
    if not target.endswith(".parquet"):
        raise ConfigError(f"export: {target!r} is neither a .parquet file nor a postgresql:// URL")
    file = Path(target)
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f".{file.name}.{os.getpid()}.part")
    pa = arrow()
    columns = (*COLUMNS, "fps", "sample_rate", "channels", "facts")
    pa.parquet.write_table(pa.table({name: manifest.column(name) for name in columns}), str(aside), compression="zstd")
    aside.replace(file)
    return len(manifest)


def _to_postgres(manifest: Manifest, target: str) -> int:
    try:
        import psycopg
    except ImportError as error:
        raise MissingExtra("psycopg", "cluster") from error
    columns = (
        "key text PRIMARY KEY, shard text, caption text, tags text, category text, duration float8, width int4, "
        "height int4, licence text, source text, url text, facts jsonb, words tsvector GENERATED ALWAYS AS "
        "(setweight(to_tsvector('simple', coalesce(caption, '')), 'A') || "
        "setweight(to_tsvector('simple', coalesce(tags, '') || ' ' || coalesce(category, '')), 'B')) STORED"
    )
    try:
        with psycopg.connect(target) as base, base.cursor() as cursor:
            cursor.execute(f"DROP TABLE IF EXISTS {TABLE}")
            cursor.execute(f"CREATE TABLE {TABLE} ({columns})")
            with cursor.copy(f"COPY {TABLE} ({', '.join(COLUMNS)}, facts) FROM STDIN") as copy:
                for row in manifest.rows():
                    copy.write_row([_clean(value) for value in (*_values(row), row["facts"])])
            cursor.execute(f"CREATE INDEX ON {TABLE} USING gin (words)")
    except psycopg.Error as error:
        where, told = target.rpartition("@")[2].partition("?")[0], " ".join(str(error).split())
        raise ConfigError(f"export: PostgreSQL at {where} says: {told}") from error
    return len(manifest)


def _clean(value: Any) -> Any:  # noqa: ANN401
    """PostgreSQL has no text with the character 0, neither plain nor in JSON."""
    return value.replace("\0", "").replace("\\u0000", "") if isinstance(value, str) else value


def _values(row: dict[str, Any]) -> list[Any]:
    return [", ".join(row[name] or ()) if name == "tags" else row[name] for name in COLUMNS]


@contextmanager
def _duck(manifest: Manifest) -> Iterator[Any]:
    """A DuckDB of one table in memory, that reads no file and no address by itself."""
    try:
        import duckdb
    except ImportError as error:
        raise MissingExtra("duckdb", "data") from error
    pa = arrow()
    columns = {name: manifest.column(name) for name in manifest.names}
    table = pa.table({"row": pa.array(np.arange(len(manifest))), **columns})
    with closing(duckdb.connect(config={"threads": "1"})) as base:
        base.register("given", table)
        listed = ", ".join(name for name in columns if name != "facts")
        base.execute(f"CREATE VIEW {TABLE} AS SELECT row, {listed}, facts::JSON AS facts FROM given")
        base.execute("SET enable_external_access = false")
        yield base


def _ask(base: Any, sql: str, name: str, shown: str | None = None) -> Any:  # noqa: ANN401
    import duckdb

    try:
        return base.execute(sql)
    except duckdb.Error as error:
        told = " ".join(str(error).split("\n\n")[0].split())
        raise ConfigError(
            f"{name}: {(shown or sql)!r} cannot be asked ({told}); the columns are {', '.join(COLUMNS)} and facts"
        ) from error
