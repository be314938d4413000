"""A report as Markdown and as files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from soundstage.evaluation.metric import Score
from soundstage.evaluation.oracle import FIGURES
from soundstage.evaluation.report import EVENTS, Report, as_json, required

ROWS = ("f1@20", "f1@45", "f1@90", "f1@125", "chance_f1@45", "abs_offset_ms", "offset_ms")
CONTENT = (
    "kind",
    "colour",
    "size",
    "shape",
    "material",
    "count",
    "pattern",
    "trend",
    "side",
    "tempo_error_pct",
    "pitch_semitones",
)
KINDS = (
    "f1@45",
    "abs_offset_ms",
    "abs_lag_ms",
    "correlation",
    "kind",
    "colour",
    "count",
    "count_heard",
    "pattern_heard",
    "pitch_semitones",
)
FIGURE = {figure.key: figure for figure in FIGURES}


def write(report: Report, out: Path) -> tuple[Path, Path]:
    """report.json and report.md in a folder."""
    paths = out / "report.json", out / "report.md"
    paths[0].write_text(json.dumps(as_json(report), indent=1) + "\n", encoding="utf-8")
    paths[1].write_text(markdown(report), encoding="utf-8")
    return paths


def markdown(report: Report) -> str:
    """Sync and content of every row, each kind of the subject, what is required, distances, and the settings."""
    subject = next(iter(report.rows), "")
    parts = ["# Suite world", _settings(report.settings)]
    parts.append(
        "Each cell: value (95 % interval by resampling clips), N. The rows of real clips are the floor of the "
        "measurement; the rows with another clip's sound are chance."
    )
    for group, title in (("events", ", ".join(EVENTS)), ("all", "all kinds")):
        parts += [f"## Sync: {title}", _by_row(report, group, ROWS)]
    parts += ["## Content: all kinds", _by_row(report, "all", CONTENT)]
    kinds = [group for group in report.rows.get(subject, {}) if group not in ("all", "events")]
    body = [[kind, *(_cell(report.get(subject, key, kind)) for key in KINDS)] for kind in kinds]
    parts += [f"## Kinds: {subject}", table(("kind", *map(_label, KINDS)), body)]
    checks = [
        [row, _label(key), f"{bound:.3g}", _plain(value), "yes" if reached else "no"]
        for row, key, bound, value, reached in required(report)
    ]
    if checks:
        head = ("row", "figure", "bound", "value", "reached")
        parts += [f"## Required of shipped weights ({', '.join(EVENTS)})", table(head, checks)]
    if report.distances:
        body = [[row, f"{d['frechet']:.2f}", f"{d['mmd']:.4f}", f"{d['n']:.0f}"] for row, d in report.distances.items()]
        parts += [
            "## Distance from real clips (38-value descriptor, unit variance)",
            table(("row", "Fréchet distance", "unbiased MMD", "N"), body),
        ]
    return "\n\n".join(parts) + "\n"


def summary(report: Report) -> str:
    """The few figures worth a terminal, as aligned columns: every row, and what is required."""
    group = "events" if any("events" in groups for groups in report.rows.values()) else "all"
    keys = ("f1@45", "abs_offset_ms", "kind", "colour", "pitch_semitones")
    lines = [[", ".join(EVENTS) if group == "events" else "all kinds", "N", *map(_label, keys)]]
    for row, groups in report.rows.items():
        scores = [report.get(row, key, group) for key in keys]
        if group in groups:
            num = max((score.num for score in scores if score), default=0)
            lines.append([row, str(num), *("-" if s is None else f"{s.value:.3g}" for s in scores)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ["  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    for row, key, bound, value, reached in required(report):
        verdict = "reached" if reached else "NOT reached"
        text.append(f"{row}: {_label(key)} {_plain(value)}, required {bound:.3g}: {verdict}")
    return "\n".join(text)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows))


def _by_row(report: Report, group: str, keys: Sequence[str]) -> str:
    used = [key for key in keys if any(report.get(row, key, group) for row in report.rows)]
    body = [
        [row, *(_cell(report.get(row, key, group)) for key in used)] for row in report.rows if group in report.rows[row]
    ]
    return table(("row", *map(_label, used)), body)


def _settings(settings: Mapping[str, object]) -> str:
    return "\n".join(f"- {key}: {value}" for key, value in settings.items() if value is not None)


def _label(key: str) -> str:
    figure = FIGURE[key]
    return figure.label + (f" [{figure.unit}]" if figure.unit else "")


def _plain(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3g}"


def _cell(score: Score | None) -> str:
    """ "0.91 (0.88 to 0.94), 60", or a dash where nothing was measured."""
    if score is None:
        return "-"
    digits = 1 if score.figure.unit == "ms" and abs(score.value) >= 1 else 2
    return f"{score.value:.{digits}f} ({score.low:.{digits}f} to {score.high:.{digits}f}), {score.num}"
