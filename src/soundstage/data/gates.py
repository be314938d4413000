"""Stage "gate": which clips are good enough, by named limits on the numbers of a scan; and how limits are chosen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from soundstage.core.errors import one_of
from soundstage.data.flow import Drop, Flow, Item
from soundstage.data.traces import MEASURES

__all__ = ["LIMITS", "Gate", "Limit", "Verdict", "calibrate", "gate_of", "judge", "report", "table"]

SYNC = {"lag": "ms of sound before or behind picture, unsigned", "sure": "confidence in it, 0 to 1"}


@dataclass(frozen=True)
class Limit:
    """A measure below `least` or above `most` is a reason to reject; with neither, it never is.

    where: (measure, least): asked only of clips whose measure reaches that. needed: a clip without the measure is
    rejected; otherwise what is not known is not held against it.
    """

    measure: str
    least: float | None = None
    most: float | None = None
    where: tuple[str, float] | None = None
    needed: bool = False

    def __post_init__(self) -> None:
        for name in (self.measure, *(self.where or ())[:1]):
            if name not in MEASURES and name not in SYNC:
                raise one_of("limit: measure", name, [*MEASURES, *SYNC])


LIMITS: Mapping[str, Limit] = {
    "no picture": Limit("lines", least=1, needed=True),
    "no sound": Limit("sample_rate", least=1, needed=True),
    "short": Limit("seconds", least=2.99),
    "long": Limit("seconds", most=60.0),
    "small": Limit("lines", least=480),
    "few frames": Limit("fps", least=23.0),
    "cut": Limit("cuts", most=0),
    "black": Limit("black", most=0.2),
    "blank": Limit("blank", most=0.5),
    "overexposed": Limit("bright", most=0.5),
    "underexposed": Limit("dark", most=0.9),
    "frozen": Limit("static", most=0.9),
    "still": Limit("motion", least=0.001),
    "shaken": Limit("shake", most=2.0),
    "barred": Limit("bars", most=0.1),
    "blurred": Limit("blur", most=3.0),
    "blocky": Limit("blocks", most=0.1),
    "written on": Limit("text", most=0.02),
    "low rate": Limit("sample_rate", least=16_000),
    "silent": Limit("loudness", least=-60.0),
    "pausing": Limit("silence", most=0.5),
    "muffled": Limit("bandwidth", least=7_000),
    "clipped": Limit("clipped", most=0.002),
    "offset": Limit("dc", most=0.03),
    "cancelling": Limit("phase", least=-0.6),
    "one-sided": Limit("balance", most=30.0),
    "noisy": Limit("snr", least=10.0, where=("speech", 0.6)),
    "out of sync": Limit("lag", most=120.0, where=("sure", 0.9)),
}
"""By reason, the most telling first: a clip is rejected by the first that it does not meet."""


class Verdict(NamedTuple):
    """Of N clips. reason: (N,) object, the first limit that rejects, None for a kept clip; score: what decided."""

    reason: np.ndarray
    score: np.ndarray


@dataclass(frozen=True)
class Gate:
    """Rejects an item at the first limit that its facts "scan" and "sync" do not meet; nothing is decoded."""

    limits: Mapping[str, Limit] = field(default_factory=lambda: dict(LIMITS))
    version: ClassVar[int] = 1

    def __call__(self, item: Item, folder: Path) -> Iterable[Item | Drop]:  # noqa: ARG002
        reason, score = judge(table([item.facts]), self.limits)
        if reason[0] is None:
            yield item
        else:
            told = float(score[0])
            yield Drop(item, reason[0], round(told, 5) if np.isfinite(told) else None)


def gate_of(flow: Flow) -> str | None:
    """The name of a flow's gate."""
    return next((name for name, stage in flow.stages.items() if isinstance(stage, Gate)), None)


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


def judge(columns: Mapping[str, np.ndarray], limits: Mapping[str, Limit] = LIMITS) -> Verdict:
    """The verdict on all clips of a table at once."""
    count = len(next(iter(columns.values())))
    reason, score = np.full(count, None, object), np.full(count, np.nan)
    kept = np.ones(count, bool)
    for name, limit in limits.items():
        value = columns[limit.measure]
        bad = _beyond(value, limit) & kept
        if limit.where:
            bad &= columns[limit.where[0]] >= limit.where[1]
        reason[bad], score[bad] = name, value[bad]
        kept &= ~bad
    return Verdict(reason, score)


def report(columns: Mapping[str, np.ndarray], limits: Mapping[str, Limit] = LIMITS) -> dict[str, int]:
    """How many clips each limit rejects first, and how many are "kept"; the sum is the number of clips."""
    counted = Counter(judge(columns, limits).reason.tolist())
    return {"kept": counted[None]} | {name: counted[name] for name in limits if counted[name]}


def calibrate(
    columns: Mapping[str, np.ndarray],
    limits: Mapping[str, Limit] = LIMITS,
    percentiles: Sequence[float] = (1, 5, 10, 25, 50, 75, 90, 95, 99),
) -> list[dict[str, Any]]:
    """How the limits lie in one's own data: for each, the measure's percentiles and the share it rejects by itself.

    "known": clips that have the measure (and are asked); "rejected": share of those beyond the limit.
    """
    rows = []
    for reason, limit in limits.items():
        value = columns[limit.measure]
        if limit.where:
            value = value[columns[limit.where[0]] >= limit.where[1]]
        known = value[np.isfinite(value)]
        curve = np.percentile(known, percentiles).round(5).tolist() if len(known) else [None] * len(percentiles)
        row = {"reason": reason, "measure": limit.measure, "least": limit.least, "most": limit.most}
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
