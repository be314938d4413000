"""`soundstage evaluate`: score a model or a folder of clips."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from soundstage.evaluation.report import Report
    from soundstage.inference.generator import Generator

DEFAULT_NUM = 64


def command(
    suite: Annotated[str, typer.Option(help="What to score on: world.")] = "world",
    model: Annotated[str | None, typer.Option(help="Name or folder of a model; default world-tiny.")] = None,
    clips: Annotated[
        Path | None, typer.Option(help="Folder of clips to score instead, each with a .txt caption beside it.")
    ] = None,
    num: Annotated[
        int | None, typer.Option(help=f"Prompts, or clips of the folder; default {DEFAULT_NUM}, or the whole folder.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the prompts and of the clips made for them.")] = 0,
    kinds: Annotated[str | None, typer.Option(help="Kinds of the world, such as bounce,drums; default all.")] = None,
    tasks: Annotated[str, typer.Option(help="What the model is asked to do, of t2av,a2v,v2a.")] = "t2av,a2v,v2a",
    steps: Annotated[int | None, typer.Option(help="Sampling steps; default the model's.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; default the model's.")] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder of the scores and the report; the same command goes on there.")
    ] = Path("runs/evaluate"),
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default cuda where present.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The report as JSON on stdout, for programs.")] = False,
) -> None:
    """Score a model on prompts it was never trained on, beside real clips, another clip's sound, and silence.

    \b
    Examples:
      soundstage evaluate --suite world --num 256 --seed 0 --out runs/scores
      soundstage evaluate --model runs/mine/model --kinds bounce,drums --tasks t2av --json
      soundstage evaluate --clips clips
    """
    from soundstage.core.errors import RequestError

    if suite != "world":
        raise RequestError(f"suite: {suite!r} is not one of world")
    if model is not None and clips is not None:
        raise RequestError(f"--model {model} and --clips {clips} are both given: leave one out")
    if num is not None and num < 1:
        raise RequestError(f"num: {num} is not at least 1")
    asked = {"steps": steps, "guidance": guidance}
    chosen = None if kinds is None else tuple(kinds.split(","))
    generator = None if clips else _generator(model, device)
    settings = _settings(generator, clips, seed, chosen, {k: v for k, v in asked.items() if v is not None})
    report = _run(generator, clips, num, chosen, tuple(tasks.split(",")), settings, out)
    _show(report, out, as_json)


def _generator(model: str | None, device: str | None) -> Generator:
    from soundstage.inference.generator import Generator

    return Generator.load(model, device)


def _settings(
    generator: Generator | None, clips: Path | None, seed: int, kinds: tuple[str, ...] | None, request: dict[str, Any]
) -> dict[str, Any]:
    """What makes two runs comparable; scores of different settings never share a folder."""
    from soundstage import __version__
    from soundstage.evaluation.report import fingerprint

    return {
        "suite": "world",
        "soundstage": __version__,
        "model": generator.system.name if generator else None,
        "weights": fingerprint(generator.system) if generator else None,
        "clips": str(clips) if clips else None,
        "seed": seed,
        "kinds": ",".join(kinds) if kinds else "all",
        **request,
    }


def _run(
    generator: Generator | None,
    clips: Path | None,
    num: int | None,
    kinds: tuple[str, ...] | None,
    tasks: tuple[str, ...],
    settings: dict[str, Any],
    out: Path,
) -> Report:
    from soundstage.cli.progress import progress
    from soundstage.evaluation import suite
    from soundstage.evaluation.report import build, environment
    from soundstage.evaluation.tables import write

    seed = settings["seed"]
    if clips:
        items, held_out = suite.folder_items(clips, num, seed, kinds), []
    else:
        items = suite.stream_items(num or DEFAULT_NUM, seed, kinds)
        held_out = suite.stream_items(max(1, len(items) // suite.HELD_OUT), seed, kinds, holdout=True)
    suite.claim(out, settings)
    request = {name: settings[name] for name in ("steps", "guidance") if name in settings}
    with progress("scoring", len(items) + len(held_out)) as advance:
        records = suite.run(
            items,
            out,
            generator=generator,
            held_out=held_out,
            tasks=tasks,
            seed=seed,
            to=suite.Format.of(generator),
            request=request,
            on_item=lambda done, _: advance.reach(done),
        )
    report = build(records, {**settings, "num": len(items), **environment()})
    write(report, out)
    return report


def _show(report: Report, out: Path, as_json: bool) -> None:
    from soundstage.evaluation.report import as_json as plain
    from soundstage.evaluation.tables import summary

    if as_json:
        typer.echo(json.dumps(plain(report)))
    else:
        typer.echo(summary(report))
        typer.echo(f"written to {out / 'report.md'} and {out / 'report.json'}", err=True)
