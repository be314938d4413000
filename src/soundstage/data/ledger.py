"""What is known of every item and what was done to it: the one truth of a dataset, whatever is killed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from soundstage.core.errors import ConfigError, one_of
from soundstage.data.database import Database, portions, tables
from soundstage.data.flow import Flow, Item, described
from soundstage.data.reach import Count, Reach, funnel
from soundstage.data.store import Ref, Store, digest_of

if TYPE_CHECKING:
    from sqlalchemy import Connection, Select

__all__ = ["Dropped", "Ledger", "Quarantined", "Step"]

FILE = "ledger.sqlite"
SUFFIXES = (".sqlite", ".sqlite3", ".db")


@dataclass(frozen=True)
class Dropped:
    """An item that a stage let go, with its word and what decided."""

    stage: str
    item: Item
    reason: str
    score: float | None


@dataclass(frozen=True)
class Quarantined:
    """A task that was given up. state: "poisoned" (can never work) or "failed" (too many attempts); error: its last."""

    stage: str
    items: tuple[Item, ...]
    state: str
    reason: str
    attempts: int
    error: str | None


@dataclass(frozen=True)
class Step:
    """A task of an item's history: what went in and what came out, by id. outputs: (id, reason or None for kept)."""

    stage: str
    parameters: Mapping[str, Any]
    state: str
    attempts: int
    seconds: float | None
    reason: str | None
    error: str | None
    inputs: tuple[str, ...]
    outputs: tuple[tuple[str, str | None], ...]


