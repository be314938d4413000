"""`soundstage sweep`: search the settings of a recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from soundstage.training.sweep import Result, Trial


def command(
    recipe: Annotated[str, typer.Argument(help="Any importable module:function that returns a TrainConfig.")],
    settings: Annotated[
        list[str],
        typer.Argument(help="Settings to search, KEY=LOW..HIGH, and to change, KEY=VALUE.", metavar="KEY=LOW..HIGH..."),
    ],
    metric: Annotated[
        str, typer.Option("--metric", "-m", help="The logged number that counts, such as validate/score.")
    ],
    maximize: Annotated[bool, typer.Option("--maximize", help="More of it is better; less is, when left out.")] = False,
    trials: Annotated[int, typer.Option("--trials", "-n", help="Runs in all, earlier ones of the study included.")] = (
        20
    ),
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder; default runs/NAME-sweep.")] = None,
    seed: Annotated[int, typer.Option(help="Of the search.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default cuda where present.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object with all trials, for programs.")] = False,
) -> None:
    """Search the weights and rates of a recipe. The same command again goes on with the study.

    \b
    Examples:
      soundstage sweep soundstage.recipes.world:tiny optim.lr=1e-4..1e-2 steps=400 -m validate/world/f1@45 --maximize
      soundstage sweep my.recipes:dmd4 weights.audio=0.1..3 objective.ratio=1..8 -m validate/sw2 -n 40 -o runs/search
    """
    from soundstage.cli.progress import progress
    from soundstage.training.config import load_recipe
    from soundstage.training.overrides import override
    from soundstage.training.sweep import Range, sweep

    ranges = [Range.parse(text) for text in settings if ".." in text]
    fixed = [text for text in settings if ".." not in text]
    config = override(load_recipe(recipe), fixed)
    folder = out or Path("runs") / f"{config.name}-sweep"
    with progress("trials", trials) as advance:
        found = sweep(
            config,
            ranges,
            metric,
            folder,
            trials=trials,
            maximize=maximize,
            seed=seed,
            device=device,
            on_trial=lambda done, note: advance.reach(done, note),
        )
    line = "" if found.best is None else " ".join([*fixed, *found.best.settings])
    if as_json:
        shown = [vars(trial) for trial in found.trials]
        typer.echo(json.dumps({"metric": metric, "whole": found.whole, "best": line or None, "trials": shown}))
        return
    _table(found, metric)
    if line:
        typer.echo(f"\nsoundstage train {recipe} {line}")
    if not found.whole:
        typer.echo(
            f"stopped after {len(found.trials)} of {trials} trials; the same command goes on from there", err=True
        )


def _table(found: Result, metric: str) -> None:
    """The trials, the best first."""
    typer.echo(f"{'trial':>5}  {metric:>16}  {'step':>7}  {'':7}  settings")
    for trial in found.trials:
        typer.echo(_row(trial))


def _row(trial: Trial) -> str:
    value = "-" if trial.value is None else f"{trial.value:.6g}"
    why = f"  ({trial.why.partition(';')[0]})" if trial.why else ""
    return f"{trial.number:>5}  {value:>16}  {trial.step:>7}  {trial.state:7}  {' '.join(trial.settings)}{why}"
