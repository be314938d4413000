"""A run's hold on tasks: claimed under a lease with a heartbeat, committed with what they made in one transaction."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from soundstage.core.errors import ConfigError
from soundstage.data.attempt import Job, Outcome
from soundstage.data.database import LedgerError, portions, tables
from soundstage.data.flow import Flow, Gather, Item
from soundstage.data.ledger import Ledger, input_records
from soundstage.data.owners import gone, new_owner, this_host, this_process
from soundstage.data.reach import NOTHING
from soundstage.data.seat import noted
from soundstage.data.store import DiskFull

if TYPE_CHECKING:
    from sqlalchemy import Connection

__all__ = ["Claims", "Left"]

SPARED_SECONDS = 3600.0
"""Files that no item names are spared for so long where other runs are alive: they may be about to name them."""
FREE_RETURNS = 100
"""How often in one run a task may come back without an attempt being counted, lest a host keep a run for ever."""


@dataclass(frozen=True)
class Left:
    """Of the tasks of a flow: how many are pending or held, and when the next pending one may be tried (seconds)."""

    count: int
    next: float | None


class Claims:
    """One run's side of a ledger. attempts: how many a task gets; backoff: seconds before the second one.

    Closing it gives back what is held; a run that dies without is recognised by its process, or by its lease.
    """

    def __init__(self, ledger: Ledger, *, attempts: int = 3, lease: float = 60.0, backoff: float = 1.0) -> None:
        self.ledger, self.database = ledger, ledger.database
        self.attempts, self.lease, self.backoff = attempts, lease, backoff
        self.owner = new_owner()
        self._tickets = 0
        self._returns = Counter[tuple[int, str]]()
        self._until = 0.0
        self._end = threading.Event()
        self.database.write(self._enter, durable=False)
        self.recover()
        self.clean(spare=not self._alone())
        self._beating = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._beating.start()

    # Being alive

    def _enter(self, c: Connection) -> None:
        t, until = tables(), self.database.now() + self.lease
        row = {"id": self.owner, "host": this_host(), "process": this_process(), "until": until}
        self._until = until
        new = self.database.insert(t.owner).values(row)
        c.execute(new.on_conflict_do_update(index_elements=["id"], set_={"until": until}))

    def _beat(self) -> None:
        while not self._end.wait(self.lease / 3):
            try:
                self.database.set_clock()
                self.database.write(self._enter, durable=False)
            except Exception:  # the run itself meets the same trouble and tells it
                continue

    def _alone(self) -> bool:
        import sqlalchemy as sa

        t = tables()
        return (
            self.database.read(lambda c: c.execute(sa.select(sa.func.count()).select_from(t.owner)).scalar_one()) == 1
        )

    def close(self) -> None:
        """Give back what is held, and leave."""
        import sqlalchemy as sa

        t = tables()
        self._end.set()
        self._beating.join()

        def work(c: Connection) -> None:
            held = sa.and_(t.task.c.owner == self.owner, _is("held"))
            c.execute(sa.update(t.task).where(held).values(state="pending", owner=None, ticket=None))
            c.execute(sa.delete(t.owner).where(t.owner.c.id == self.owner))

        self.ledger.store.drop_scratch(self.owner)  # first, since it may be what fills the disk
        with contextlib.suppress(DiskFull, LedgerError):  # then the next run finds this one gone
            self.database.write(work)

    def recover(self) -> int:
        """Return the tasks of runs that are gone: an attempt for what they were working on, none for the rest."""
        import sqlalchemy as sa

        t = tables()

        def work(c: Connection) -> list[str]:
            now = self.database.now()
            rows = c.execute(sa.select(t.owner).where(t.owner.c.id != self.owner).with_for_update(skip_locked=True))
            dead = [row.id for row in rows if row.until < now or gone(row.host, row.process)]
            held = sa.select(t.task.c.stage, t.task.c.key, t.task.c.attempts).where(_is("held"))
            for owner in dead:
                rows = c.execute(held.where(t.task.c.owner == owner))
                jobs, begun = (
                    [Job(0, row.stage, row.key, row.attempts, ()) for row in rows],
                    noted(self.ledger.store, owner),
                )
                lost, free = Outcome("lost", reason="its run was killed"), Outcome("released")
                self._give_back(c, [(job, lost if job.ticket in begun else free) for job in jobs])
                c.execute(sa.delete(t.owner).where(t.owner.c.id == owner))
            return dead

        dead = self.database.write(work)
        for owner in dead:
            self.ledger.store.drop_scratch(owner)
        return len(dead)

    def clean(self, *, spare: bool) -> int:
        """Remove files of the store that no item names, such as those of a killed run; spare: not the young ones."""
        removed = 0
        for shelf in self.ledger.store.shelves():
            names = [f"{shelf}/{path.name}" for path in (self.ledger.folder / shelf).iterdir()]
            if unnamed := self.database.read(partial(self._unnamed, names=names)):
                removed += self.database.write(partial(self._remove, names=unnamed, spare=spare))
        return removed

    def _unnamed(self, c: Connection, names: Sequence[str]) -> list[str]:
        known: set[str] = set()
        for portion in portions(names):
            known |= set(c.execute(_known(), {"names": portion}).scalars())
        return [name for name in names if name not in known]

    def _remove(self, c: Connection, names: Sequence[str], spare: bool) -> int:
        """Remove those that no item names now that nobody can commit; how many."""
        self.database.exclude(c)
        count = 0
        for name in self._unnamed(c, names):
            path = self.ledger.folder / name
            with contextlib.suppress(FileNotFoundError):  # another run cleans as well
                if not spare or time.time() - path.stat().st_mtime > SPARED_SECONDS:
                    path.unlink()
                    count += 1
        return count

    # Work to do

    def want(self, flow: Flow) -> Left:
        """Put every task that the flow comes to into the ledger, set aside those it does not; what is left to do."""
        import sqlalchemy as sa

        t, reach = tables(), self.ledger.reach(flow)
        wanted = reach.tasks().cte("wanted")
        task = sa.and_(t.task.c.stage == wanted.c.stage, t.task.c.key == wanted.c.key)
        values = (sa.literal("pending"), sa.literal(0), sa.literal(0.0))
        missing = (
            sa.select(wanted.c.stage, wanted.c.key, *values)
            .select_from(wanted.outerjoin(t.task, task))
            .where(sa.or_(t.task.c.key.is_(None), t.task.c.state == "idle"))
            .order_by(wanted.c.stage, wanted.c.key)
        )
        new = self.database.insert(t.task)
        new = new.from_select(["stage", "key", "state", "attempts", "not_before"], missing)
        idle = t.task.c.state == "idle"
        new = new.on_conflict_do_update(index_elements=["stage", "key"], set_={"state": "pending"}, where=idle)
        pairs = sa.select(wanted.c.stage, wanted.c.key)
        mine = sa.and_(_is("pending"), t.task.c.stage.in_(reach.numbers))
        aside = sa.update(t.task).where(mine, sa.tuple_(t.task.c.stage, t.task.c.key).not_in(pairs))

        def work(c: Connection) -> None:
            c.execute(new)
            c.execute(aside.values(state="idle"))

        self.database.write(work)
        return self.left(reach.numbers)

    def left(self, numbers: Sequence[int]) -> Left:
        """What is left to do of these stages."""
        import sqlalchemy as sa

        t = tables()

        def work(c: Connection) -> Left:
            count, soonest = 0, []
            for state in ("pending", "held"):  # one index each
                chosen = sa.select(sa.func.count(), sa.func.min(t.task.c.not_before))
                row = c.execute(chosen.where(_is(state), t.task.c.stage.in_(numbers))).one()
                count += row[0]
                soonest += [row[1]] if state == "pending" and row[1] is not None else []
            return Left(count, max(0.0, soonest[0] - self.database.now()) if soonest else None)

        return self.database.read(work)

    def group(self, flow: Flow, position: int) -> None:
        """Ask a gather for its groups of what enters it, unless they are known for these very items."""
        import sqlalchemy as sa

        t, name = tables(), list(flow.stages)[position]
        stage, reach = flow.stages[name], self.ledger.reach(flow)
        assert isinstance(stage, Gather)
        prefix = reach.prefixes[position]
        entering = sa.select(reach.items[position].c.item).order_by(reach.items[position].c.item)
        known = sa.select(t.gathering.c.fingerprint).where(t.gathering.c.prefix == prefix)
        ids = self.database.read(lambda c: list(c.execute(entering).scalars()))
        fingerprint = sha256("\n".join(ids).encode()).hexdigest()[:32]
        if self.database.read(lambda c: c.execute(known).scalar()) == fingerprint:
            return
        items = self._entering(ids)
        groups = [[each.id for each in group] for group in stage.groups(items)]
        if sorted(each for group in groups for each in group) != ids or not all(groups):
            raise ConfigError(f"{name}: its groups must hold every item exactly once, and none may be empty")
        keys = [sha256("\n".join(group).encode()).hexdigest()[:32] for group in groups]
        members = [
            {"key": key, "position": n, "item": each}
            for key, group in zip(keys, groups, strict=True)
            for n, each in enumerate(group)
        ]

        def work(c: Connection) -> None:
            new = self.database.insert(t.gathering).values(prefix=prefix, fingerprint=fingerprint)
            c.execute(new.on_conflict_do_update(index_elements=["prefix"], set_={"fingerprint": fingerprint}))
            c.execute(sa.delete(t.grouping).where(t.grouping.c.prefix == prefix))
            self.database.add(c, t.member, members)
            self.database.add(c, t.grouping, [{"prefix": prefix, "key": key} for key in keys])

        self.database.write(work)

    def _entering(self, ids: Sequence[str]) -> list[Item]:
        found = self.ledger.inputs(ids, gathers=False)
        return [found[each][0] for each in ids]

    def claim(self, flow: Flow, count: int) -> list[Job]:
        """Up to `count` tasks of a flow, now held by this run; late stages first, so that items come out early."""
        import sqlalchemy as sa

        t, numbers = tables(), self.ledger.numbers(flow)
        gathers = [isinstance(stage, Gather) for stage in flow.stages.values()]
        self._tickets += 1
        ticket = f"{self.owner}/{self._tickets}"

        def take(c: Connection, number: int, wanted: int) -> list[Any]:
            rows = list(c.execute(_free(), {"number": number, "now": self.database.now(), "wanted": wanted}))
            for portion in portions([row.key for row in rows]):
                c.execute(_hold(), {"mine": self.owner, "this": ticket, "number": number, "keys": portion})
            return rows

        def held(c: Connection, number: int) -> list[Any]:
            mine = sa.and_(t.task.c.owner == self.owner, t.task.c.ticket == ticket, t.task.c.stage == number)
            return list(c.execute(sa.select(t.task.c.key, t.task.c.attempts).where(mine, _is("held"))))

        tries = 0

        def work(c: Connection) -> list[Job]:
            nonlocal tries
            tries += 1
            if self.database.now() > self._until - self.lease / 2:
                self._enter(c)
            jobs: list[Job] = []
            again = tries > 1  # the first try may have been committed although its answer was lost
            for k in reversed(range(len(numbers))):
                if len(jobs) >= count:
                    break
                rows = (held(c, numbers[k]) if again else []) or take(c, numbers[k], count - len(jobs))
                records = input_records(c, [row.key for row in rows], gathers=gathers[k])
                jobs += [Job(k, numbers[k], row.key, row.attempts, tuple(records[row.key])) for row in rows]
            return jobs

        return self.database.write(work, durable=False)

    # Work done

    def commit(self, flow: Flow, outcomes: Sequence[tuple[Job, Outcome]]) -> list[tuple[Job, str]]:
        """Write what became of jobs, in one transaction; those whose lease went to another run are left out.

        Returns the state of each task that was written. A result whose file was cleaned away meanwhile is released.
        """
        t, numbers = tables(), [*self.ledger.numbers(flow), None]
        gathers = [*(isinstance(stage, Gather) for stage in flow.stages.values()), True]

        def work(c: Connection) -> list[tuple[Job, str]]:
            self.database.share(c)
            mine = self._mine(c, [job for job, _ in outcomes])
            written = [(job, self._whole(c, outcome)) for job, outcome in outcomes if (job.stage, job.key) in mine]
            done = [(job, outcome) for job, outcome in written if outcome.kind == "done"]
            results = [(job, n, result) for job, outcome in done for n, result in enumerate(outcome.results)]
            self.database.add(c, t.item, _once("id", [result.row for _, _, result in results]))
            blobs = [{"name": name, "size": size} for _, _, result in results for name, size in result.blobs]
            self.database.add(c, t.blob, _once("name", blobs))
            outputs = [
                {"stage": job.stage, "key": job.key, "position": n, "item": result.row["id"]}
                | {"reason": result.reason, "score": result.score}
                for job, n, result in results
            ]
            self.database.add(c, t.output, outputs)
            tasks = {
                (numbers[job.position + 1], result.row["id"])
                for job, _, result in results
                if result.reason is None and not gathers[job.position + 1]
            }
            self._wanted(c, sorted(tasks))
            rows = self._done(c, done) + self._give_back(c, [each for each in written if each[1].kind != "done"])
            states = {(row["at_stage"], row["at_key"]): row["state"] for row in rows}
            return [(job, states[job.stage, job.key]) for job, _ in written]

        return self.database.write(work)

    def _mine(self, c: Connection, jobs: Sequence[Job]) -> set[tuple[int, str]]:
        found: set[tuple[int, str]] = set()
        for portion in portions(sorted(job.key for job in jobs)):
            found |= {(row.stage, row.key) for row in c.execute(_held_by(), {"mine": self.owner, "keys": portion})}
        return found

    def _whole(self, c: Connection, outcome: Outcome) -> Outcome:
        """Are all new files still there?"""
        import sqlalchemy as sa

        t = tables()
        for name, _ in (blob for result in outcome.results for blob in result.blobs):
            if (self.ledger.folder / name).exists():
                continue
            if c.execute(sa.select(t.blob.c.name).where(t.blob.c.name == name)).first() is None:
                return Outcome("released", reason=f"{name} was cleaned away")
        return outcome

    def _wanted(self, c: Connection, tasks: Sequence[tuple[int | None, str]]) -> None:
        t = tables()
        if tasks:
            new = self.database.insert(t.task)
            idle = t.task.c.state == "idle"
            rows = [{"stage": n, "key": key, "state": "pending", "attempts": 0, "not_before": 0.0} for n, key in tasks]
            again = new.on_conflict_do_update(index_elements=["stage", "key"], set_={"state": "pending"}, where=idle)
            c.execute(again, rows)

    def _done(self, c: Connection, done: Sequence[tuple[Job, Outcome]]) -> list[dict[str, Any]]:
        rows = []
        for job, outcome in done:
            kept = any(result.reason is None for result in outcome.results)
            why = None if kept else next(iter(outcome.results), None)
            told = {"reason": None if kept else why.reason if why else NOTHING, "score": why.score if why else None}
            rows.append(_row(job, "done" if kept else "dropped", seconds=outcome.seconds, **told))
        _update(c, rows, ["state", "attempts", "reason", "score", "seconds"])
        return rows

    def _give_back(self, c: Connection, outcomes: Sequence[tuple[Job, Outcome]]) -> list[dict[str, Any]]:
        """Jobs that are not done: pending again, or given up."""
        free, tried, now = [], [], self.database.now()
        for job, outcome in outcomes:
            if outcome.kind in ("released", "full"):
                free.append(_row(job, "pending", attempts=job.attempts))
                continue
            self._returns[job.stage, job.key] += outcome.free
            counts = not outcome.free or self._returns[job.stage, job.key] > FREE_RETURNS
            made = job.attempts + counts
            state = "poisoned" if outcome.kind == "poison" else "failed" if made >= self.attempts else "pending"
            pause = max(self.backoff * 2**job.attempts * random.uniform(0.5, 1.5), outcome.after or 0.0)
            told = {"reason": outcome.reason, "error": outcome.error, "seconds": outcome.seconds}
            tried.append(_row(job, state, attempts=made, not_before=now + pause, **told))
        _update(c, free, ["state", "attempts"])
        _update(c, tried, ["state", "attempts", "not_before", "reason", "error", "seconds"])
        return free + tried


def _is(state: str) -> Any:  # noqa: ANN401
    """A task's state, said in the words of the partial indexes."""
    import sqlalchemy as sa

    return tables().task.c.state == sa.literal_column(f"'{state}'")