class Ledger:
    """Items by content, tasks by (stage, version, parameters, item), and what came of them."""

    def __init__(self, database: Database, folder: Path) -> None:
        self.database = database
        self.store = Store(folder)
        self._numbers: dict[int, tuple[Flow, list[int]]] = {}

    @classmethod
    def open(cls, where: str | Path, folder: Path | None = None) -> Ledger:
        """A dataset folder, the path of a SQLite file, or a PostgreSQL URL with the dataset folder.

        folder: where files are kept; beside the SQLite file when left out. Raises LedgerError, such as on a network
        disk.
        """
        server = "://" in str(where)
        if server and folder is None:
            raise ConfigError("ledger: a PostgreSQL URL says nothing of files; give the dataset folder as well")
        path = where if server or Path(where).suffix in SUFFIXES else Path(where) / FILE
        return cls(Database.open(path), folder or Path(path).parent)

    @property
    def folder(self) -> Path:
        """The dataset folder."""
        return self.store.folder

    def close(self) -> None:
        """Give back the connections."""
        self.database.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Putting in

    def add(self, items: Iterable[Item]) -> int:
        """Add source items; those that are there already change nothing. Returns how many are new.

        Their files stay where they are; each is hashed once, until its size or time of change is another.
        """
        return sum(self._add(portion) for portion in _portions(items))

    def _add(self, items: Sequence[Item]) -> int:
        t, rows, seen = tables(), {}, {}
        known = self._known([str(Path(path).absolute()) for item in items for path in item.files.values()])
        for item in items:
            refs = {role: self._ref(Path(path).absolute(), known) for role, path in item.files.items()}
            whole = Item(item.files, item.facts, {role: ref[1] for role, ref in refs.items()})
            rows[whole.id] = record(whole, refs)
            seen |= {ref[0]: ref for ref in refs.values() if ref[3]}

        def work(c: Connection) -> int:
            insert = self.database.insert
            if seen:
                new = insert(t.file)
                columns = {name: new.excluded[name] for name in ("size", "changed", "digest")}
                paths = [_file_row(ref) for _, ref in sorted(seen.items())]
                c.execute(new.on_conflict_do_update(index_elements=["path"], set_=columns), paths)
            new = insert(t.item)  # a file that was moved is found in its new place
            moved = new.on_conflict_do_update(index_elements=["id"], set_={"files": new.excluded.files})
            c.execute(moved, [rows[each] for each in sorted(rows)])
            there = {row.item for row in c.execute(_chosen(t.source, t.source.c.item, list(rows)))}
            now = self.database.now()
            self.database.add(c, t.source, [{"item": each, "added": now} for each in rows if each not in there])
            return len(rows) - len(there)

        return self.database.write(work) if rows else 0

    def _known(self, paths: Sequence[str]) -> dict[str, Any]:
        t = tables()
        names = [_path(path) for path in paths]
        rows = self.database.read(lambda c: list(c.execute(_chosen(t.file, t.file.c.path, names)))) if names else []
        return {row.path: row for row in rows}

    def _ref(self, path: Path, known: Mapping[str, Any]) -> Ref:
        told = path.stat()
        row = known.get(_path(str(path)))
        if row is not None and (row.size, row.changed) == (told.st_size, told.st_mtime_ns):
            return str(path), row.digest, row.size, row.changed
        return str(path), digest_of(path), told.st_size, told.st_mtime_ns

    def numbers(self, flow: Flow) -> list[int]:
        """The number of each stage of a flow, which gets one when it is first seen."""
        known = self._numbers.get(id(flow))
        if known is not None:
            return known[1]
        t, signatures = tables(), list(flow.signatures.values())
        rows = [
            {"signature": each, "name": name, "told": json.dumps(described(name, stage), sort_keys=True)}
            for each, (name, stage) in zip(signatures, flow.stages.items(), strict=True)
        ]

        def find(c: Connection) -> dict[str, int]:
            return {row.signature: row.id for row in c.execute(_chosen(t.stage, t.stage.c.signature, signatures))}

        def work(c: Connection) -> dict[str, int]:
            new = self.database.insert(t.stage).on_conflict_do_nothing(index_elements=["signature"])
            c.execute(new, sorted(rows, key=lambda row: row["signature"]))
            return find(c)

        found = self.database.read(find)
        found = found if len(found) == len(signatures) else self.database.write(work)
        numbers = [found[each] for each in signatures]
        self._numbers[id(flow)] = (flow, numbers)  # the flow is kept, so that its id stays its own
        return numbers

    def reach(self, flow: Flow) -> Reach:
        """What a flow comes to, as subqueries."""
        return Reach(flow, self.numbers(flow))

    def retry(self, flow: Flow, *, poisoned: bool = False) -> int:
        """Give failed tasks new attempts at the next run, with `poisoned` also those in quarantine; how many."""
        import sqlalchemy as sa

        t, numbers = tables(), self.numbers(flow)
        states = ["failed", "poisoned"] if poisoned else ["failed"]
        where = sa.and_(t.task.c.stage.in_(numbers), t.task.c.state.in_(states))
        change = sa.update(t.task).where(where).values(state="pending", attempts=0, not_before=0.0, reason=None)
        return self.database.write(lambda c: c.execute(change).rowcount)

    # Looking

    def funnel(self, flow: Flow) -> tuple[Count, ...]:
        """How many items entered each stage, and what became of every one of them."""
        reach = self.reach(flow)
        return self.database.read(lambda c: funnel(c, reach))

    def sources(self) -> list[Item]:
        """The items that were added, sorted by id."""
        import sqlalchemy as sa

        t = tables()
        return self._items(sa.select(t.item).join(t.source, t.source.c.item == t.item.c.id).order_by(t.item.c.id))

    def results(self, flow: Flow, name: str | None = None) -> list[Item]:
        """The items that came out of a stage, by default the last, sorted by id."""
        import sqlalchemy as sa

        t, part = tables(), flow.until(name) if name is not None else flow
        found = self.reach(part).items[-1]
        return self._items(sa.select(t.item).join(found, found.c.item == t.item.c.id).order_by(t.item.c.id))

    def entering(self, flow: Flow, name: str) -> list[Item]:
        """What a stage is given: the results of the one before, or what was collected."""
        before = list(flow.stages)[: list(flow.stages).index(name)]
        return self.results(flow, before[-1]) if before else self.sources()

    def item(self, beginning: str) -> Item:
        """One item by its id, or by an unambiguous beginning of it."""
        import sqlalchemy as sa

        t = tables()
        found = self._items(sa.select(t.item).where(t.item.c.id.startswith(beginning, autoescape=True)).limit(2))
        if len(found) != 1:
            few = "no item has" if not found else "more than one item has"
            raise ConfigError(f"item: {few} an id that begins with {beginning!r}; data show DIR lists ids")
        return found[0]

    def dropped(self, flow: Flow, name: str | None = None) -> list[Dropped]:
        """What the stages of a flow let go, or one of them; sorted by id within a stage."""
        import sqlalchemy as sa

        t, found = tables(), []
        reach = self.reach(flow)
        for k in self._positions(flow, name):
            join = sa.and_(t.output.c.stage == reach.numbers[k], t.output.c.key == reach.keys[k].c.key)
            chosen = (
                sa.select(t.item, t.output.c.reason, t.output.c.score)
                .select_from(reach.keys[k].join(t.output, join).join(t.item, t.item.c.id == t.output.c.item))
                .where(t.output.c.reason.is_not(None))
                .order_by(t.item.c.id, t.output.c.key, t.output.c.position)
            )
            rows = self.database.read(lambda c, chosen=chosen: list(c.execute(chosen)))
            found += [Dropped(reach.names[k], self._item(row), row.reason, row.score) for row in rows]
        return found

    def quarantine(self, flow: Flow, name: str | None = None) -> list[Quarantined]:
        """The tasks of a flow, or of one stage, that were given up, with why."""
        import sqlalchemy as sa

        t, found = tables(), []
        reach = self.reach(flow)
        for k in self._positions(flow, name):
            join = sa.and_(t.task.c.stage == reach.numbers[k], t.task.c.key == reach.keys[k].c.key)
            chosen = (
                sa.select(t.task)
                .select_from(reach.keys[k].join(t.task, join))
                .where(t.task.c.state.in_(["poisoned", "failed"]))
                .order_by(t.task.c.key)
            )
            rows = self.database.read(lambda c, chosen=chosen: list(c.execute(chosen)))
            items = self.inputs([row.key for row in rows], gathers=reach.gathers[k])
            found += [
                Quarantined(reach.names[k], items[row.key], row.state, row.reason or "", row.attempts, row.error)
                for row in rows
            ]
        return found

    def history(self, id: str) -> tuple[list[Step], list[Step]]:
        """The tasks that made an item, the nearest first; and those that it went into."""
        import sqlalchemy as sa

        t = tables()

        def steps(c: Connection, where: Any) -> list[Step]:  # noqa: ANN401
            chosen = sa.select(t.task, t.stage.c.name, t.stage.c.told).join(t.stage, t.stage.c.id == t.task.c.stage)
            return [self._step(c, row) for row in c.execute(chosen.where(where).order_by(t.task.c.stage, t.task.c.key))]

        def made(item: str) -> Any:  # noqa: ANN401
            here = sa.select(t.output.c.stage, t.output.c.key).where(t.output.c.item == item, t.output.c.key != item)
            return sa.tuple_(t.task.c.stage, t.task.c.key).in_(here)

        def work(c: Connection) -> tuple[list[Step], list[Step]]:
            above, seen, level = [], {id}, [id]
            while level:
                found: list[Step] = []
                for each in level:  # a step that made several of them is told once
                    found += [step for step in steps(c, made(each)) if step not in found and step not in above]
                above += found
                level = sorted({each for step in found for each in step.inputs} - seen)
                seen |= set(level)
            groups = sa.select(t.member.c.key).where(t.member.c.item == id)
            return above, steps(c, sa.or_(t.task.c.key == id, t.task.c.key.in_(groups)))

        return self.database.read(work)

    def _step(self, c: Connection, row: Any) -> Step:  # noqa: ANN401
        import sqlalchemy as sa

        t = tables()
        members = c.execute(sa.select(t.member.c.item).where(t.member.c.key == row.key).order_by(t.member.c.position))
        outputs = c.execute(
            sa.select(t.output.c.item, t.output.c.reason)
            .where(t.output.c.stage == row.stage, t.output.c.key == row.key)
            .order_by(t.output.c.position)
        )
        return Step(
            row.name,
            json.loads(row.told)["params"],
            row.state,
            row.attempts,
            row.seconds,
            row.reason,
            row.error,
            tuple(each.item for each in members) or (row.key,),
            tuple((each.item, each.reason) for each in outputs),
        )

    def damaged(self, on_file: Callable[[], None] = lambda: None) -> list[str]:
        """What is wrong with the stored files: gone, or of another content than their name says; reads every byte."""
        import sqlalchemy as sa

        t, found = tables(), []
        for name in self.database.read(
            lambda c: list(c.execute(sa.select(t.blob.c.name).order_by(t.blob.c.name)).scalars())
        ):
            path = self.folder / name
            if not path.exists():
                found.append(f"{path}: is gone")
            elif digest_of(path) != path.name.partition(".")[0]:
                found.append(f"{path}: does not hold what its name says")
            on_file()
        return found

    def inputs(self, keys: Sequence[str], *, gathers: bool) -> dict[str, tuple[Item, ...]]:
        """The items of tasks of one stage."""
        records = self.database.read(lambda c: input_records(c, keys, gathers=gathers))
        return {key: tuple(self.store.item(*each) for each in found) for key, found in records.items()}

    def _positions(self, flow: Flow, name: str | None) -> Iterable[int]:
        names = list(flow.stages)
        if name is not None and name not in names:
            raise one_of("stage", name, names)
        return range(len(names)) if name is None else (names.index(name),)

    def _items(self, chosen: Select) -> list[Item]:
        return [self._item(row) for row in self.database.read(lambda c: list(c.execute(chosen)))]

    def _item(self, row: Any) -> Item:  # noqa: ANN401
        return self.store.item(json.loads(row.files), json.loads(row.facts))


