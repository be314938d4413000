"""What a flow comes to from its sources: chains of subqueries over the ledger, the same for the run and the funnel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from soundstage.data.database import tables
from soundstage.data.flow import Flow, Gather

if TYPE_CHECKING:
    from sqlalchemy import CTE, Connection, Select

__all__ = ["Count", "Reach", "funnel"]

NOTHING = "nothing"
"""The reason counted for an item of which a stage made nothing and did not say why."""


@dataclass(frozen=True)
class Count:
    """One line of a funnel: entered = passed + dropped + poisoned + failed + waiting, always.

    dropped: items that went no further on purpose, by reason; an item that made nothing and gave no reason counts as
    "nothing". made: items that came out; merged: of them, the same ones made twice; cut: Drop outcomes by reason, also
    those of pieces whose parent passed.
    """

    name: str
    entered: int
    passed: int
    dropped: Mapping[str, int] = field(default_factory=dict)
    poisoned: int = 0
    failed: int = 0
    waiting: int = 0
    made: int = 0
    merged: int = 0
    cut: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0


class Reach:
    """Of a flow whose stages have numbers in the ledger.

    items: a CTE per stage with the column `item`, what enters it, and one more, what the flow results in.
    keys: a CTE per stage with the column `key`, its tasks. prefixes: of the gathers, what their groups are filed under.
    """

    def __init__(self, flow: Flow, numbers: Sequence[int]) -> None:
        import sqlalchemy as sa

        t = tables()
        self.numbers = list(numbers)
        self.names = list(flow.stages)
        self.gathers = [isinstance(stage, Gather) for stage in flow.stages.values()]
        signatures = list(flow.signatures.values())
        self.prefixes = [
            sha256("/".join(signatures[: k + 1]).encode()).hexdigest()[:32] for k in range(len(signatures))
        ]
        self.items: list[CTE] = [sa.select(t.source.c.item).cte("items0")]
        self.keys: list[CTE] = []
        for k, number in enumerate(self.numbers):
            if self.gathers[k]:
                keys = sa.select(t.grouping.c.key).where(t.grouping.c.prefix == self.prefixes[k])
            else:
                keys = sa.select(self.items[k].c.item.label("key"))
            self.keys.append(keys.cte(f"keys{k}"))
            join = sa.and_(
                t.output.c.stage == number, t.output.c.key == self.keys[k].c.key, t.output.c.reason.is_(None)
            )
            made = sa.select(t.output.c.item).select_from(self.keys[k].join(t.output, join)).distinct()
            self.items.append(made.cte(f"items{k + 1}"))

    def tasks(self) -> Select:
        """(stage, key) of every task that the flow comes to."""
        import sqlalchemy as sa

        parts = [
            sa.select(sa.literal(n).label("stage"), keys.c.key) for n, keys in zip(self.numbers, self.keys, strict=True)
        ]
        return sa.union_all(*parts)

    def states(self) -> Any:  # noqa: ANN401
        """(position, state, reason, members, seconds) by stage; state None: the task is not there yet."""
        import sqlalchemy as sa

        t, parts = tables(), []
        for k, number in enumerate(self.numbers):
            task = sa.and_(t.task.c.stage == number, t.task.c.key == self.keys[k].c.key)
            source = self.keys[k].outerjoin(t.task, task)
            seconds: Any = t.task.c.seconds
            if self.gathers[k]:
                source = source.join(t.member, t.member.c.key == self.keys[k].c.key)
                seconds = sa.case((t.member.c.position == 0, seconds), else_=0.0)
            parts.append(
                sa.select(
                    sa.literal(k).label("position"),
                    t.task.c.state,
                    t.task.c.reason,
                    sa.func.count().label("members"),
                    sa.func.sum(seconds).label("seconds"),
                )
                .select_from(source)
                .group_by(t.task.c.state, t.task.c.reason)
            )
        return sa.union_all(*parts)

    def outcomes(self) -> Any:  # noqa: ANN401
        """(position, state, reason, outputs) by stage; reason None: kept."""
        import sqlalchemy as sa

        t, parts = tables(), []
        for k, number in enumerate(self.numbers):
            task = sa.and_(t.task.c.stage == number, t.task.c.key == self.keys[k].c.key)
            output = sa.and_(t.output.c.stage == number, t.output.c.key == self.keys[k].c.key)
            parts.append(
                sa.select(
                    sa.literal(k).label("position"),
                    t.task.c.state,
                    t.output.c.reason,
                    sa.func.count().label("outputs"),
                )
                .select_from(self.keys[k].join(t.task, task).join(t.output, output))
                .group_by(t.task.c.state, t.output.c.reason)
            )
        return sa.union_all(*parts)

    def entered(self) -> Any:  # noqa: ANN401
        """(position, items) by stage."""
        import sqlalchemy as sa

        parts = [sa.select(sa.literal(k), sa.func.count()).select_from(items) for k, items in enumerate(self.items)]
        return sa.union_all(*parts)


def funnel(c: Connection, reach: Reach) -> tuple[Count, ...]:
    """A line per stage of the flow."""
    entered = dict(map(tuple, c.execute(reach.entered())))
    states, outcomes = list(c.execute(reach.states())), list(c.execute(reach.outcomes()))
    return tuple(
        _count(
            reach.names[k],
            reach.gathers[k],
            (entered[k], entered[k + 1]),
            [row for row in states if row.position == k],
            [row for row in outcomes if row.position == k],
        )
        for k in range(len(reach.names))
    )


def _count(name: str, gathers: bool, entered: tuple[int, int], states: list[Any], outcomes: list[Any]) -> Count:
    """entered: items that enter this stage, and the next."""
    members, cut, gave, dropped = Counter[str | None](), Counter[str](), Counter[str](), Counter[str]()
    for row in states:
        members[row.state] += row.members
        if row.state == "dropped" and not gathers:
            dropped[row.reason] += row.members
    for row in outcomes:
        if row.reason is not None:
            cut[row.reason] += row.outputs
            gave[row.state] += row.outputs
    if gathers:  # each Drop stands for one member
        dropped = cut.copy()
        dropped[NOTHING] += members["dropped"] - gave["dropped"]
    passed = members["done"] - (gave["done"] if gathers else 0)
    made = sum(row.outputs for row in outcomes if row.reason is None)
    settled = passed + dropped.total() + members["poisoned"] + members["failed"]
    return Count(
        name,
        entered=entered[0],
        passed=passed,
        dropped=dict(sorted((+dropped).items())),
        poisoned=members["poisoned"],
        failed=members["failed"],
        waiting=entered[0] - settled,
        made=made,
        merged=made - entered[1],
        cut=dict(sorted(cut.items())),
        seconds=sum(row.seconds or 0.0 for row in states),
    )