def _row(job: Job, state: str, **values: Any) -> dict[str, Any]:  # noqa: ANN401
    told = {"at_stage": job.stage, "at_key": job.key, "state": state, "attempts": job.attempts + 1}
    return told | values


def _update(c: Connection, rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    """Tasks that are held become something else."""
    if rows:
        c.execute(_change(tuple(names)), sorted(rows, key=lambda row: (row["at_stage"], row["at_key"])))


# Statements that are built once, since building takes longer than running


@cache
def _free() -> Any:  # noqa: ANN401
    import sqlalchemy as sa

    task = tables().task.c
    chosen = sa.select(task.key, task.attempts).where(task.stage == sa.bindparam("number"), _is("pending"))
    chosen = chosen.where(task.not_before <= sa.bindparam("now")).order_by(task.not_before)
    return chosen.limit(sa.bindparam("wanted")).with_for_update(skip_locked=True)


@cache
def _hold() -> Any:  # noqa: ANN401
    import sqlalchemy as sa

    t = tables()
    these = sa.and_(t.task.c.stage == sa.bindparam("number"), t.task.c.key.in_(sa.bindparam("keys", expanding=True)))
    return sa.update(t.task).where(these).values(state="held", owner=sa.bindparam("mine"), ticket=sa.bindparam("this"))


@cache
def _held_by() -> Any:  # noqa: ANN401
    import sqlalchemy as sa

    task = tables().task.c
    mine = sa.and_(_is("held"), task.owner == sa.bindparam("mine"))
    these = task.key.in_(sa.bindparam("keys", expanding=True))
    return sa.select(task.stage, task.key).where(mine, these).order_by(task.stage, task.key).with_for_update()


@cache
def _known() -> Any:  # noqa: ANN401
    import sqlalchemy as sa

    name = tables().blob.c.name
    return sa.select(name).where(name.in_(sa.bindparam("names", expanding=True)))


@cache
def _change(names: tuple[str, ...]) -> Any:  # noqa: ANN401
    import sqlalchemy as sa

    t = tables()
    this = sa.and_(t.task.c.stage == sa.bindparam("at_stage"), t.task.c.key == sa.bindparam("at_key"))
    values = {name: sa.bindparam(name) for name in names}
    return sa.update(t.task).where(this, _is("held")).values(**values, owner=None, ticket=None)


def _once(key: str, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return list({row[key]: row for row in rows}.values())
