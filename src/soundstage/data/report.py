"""A dataset to look at: one HTML page with the funnel, every measure beside its limits, and clips kept and rejected."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from soundstage.core.errors import ConfigError
from soundstage.data.captions import data_url, pictures
from soundstage.data.flow import Flow, Item
from soundstage.data.gates import Limit, gate_of, table
from soundstage.data.ledger import Ledger
from soundstage.media.errors import MediaError

if TYPE_CHECKING:
    from soundstage.data.reach import Count

SIDE = 160  # pixels of a thumbnail's longer side
BINS = 40

STYLE = """
:root { color-scheme: light dark; --line: #8884; --good: #2a9d5c; --bad: #c8452f; --soft: #8882; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2 { font-weight: 600; line-height: 1.2; } h2 { margin-top: 2.5rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .25rem .75rem; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child, td:last-child, th:last-child { text-align: left; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); gap: 1rem; }
.clips { grid-template-columns: repeat(auto-fill, minmax(10rem, 1fr)); }
.sides { display: grid; grid-template-columns: 1fr 1fr; gap: 2rem; }
figure { margin: 0; } figcaption { font-size: .8rem; overflow-wrap: anywhere; }
img, .none { width: 100%; aspect-ratio: 16 / 9; object-fit: contain; background: var(--soft); border-radius: 4px; }
.none { display: grid; place-items: center; font-size: .8rem; }
.bar { fill: #6a8fc5; } .limit { stroke: var(--bad); stroke-width: 2; } .kept { color: var(--good); }
.gone { color: var(--bad); } small { opacity: .75; }
"""


def write_report(
    ledger: Ledger,
    flow: Flow,
    path: Path,
    *,
    clips: int = 24,
    on_clip: Callable[[int, int], None] | None = None,
) -> Path:
    """The page of a dataset as it is now; returns its path. It needs no other file and no network.

    clips: thumbnails of each, kept and rejected, by the order of their ids. on_clip(done, total) as they are decoded.
    """
    parts = [f"<h2>Funnel</h2>{_funnel(ledger.funnel(flow))}"]
    gate = gate_of(flow)
    if gate is not None:
        limits: Mapping[str, Limit] = flow.stages[gate].limits  # type: ignore[union-attr]
        judged = table(item.facts for item in ledger.entering(flow, gate))
        parts.append(f"<h2>Measures</h2><div class=grid>{_histograms(judged, limits)}</div>")
        kept = [(item, "") for item in ledger.results(flow, gate)]
        gone = [(each.item, _why(each.reason, each.score)) for each in ledger.dropped(flow, gate)]
        shown = _sides(kept, gone, clips, on_clip)
        parts.append(f"<h2>Clips</h2>{shown}")
    page = (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{html.escape(ledger.folder.name)}</title><style>{STYLE}</style>"
        f"<h1>{html.escape(ledger.folder.name)}</h1>{''.join(parts)}</html>\n"
    )
    aside = path.with_name(f".{path.name}.part")
    aside.write_text(page, encoding="utf-8")
    return aside.replace(path)


def _funnel(lines: Iterable[Count]) -> str:
    heads = ("stage", "entered", "passed", "dropped", "quarantine", "failed", "waiting", "why")
    rows = []
    for line in lines:
        reasons = sorted(line.dropped.items(), key=lambda pair: -pair[1])
        cells = [line.name, line.entered, line.passed, sum(line.dropped.values())]
        cells += [line.poisoned, line.failed, line.waiting, ", ".join(f"{n} {reason}" for reason, n in reasons)]
        rows.append("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{name}</th>" for name in heads)
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def _histograms(columns: Mapping[str, np.ndarray], limits: Mapping[str, Limit]) -> str:
    """A plot per measure that some limit reads, with its limits as lines."""
    if not len(next(iter(columns.values()))):
        return "<p>Nothing was measured yet.</p>"
    found = []
    for measure in dict.fromkeys(limit.measure for limit in limits.values()):
        values = columns[measure][np.isfinite(columns[measure])]
        reading = [(reason, limit) for reason, limit in limits.items() if limit.measure == measure]
        bounds = [(reason, x) for reason, limit in reading for x in (limit.least, limit.most)]
        if len(values):
            found.append(_plot(measure, values, [(reason, x) for reason, x in bounds if x is not None]))
    return "".join(found)


def _plot(name: str, values: np.ndarray, bounds: Sequence[tuple[str, float]]) -> str:
    """An SVG of 200 x 90; what lies beyond the 99th percentile on either side falls into the last bins."""
    low, high = (float(x) for x in np.percentile(values, (1, 99)))
    low, high = min([low, *(x for _, x in bounds)]), max([high, *(x for _, x in bounds)])
    room = (high - low) * 0.05 or max(abs(high), 1.0) * 0.05
    low, high = low - room, high + room
    counts = np.histogram(np.clip(values, low, high), BINS, (low, high))[0]
    top = max(1, int(counts.max()))
    bars = "".join(
        f"<rect class=bar x={5 * i} y={80 - 75 * n / top:.1f} width=4.5 height={75 * n / top:.1f} />"
        for i, n in enumerate(counts)
        if n
    )
    lines = "".join(
        f"<line class=limit x1={200 * (x - low) / (high - low):.1f} x2={200 * (x - low) / (high - low):.1f} y1=0 y2=80>"
        f"<title>{html.escape(reason)}: {x:g}</title></line>"
        for reason, x in bounds
    )
    told = f"{html.escape(name)} <small>median {np.median(values):.3g}, N = {len(values)}</small>"
    return f"<figure><svg viewBox='0 0 200 82' role=img>{bars}{lines}</svg><figcaption>{told}</figcaption></figure>"


def _why(reason: str, score: float | None) -> str:
    return reason if score is None else f"{reason} ({score:.3g})"


def _sides(
    kept: Sequence[tuple[Item, str]],
    gone: Sequence[tuple[Item, str]],
    clips: int,
    on_clip: Callable[[int, int], None] | None,
) -> str:
    """Kept clips on the left, rejected ones on the right."""
    total, done, sides = len(kept[:clips]) + len(gone[:clips]), 0, []
    for title, colour, group in (("kept", "kept", kept), ("rejected", "gone", gone)):
        figures = []
        for item, why in group[:clips]:
            figures.append(_thumbnail(item, why))
            done += 1
            if on_clip is not None:
                on_clip(done, total)
        head = f"<h3 class={colour}>{title}: {len(group)}</h3>"
        sides.append(f"<section>{head}<div class='grid clips'>{''.join(figures)}</div></section>")
    return f"<div class=sides>{''.join(sides)}</div>"


def _thumbnail(item: Item, why: str) -> str:
    span = item.facts.get("span")
    told = " ".join(
        str(part) for part in (why, item.facts.get("caption"), f"{span[0]:g}-{span[1]:g} s" if span else "") if part
    )
    caption = f"<figcaption>{html.escape(told)} <small>{item.id[:8]}</small></figcaption>"
    try:
        image: Any = f"<img alt='' src='{data_url(pictures(item, 1, SIDE)[0])}'>"
    except (MediaError, ConfigError, OSError, KeyError):
        image = "<div class=none>no picture</div>"
    return f"<figure>{image}{caption}</figure>"