def record(item: Item, refs: Mapping[str, Ref]) -> dict[str, str]:
    """An item as a row."""
    return {
        "id": item.id,
        "files": json.dumps({role: list(ref) for role, ref in sorted(refs.items())}),
        "facts": json.dumps(dict(item.facts), sort_keys=True),
    }


def input_records(c: Connection, keys: Sequence[str], *, gathers: bool) -> dict[str, list[tuple[dict, dict]]]:
    """(files, facts) of the items of tasks of one stage, by key."""
    found: dict[str, list[tuple[dict, dict]]] = {}
    for portion in portions(keys):
        for row in c.execute(_records(gathers), {"keys": portion}):
            found.setdefault(row.key, []).append((json.loads(row.files), json.loads(row.facts)))
    return found


@cache
def _records(gathers: bool) -> Select:
    import sqlalchemy as sa

    t, these = tables(), sa.bindparam("keys", expanding=True)
    if not gathers:
        return sa.select(t.item.c.id.label("key"), t.item.c.files, t.item.c.facts).where(t.item.c.id.in_(these))
    chosen = sa.select(t.member.c.key, t.item.c.files, t.item.c.facts)
    chosen = chosen.join(t.item, t.item.c.id == t.member.c.item).where(t.member.c.key.in_(these))
    return chosen.order_by(t.member.c.key, t.member.c.position)


def _chosen(table: Any, column: Any, values: Sequence[str]) -> Select:  # noqa: ANN401
    import sqlalchemy as sa

    return sa.select(table).where(column.in_(values))


def _path(path: str) -> str:
    """A path as text that every database holds, whatever its bytes are."""
    return json.dumps(path)


def _file_row(ref: Ref) -> dict[str, Any]:
    return {"path": _path(ref[0]), "size": ref[2], "changed": ref[3], "digest": ref[1]}


def _portions(items: Iterable[Item], size: int = 500) -> Iterator[list[Item]]:
    """As they come, since a source may be a crawl of days."""
    portion: list[Item] = []
    for item in items:
        portion.append(item)
        if len(portion) == size:
            yield portion
            portion = []
    if portion:
        yield portion
