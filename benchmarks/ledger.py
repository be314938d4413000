"""How many items a second the ledger takes: added, claimed and committed, run through workers, counted again.

    python benchmarks/ledger.py --out benchmarks/results/ledger.json
    python benchmarks/ledger.py --ledger postgresql://USER@HOST/EMPTY --out benchmarks/results/ledger-postgres.json

Seconds are given by the processor (this process alone) and on the wall, which other programs lengthen.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from measure import commit, machine, table, today

from soundstage.data.attempt import Work
from soundstage.data.claims import Claims
from soundstage.data.flow import Flow
from soundstage.data.ledger import Ledger
from soundstage.data.runner import run
from soundstage.testing.stages import Gate, numbers

app = typer.Typer(add_completion=False, rich_markup_mode=None)
Row = dict[str, Any]


@app.command()
def command(
    items: Annotated[int, typer.Option(min=100, help="Of each case.")] = 10_000,
    batches: Annotated[str, typer.Option(help="Sizes of claims and commits.")] = "1,8,32,128",
    workers: Annotated[int, typer.Option(min=1, help="Of the runs.")] = 2,
    ledger: Annotated[str | None, typer.Option(help="An empty PostgreSQL database; default SQLite.")] = None,
    folder: Annotated[Path | None, typer.Option(help="On the disk to measure; default the temporary one.")] = None,
    out: Annotated[Path | None, typer.Option(help="File for the figures, as JSON.")] = None,
) -> None:
    """Time the ledger, print a table, and write the figures as JSON."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        rows = measure(ledger or Path(scratch) / "set", Path(scratch) / "set", items, batches, workers)
    kind = "postgresql" if ledger else "sqlite"
    about = {"benchmark": "ledger", "date": today(), **commit(), "machine": machine(torch.device("cpu"))}
    report = {**about, "database": kind, "workers": workers, "rows": rows}
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    typer.echo(table(rows, COLUMNS))


def measure(where: str | Path, folder: Path, items: int, batches: str, workers: int) -> list[Row]:
    """A row per case."""
    rows: list[Row] = []

    def case(name: str, count: int, work: Callable[[], Any], **more: Any) -> None:  # noqa: ANN401
        wall, own = time.perf_counter(), time.process_time()
        work()
        wall, own = time.perf_counter() - wall, time.process_time() - own
        rows.append({"case": name, **more, "items": count, "seconds": wall, "processor_seconds": own})
        typer.echo(f"  {name}: {count / wall:.0f}/s on the wall, {count / own:.0f}/s by the processor", err=True)

    with Ledger.open(where, folder) as ledger:
        case("add", items, lambda: ledger.add(numbers(items)))
        for size in map(int, batches.split(",")):
            flow = Flow({f"by{size}": Gate()})
            claims = Claims(ledger)
            case("plan", items, lambda flow=flow, claims=claims: claims.want(flow), batch=size)
            few = min(items, max(200, 100 * size))
            case("claim, attempt, commit", few, lambda a=(claims, flow, size, few): _through(*a), batch=size)
            claims.close()
        flow = Flow({"gate": Gate(even=True), "twice": Gate()})
        case("run of two stages", items + items // 2, lambda: run(flow, ledger, workers=workers))
        case("run with nothing to do", items, lambda: run(flow, ledger, workers=workers))
        case("funnel", items, lambda: ledger.funnel(flow))
        case("results", items // 2, lambda: ledger.results(flow))
        changed = Flow({**flow.stages, "gate": replace(flow.stages["gate"], even=False)})  # type: ignore[type-var]
        case("run after a change", items + items // 2, lambda: run(changed, ledger, workers=workers))
    return [{key: float(f"{v:.4g}") if isinstance(v, float) else v for key, v in row.items()} for row in rows]


def _through(claims: Claims, flow: Flow, size: int, count: int) -> None:
    """Claim and commit in this process, with a stage that does next to nothing and keeps its item."""
    work, done = Work(flow, claims.ledger.folder, claims.owner), 0
    while done < count:
        jobs = claims.claim(flow, size)
        claims.commit(flow, [(job, work(job)) for job in jobs])
        done += len(jobs)


COLUMNS: dict[str, Callable[[Row], str]] = {
    "case": lambda row: str(row["case"]),
    "batch": lambda row: str(row.get("batch", "")),
    "items": lambda row: str(row["items"]),
    "items/s on the wall": lambda row: f"{row['items'] / row['seconds']:.0f}",
    "items/s by the processor": lambda row: f"{row['items'] / row['processor_seconds']:.0f}",
    "seconds on the wall": lambda row: f"{row['seconds']:.3g}",
}

if __name__ == "__main__":
    app()
