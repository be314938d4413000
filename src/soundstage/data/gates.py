"""Stage "gate": which clips are good enough, by named limits on the numbers of a scan; and how limits are chosen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from soundstage.core.errors import one_of
from soundstage.data.flow import Drop, Item
from soundstage.data.traces import MEASURES

__all__ = ["LIMITS", "Gate", "Limit", "Verdict", "calibrate", "judge", "report", "table"]

SYNC = {"lag": "ms of sound before or behind picture, unsigned", "sure": "confidence in it, 0 to 1"}


@dataclass(frozen=True)
class Limit:
    """One reason to reject: a measure below `least` or above `most`.

    where: (measure, least): asked only of clips whose measure reaches that. needed: a clip without the measure is
    rejected; otherwise what is not known is not held against it.
    """

    reason: str
    measure: str
    least: float | None = None
    most: float | None = None
    where: tuple[str, float] | None = None
    needed: bool = False

    def __post_init__(self) -> None:
        for name in (self.measure, *(self.where or ())[:1]):
            if name not in MEASURES and name not in SYNC:
                raise one_of(f"limit {self.reason!r}: measure", name, [*MEASURES, *SYNC])


LIMITS = (
    Limit("no picture", "lines", least=1, needed=True),
    Limit("no sound", "sample_rate", least=1, needed=True),
    Limit("short", "seconds", least=2.99),
    Limit("long", "seconds", most=60.0),
    Limit("small", "lines", least=480),
    Limit("few frames", "fps", least=23.0),
    Limit("cut", "cuts", most=0),
    Limit("black", "black", most=0.2),
    Limit("blank", "blank", most=0.5),
    Limit("overexposed", "bright", most=0.5),
    Limit("underexposed", "dark", most=0.9),
    Limit("frozen", "static", most=0.9),
    Limit("still", "motion", least=0.001),
    Limit("shaken", "shake", most=2.0),
    Limit("barred", "bars", most=0.1),
    Limit("blurred", "blur", most=3.0),
    Limit("blocky", "blocks", most=0.1),
    Limit("written on", "text", most=0.02),
    Limit("low rate", "sample_rate", least=16_000),
    Limit("silent", "loudness", least=-60.0),
    Limit("pausing", "silence", most=0.5),
    Limit("muffled", "bandwidth", least=7_000),
    Limit("clipped", "clipped", most=0.002),
    Limit("offset", "dc", most=0.03),
    Limit("cancelling", "phase", least=-0.6),
    Limit("one-sided", "balance", most=30.0),
    Limit("noisy", "snr", least=10.0, where=("speech", 0.6)),
    Limit("out of sync", "lag", most=120.0, where=("sure", 0.9)),
)


class Verdict(NamedTuple):
    """Of N clips. reason: (N,) index of the first limit that rejects, -1 for a kept clip; score: what decided."""

    reason: np.ndarray
    score: np.ndarray


@dataclass(frozen=True)
class Gate:
    """Rejects an item at the first limit that its facts "scan" and "sync" do not meet; nothing is decoded."""

    limits: tuple[Limit, ...] = LIMITS
    version: ClassVar[int] = 1

    def __call__(self, item: Item, folder: Path) -> Iterable[Item | Drop]:  # noqa: ARG002
        reason, score = judge(table([item.facts]), self.limits)
        if reason[0] < 0:
            yield item
        else:
            told = float(score[0])
            yield Drop(item, self.limits[reason[0]].reason, round(told, 5) if np.isfinite(told) else None)


def table(facts: Iterable[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Facts of N items -> (N,) float64 of each measure, nan where it is not known."""
    rows = list(facts)
    scans = [row.get("scan") or {} for row in rows]
    nan = float("nan")
    columns = {name: np.array([scan.get(name, nan) for scan in scans], float) for name in MEASURES}
    syncs = [row.get("sync") or {} for row in rows]
    columns["lag"] = np.abs(np.array([sync.get("lag_ms", nan) for sync in syncs], float))
    columns["sure"] = np.array([sync.get("confidence", nan) for sync in syncs], float)
    return columns


def judge(columns: Mapping[str, np.ndarray], limits: Sequence[Limit] = LIMITS) -> Verdict:
    """The verdict on all clips of a table at once."""
    count = len(next(iter(columns.values())))
    reason, score = np.full(count, -1), np.full(count, np.nan)
    for index, limit in enumerate(limits):
        value = columns[limit.measure]
        bad = _beyond(value, limit) & (reason < 0)
        if limit.where:
            bad &= columns[limit.where[0]] >= limit.where[1]
        reason[bad], score[bad] = index, value[bad]
    return Verdict(reason, score)


def report(columns: Mapping[str, np.ndarray], limits: Sequence[Limit] = LIMITS) -> dict[str, int]:
    """How many clips each limit rejects first, and how many are "kept"; the sum is the number of clips."""
    counted = Counter(judge(columns, limits).reason.tolist())
    return {"kept": counted[-1]} | {limit.reason: counted[i] for i, limit in enumerate(limits) if counted[i]}


def calibrate(
    columns: Mapping[str, np.ndarray],
    limits: Sequence[Limit] = LIMITS,
    percentiles: Sequence[float] = (1, 5, 10, 25, 50, 75, 90, 95, 99),
) -> list[dict[str, Any]]:
    """How the limits lie in one's own data: for each, the measure's percentiles and the share it rejects by itself.

    "known": clips that have the measure (and are asked); "rejected": share of those beyond the limit.
    """
    rows = []
    for limit in limits:
        value = columns[limit.measure]
        if limit.where:
            value = value[columns[limit.where[0]] >= limit.where[1]]
        known = value[np.isfinite(value)]
        curve = np.percentile(known, percentiles).round(5).tolist() if len(known) else [None] * len(percentiles)
        row = {"reason": limit.reason, "measure": limit.measure, "least": limit.least, "most": limit.most}
        row |= {"known": len(known), "rejected": float(_beyond(value, limit).mean()) if len(value) else 0.0}
        rows.append(row | {"percentiles": dict(zip(map(str, percentiles), curve, strict=True))})
    return rows


def _beyond(value: np.ndarray, limit: Limit) -> np.ndarray:
    bad = ~np.isfinite(value) if limit.needed else np.zeros(len(value), bool)
    if limit.least is not None:
        bad |= value < limit.least
    if limit.most is not None:
        bad |= value > limit.most
    return bad
