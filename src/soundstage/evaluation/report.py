"""A report of a suite: every figure with its interval, its N and its floor, and what it was measured on."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from soundstage import __version__
from soundstage.core.system import System, weight_files
from soundstage.evaluation.frechet import frechet_distance, frechet_floor, polynomial_mmd
from soundstage.evaluation.metric import Figure, Score, summarise
from soundstage.evaluation.oracle import FIGURES
from soundstage.evaluation.suite import REAL, Record

EVENTS = ("bounce", "metronome", "drums")
FEWEST_FOR_A_DISTANCE = 64
AS_SETS = ("model", "clips")  # rows that are as independent of the real clips as a set can be

# What shipped weights must reach on bounce, metronome and drums: figure, bound, and whether it is a least value.
REQUIRED = (
    ("f1@45", 0.8, True),
    ("abs_offset_ms", 25.0, False),
    ("pitch_semitones", 1.0, False),
    ("colour", 0.95, True),
    ("kind", 0.95, True),
)


@dataclass(frozen=True)
class Report:
    """settings: what was scored and on what. rows: row -> group ("all", "events" or a kind) -> figure -> Score.

    distances: row -> distances of its set of clips from the real ones.
    """

    settings: dict[str, Any]
    rows: dict[str, dict[str, dict[str, Score]]]
    distances: dict[str, dict[str, float]]

    def get(self, row: str, figure: str, group: str = "all") -> Score | None:
        """One score, or None where it was not measured."""
        return self.rows.get(row, {}).get(group, {}).get(figure)


def build(records: Sequence[Record], settings: Mapping[str, Any], figures: Sequence[Figure] = FIGURES) -> Report:
    """Sum up the records of a suite; intervals by resampling clips with a fixed seed."""
    by_row: dict[str, list[Record]] = {}
    for record in records:
        by_row.setdefault(record["row"], []).append(record)
    floors: dict[str, dict[str, Score]] = {}
    rows = {}
    for row in sorted(by_row, key=lambda name: (name != REAL, list(by_row).index(name))):
        groups = {name: _sum_up(part, figures, floors.get(name, {})) for name, part in _groups(by_row[row]).items()}
        rows[row] = groups
        if row == REAL:
            floors = groups
    rows = {row: rows[row] for row in sorted(rows, key=_order)}
    return Report(dict(settings), rows, _distances(by_row))


def _order(row: str) -> tuple[bool, str]:
    return row.startswith("real"), row


def _groups(records: Sequence[Record]) -> dict[str, list[Record]]:
    kinds = dict.fromkeys(record["kind"] for record in records)
    groups = {"all": list(records), "events": [record for record in records if record["kind"] in EVENTS]}
    groups |= {kind: [record for record in records if record["kind"] == kind] for kind in kinds}
    return {name: part for name, part in groups.items() if part}


def _sum_up(records: Sequence[Record], figures: Sequence[Figure], floors: Mapping[str, Score]) -> dict[str, Score]:
    scores = {}
    for figure in figures:
        values = [record["scores"][figure.key] for record in records if figure.key in record["scores"]]
        floor = floors.get(figure.key)
        score = summarise(figure, values, None if floor is None else floor.value)
        if score is not None:
            scores[figure.key] = score
    return scores


def _distances(by_row: Mapping[str, Sequence[Record]]) -> dict[str, dict[str, float]]:
    real = np.array([record["features"] for record in by_row.get(REAL, ())])
    if len(real) < FEWEST_FOR_A_DISTANCE:
        return {}
    mean, spread = real.mean(axis=0), real.std(axis=0) + 1e-6
    real = (real - mean) / spread
    out = {f"{REAL}, one half against the other": {"frechet": frechet_floor(real), "mmd": 0.0, "n": len(real) // 2}}
    for row in AS_SETS:
        made = np.array([record["features"] for record in by_row.get(row, ())])
        if len(made) >= FEWEST_FOR_A_DISTANCE:
            made = (made - mean) / spread
            distances = {"frechet": frechet_distance(made, real), "mmd": polynomial_mmd(made, real), "n": len(made)}
            out[row] = distances
    return out


def environment() -> dict[str, Any]:
    """What the figures were made on: version, commit, processor, threads, accelerator."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "soundstage": __version__,
        "commit": _commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
    }


def fingerprint(system: System) -> str | None:
    """First 12 digits of the SHA-256 of a loaded system's weight files; None where it has no folder."""
    folder = system.info.get("folder")
    if folder is None:
        return None
    digest = hashlib.sha256()
    for path in weight_files(Path(folder)):
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()[:12]


def _commit() -> str | None:
    """Of the checkout this file lies in; None where there is none."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=12", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def as_json(report: Report) -> dict[str, Any]:
    """A JSON value: settings, rows, distances, required."""
    rows = {
        row: {group: {key: _plain(score) for key, score in scores.items()} for group, scores in groups.items()}
        for row, groups in report.rows.items()
    }
    checks = [{"row": r, "figure": k, "bound": b, "value": v, "reached": ok} for r, k, b, v, ok in required(report)]
    return {"settings": report.settings, "rows": rows, "distances": report.distances, "required": checks}


def _plain(score: Score) -> dict[str, Any]:
    out = {"value": score.value, "low": score.low, "high": score.high, "n": score.num, "floor": score.floor}
    return {**{k: round(v, 6) if isinstance(v, float) else v for k, v in out.items()}, "unit": score.figure.unit}


def required(report: Report) -> list[tuple[str, str, float, float | None, bool]]:
    """(row, figure, bound, value, reached) of what shipped weights must reach; empty without a model.

    A figure that could not be measured is not reached. a2v and v2a must be no worse than joint: their F1 at 45 ms is at
    least the joint one, within its interval.
    """
    checks: list[tuple[str, str, float, float | None, bool]] = []
    for key, bound, least in REQUIRED if "events" in report.rows.get("model", {}) else ():
        score = report.get("model", key, "events")
        reached = score is not None and (score.value >= bound if least else score.value <= bound)
        checks.append(("model", key, bound, None if score is None else score.value, reached))
    joint = report.get("model", "f1@45", "events")
    for row in ("model, a2v", "model, v2a"):
        score = report.get(row, "f1@45", "events")
        if joint is not None and score is not None:
            checks.append((row, "f1@45", joint.low, score.value, score.value >= joint.low))
    return checks
