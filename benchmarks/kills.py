"""Runs that are killed at random moments, whole or one of their workers: what is lost, doubled, damaged or repeated.

    python benchmarks/kills.py --kills 100 --out benchmarks/results/kills.json

Small films, one of twenty broken, are measured, judged, encoded and packed into shards: on SQLite, on PostgreSQL whose
server is stopped, crashed and started again meanwhile (where it is installed), and on a disk that is full now and then
(where one may be mounted). It ends with an error where a dataset differs in a byte from that of a quiet run, where the
quarantine is not what was broken, or where a kill cost more than one batch.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from soundstage.testing.disks import small_disk
from soundstage.testing.kills import BATCH, Case, Report, Trouble, compare, disturb, undisturbed
from soundstage.testing.postgres import missing_programs, postgres_server

app = typer.Typer(add_completion=False, rich_markup_mode=None)
ROUNDS = ("sqlite", "postgresql", "full disk")
Setting = tuple[str | Path, Path, dict[str, Trouble]]
"""The ledger, the folder, and what befalls a run beside kills."""


@app.command()
def command(
    kills: Annotated[int, typer.Option(min=1, help="Of each round, at random moments.")] = 100,
    items: Annotated[int, typer.Option(min=20, help="Films that enter.")] = 240,
    workers: Annotated[int, typer.Option(min=1)] = 3,
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 0,
    rounds: Annotated[str, typer.Option(help="Which of them.")] = ",".join(ROUNDS),
    megabytes: Annotated[int, typer.Option(min=16, help="Of the disk that is filled.")] = 32,
    out: Annotated[Path | None, typer.Option(help="File for the figures, as JSON.")] = None,
) -> None:
    """Kill runs again and again, compare what they made with a quiet run's, and write the figures as JSON."""
    import torch  # here, since every worker imports this module
    from measure import commit, machine, today

    from soundstage.testing.films import films

    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as text:
        scratch = Path(text)
        case = films(scratch / "raw", items)
        start = time.monotonic()
        calls = undisturbed(case, scratch / "calm" / "set", scratch / "calm", workers)
        quiet = time.monotonic() - start
        typer.echo(f"quiet: {calls} calls in {quiet:.0f} s", err=True)
        for name in rounds.split(","):
            with setting(name, scratch / name.replace(" ", "-"), megabytes) as found:
                rows.append(disturbed(name, case, found, scratch, calls, kills, seed, workers))
    told = {"benchmark": "kills", "date": today(), **commit(), "machine": machine(torch.device("cpu"))}
    told |= {"items": items, "broken": len(case.broken), "workers": workers, "batch": BATCH, "seed": seed}
    told |= {"quiet_seconds": round(quiet, 1), "rounds": rows}
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


@contextmanager
def setting(name: str, folder: Path, megabytes: int) -> Iterator[Setting]:
    """Where a round takes place."""
    with ExitStack() as stack:
        if name == "postgresql":
            if missing := missing_programs():
                raise typer.BadParameter(f"--rounds: {', '.join(missing)} not on PATH; install postgresql")
            server = stack.enter_context(postgres_server())
            yield server.database(), folder, {mode: Trouble(partial(server.restart, mode)) for mode in STOPS}
        elif name == "full disk":
            disk = stack.enter_context(small_disk(folder, megabytes))
            yield disk.folder / "set", disk.folder, {"full disk": Trouble(disk.fill, disk.relieve)}
        elif name == "sqlite":
            yield folder / "set", folder, {}
        else:
            raise typer.BadParameter(f"--rounds: {name!r} is not one of {', '.join(ROUNDS)}")


STOPS = ("fast", "immediate")
"""How the server ends: told to, or as by a crash."""


def disturbed(
    name: str, case: Case, found: Setting, scratch: Path, calls: int, kills: int, seed: int, workers: int
) -> dict[str, Any]:
    """A round, and its figures."""
    where, folder, others = found
    logs, start = scratch / f"logs of {name}", time.monotonic()

    def tell(count: int) -> None:
        typer.echo(f"  {name}: {count} at {time.monotonic() - start:.1f} s", err=True)

    report = disturb(
        case, where, folder, calls, kills, seed=seed, workers=workers, others=others, logs=logs, on_kill=tell
    )
    same = compare(case, where, folder, scratch / "calm")
    assert report.tasks == calls, f"{calls} tasks in a quiet run, {report.tasks} here"
    over = [each for each in report.rounds if each.repeated > report.bound(each)]
    assert not over, f"a run cost more than it may: {over}"
    row = figures(name, report) | {"same_files_of_shards": same}
    typer.echo(
        f"{name}: {sum(report.kills.values())} troubles {report.kills} in {report.seconds:.0f} s; "
        f"nothing lost, doubled or damaged, {same} files of shards the same; "
        f"{report.repeated} of {report.calls} calls repeated ({report.allowed} allowed), "
        f"{report.most} at most in one run"
    )
    return row


def figures(name: str, report: Report) -> dict[str, Any]:
    """Of a round; what is 0 here was compared byte by byte."""
    return {
        "round": name,
        "kills": report.kills,
        "runs": len(report.rounds),
        "seconds": round(report.seconds, 1),
        "tasks": report.tasks,
        "calls": report.calls,
        "repeated": report.repeated,
        "allowed": report.allowed,
        "runs_that_repeated": sum(each.repeated > 0 for each in report.rounds),
        "most_repeated_in_a_run": report.most,
        "allowed_by_an_end": report.batch,
        "lost": 0,
        "doubled": 0,
        "damaged": 0,
    }


if __name__ == "__main__":
    app()
