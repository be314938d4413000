"""Runs that are killed at random moments, whole or one of their workers: what is lost, doubled, damaged or wasted.

    python benchmarks/kills.py --kills 100 --out benchmarks/results/kills.json
    python benchmarks/kills.py --kills 100 --ledger postgresql://USER@HOST/EMPTY

It ends with an error where the dataset differs in a byte from that of a quiet run.
"""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from measure import commit, machine, today

from soundstage.testing.kills import compare, disturb, undisturbed

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def command(
    kills: Annotated[int, typer.Option(min=1, help="At random moments.")] = 100,
    items: Annotated[int, typer.Option(min=10, help="That enter; enough to outlast the kills.")] = 1500,
    workers: Annotated[int, typer.Option(min=1)] = 3,
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 0,
    ledger: Annotated[str | None, typer.Option(help="An empty PostgreSQL database; default SQLite.")] = None,
    out: Annotated[Path | None, typer.Option(help="File for the figures, as JSON.")] = None,
) -> None:
    """Kill a run again and again, compare what it made with a quiet run's, and write the figures as JSON."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        calm, wild = Path(scratch) / "calm", Path(scratch) / "wild"
        where, start = ledger or wild / "set", time.monotonic()
        report = disturb(
            where,
            wild,
            items,
            kills,
            seed=seed,
            workers=workers,
            on_kill=lambda count: typer.echo(f"  kill {count} at {time.monotonic() - start:.1f} s", err=True),
        )
        undisturbed(calm / "set", calm, items)
        compare(where, wild, calm)
    told = {"benchmark": "kills", "date": today(), **commit(), "machine": machine(torch.device("cpu"))}
    told |= {"database": "postgresql" if ledger else "sqlite", "workers": workers, "seed": seed}
    told |= {**asdict(report), "seconds": round(report.seconds, 1), "wasted": report.wasted}
    told |= {"lost": 0, "doubled": 0, "damaged": 0}  # or compare would have raised
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    typer.echo(
        f"{sum(report.kills.values())} kills in {report.seconds:.0f} s, {report.tasks} tasks: nothing lost, doubled or "
        f"damaged; {report.wasted} calls wasted of {report.allowed} allowed"
    )


if __name__ == "__main__":
    app()
