"""Progress of long work: a bar on a terminal, a few plain lines otherwise; always on stderr, so stdout stays data."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer

SECONDS_BETWEEN_LINES = 5.0


class Advance:
    """`advance()` counts one more unit and `advance(5)` five; `advance.reach(40, note="loss 0.3")`: 40 are done."""

    def __init__(self, show: Callable[[int, str, int | None], None], total: int | None = None) -> None:
        self.done, self.note, self.total, self._show = 0, "", total, show

    def __call__(self, count: int = 1, note: str = "") -> None:
        self.reach(self.done + count, note)

    def reach(self, done: int, note: str = "", total: int | None = None) -> None:
        """Set the number of units done, with a word on the state; total: of all units, where it is another now."""
        self.done, self.note, self.total = done, note, self.total if total is None else total
        self._show(done, note, self.total)


@contextmanager
def progress(label: str, total: int | None = None) -> Iterator[Advance]:
    """Show the progress of a block of `total` units (None: not known beforehand).

    Off a terminal a line is written at most every five seconds, and one at the end.
    """
    with _bar(label, total) if sys.stderr.isatty() else _lines(label, total) as advance:
        yield advance


@contextmanager
def _bar(label: str, total: int | None) -> Iterator[Advance]:
    from rich import progress as shown
    from rich.console import Console

    columns = (
        shown.TextColumn("{task.description}"),
        shown.BarColumn(),
        shown.MofNCompleteColumn(),
        shown.TimeElapsedColumn(),
        shown.TimeRemainingColumn(),
        shown.TextColumn("{task.fields[note]}"),
    )
    with shown.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total, note="")
        yield Advance(lambda done, note, now: bar.update(task, completed=done, note=note, total=now), total)


@contextmanager
def _lines(label: str, total: int | None) -> Iterator[Advance]:
    start = last = time.monotonic()

    def say(done: int, note: str, now: float, total: int | None) -> None:
        count = f"{done}/{total}" if total is not None else f"{done}"
        typer.echo(f"{label}: {count} in {now - start:.1f} s{f', {note}' if note else ''}", err=True)

    def show(done: int, note: str, total: int | None) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES:
            last = now
            say(done, note, now, total)

    advance = Advance(show, total)
    yield advance
    say(advance.done, advance.note, time.monotonic(), advance.total)
