"""Lists of addresses: JSON lines, tables, or one address a line."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from io import TextIOWrapper
from pathlib import Path
from typing import IO, Any

from soundstage.core.errors import ConfigError
from soundstage.data.flow import Item
from soundstage.data.remote import filesystem, is_remote
from soundstage.data.sources.address import canonical
from soundstage.data.sources.rows import facts_of

__all__ = ["LISTS", "Links", "Urls"]

LISTS = (".jsonl", ".ndjson", ".csv", ".tsv", ".txt")


@dataclass(frozen=True)
class Links:
    """These addresses. licence: of all of them."""

    urls: tuple[str, ...]
    licence: str | None = None

    def __iter__(self) -> Iterator[Item]:
        for url in self.urls:
            facts = {"source": "urls", "url": canonical(url), "licence": self.licence}
            yield Item({}, {key: value for key, value in facts.items() if value})


@dataclass(frozen=True)
class Urls:
    """The rows of a list: .jsonl, .csv or .tsv with a header, or .txt with one address a line ("#" begins a remark).

    path: a file, or a URL that fsspec knows; ".gz" is understood. Columns: url (a file's path relative to the list is
    read in place), licence, caption, title, author, tags, sha256 (or sha1, md5); any other becomes a fact of its own
    name. columns: our name to the list's, {"url": "contentUrl"}, where it is not guessed. licence: of rows that tell
    none. A row that cannot be read raises ConfigError with its line: a list loses nothing silently.
    """

    path: str
    licence: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Item]:
        for number, row in self._rows():
            where = f"{self.path}:{number}"
            row = {**row, **{ours: row.get(theirs) for ours, theirs in self.columns.items()}}
            row = {key: value for key, value in row.items() if key not in set(self.columns.values()) - {*self.columns}}
            facts = facts_of(row, where)
            if not facts.get("url"):
                raise ConfigError(f"{where}: names no url; its columns are {', '.join(map(str, row))}; set columns=")
            if self.licence is not None:
                facts.setdefault("licence", self.licence)
            yield self._item({"source": "urls", **facts}, where)

    def _item(self, facts: dict[str, Any], where: str) -> Item:
        url = str(facts.pop("url"))
        if "://" in url:
            try:
                return Item({}, {**facts, "url": canonical(url)})
            except ConfigError as error:
                raise ConfigError(f"{where}: {error}") from None
        file = Path(url).expanduser()
        if not file.is_absolute() and not is_remote(self.path):
            file = Path(self.path).expanduser().absolute().parent / file
        if not file.is_file():
            raise ConfigError(f"{where}: {url!r} is neither an address nor a file beside the list")
        return Item({"media": file}, {**facts, "name": url})

    def _rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """(line, row) of each row."""
        name = self.path.removesuffix(".gz")
        suffix = Path(name).suffix.lower()
        if suffix not in LISTS:
            raise ConfigError(f"urls: {self.path} is not a list; give a file of {', '.join(LISTS)} (.gz too)")
        with _open(self.path) as file:
            if suffix in (".csv", ".tsv"):
                reader = csv.DictReader(file, delimiter="\t" if suffix == ".tsv" else ",", restkey="", strict=True)
                try:
                    yield from ((reader.line_num, row) for row in reader)
                except csv.Error as error:
                    raise ConfigError(f"{self.path}:{reader.line_num}: cannot be read ({error})") from None
                return
            for number, line in enumerate(file, 1):
                if not line.strip() or (suffix == ".txt" and line.lstrip().startswith("#")):
                    continue
                yield number, {"url": line.strip()} if suffix == ".txt" else self._parsed(number, line)

    def _parsed(self, number: int, line: str) -> dict[str, Any]:
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{self.path}:{number}: is not JSON ({error})") from None
        if not isinstance(row, dict):
            raise ConfigError(f"{self.path}:{number}: holds no object; write each line as {{...}}")
        return row


def _open(path: str) -> IO[str]:
    """A list as text."""
    if is_remote(path):
        files, name = filesystem(path)
        raw = files.open(name, "rb", compression="gzip" if path.endswith(".gz") else None)
    elif not Path(path).expanduser().is_file():
        raise ConfigError(f"urls: there is no file {path}")
    elif path.endswith(".gz"):
        import gzip

        raw = gzip.open(Path(path).expanduser(), "rb")  # noqa: SIM115 - closed with the text around it
    else:
        raw = Path(path).expanduser().open("rb")
    return TextIOWrapper(raw, encoding="utf-8-sig", newline="")
