"""Few-step students of the shipped tiny model beside their teacher: scores on the world, seconds per clip, cost.

    python benchmarks/students.py dmd4=runs/world-dmd4 rcm4=runs/world-rcm4 ...    # measure, then the table
    python benchmarks/students.py --table                                       # only the table

Each NAME is a recipe of soundstage.recipes.world_distill, its folder that of its run. Scores are those of `soundstage
evaluate` on the same prompts and seeds for all; what was scored before is kept, so that a stopped run goes on. Seconds
are processor time on one thread, in rounds of one clip each.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from measure import Row, Timer, commit, compare, machine, table, today

from soundstage.data.records import ClipShape, to_media
from soundstage.evaluation import suite
from soundstage.evaluation.report import build
from soundstage.inference.generator import Generator
from soundstage.recipes import world_distill as recipes
from soundstage.training.engine import train
from soundstage.training.vitals import diversity

HERE = Path(__file__).parent
OUT = HERE / "results" / "students.json"
PROMPT = "a small red metal ball bounces three times"
LONG, SHIPPED = "teacher, 2 x 50 calls", "teacher, 2 x 20 calls"
FIGURES = ("f1@45", "abs_offset_ms", "kind", "colour", "size", "material", "pitch_semitones")


def command(
    students: Annotated[list[str] | None, typer.Argument(help="NAME=FOLDER of each run.")] = None,
    num: Annotated[int, typer.Option(help="Prompts that are scored.")] = 144,
    rounds: Annotated[int, typer.Option(help="Clips timed of each.")] = 5,
    work: Annotated[Path, typer.Option(help="Folder of the scores and of the packed models.")] = Path("runs/students"),
    out: Annotated[Path, typer.Option(help="File of the figures, JSON.")] = OUT,
    show: Annotated[bool, typer.Option("--table", help="Only print the table.")] = False,
) -> None:
    """Measure the teacher and its students, and print the table."""
    if show:
        typer.echo(shown(json.loads(out.read_text(encoding="utf-8"))))
        return
    torch.set_num_threads(1)
    runs = dict(word.split("=", 1) for word in students or ())
    models: dict[str, tuple[Generator, dict[str, Any]]] = {
        LONG: (Generator.load(recipes.TEACHER), {"steps": 50}),
        SHIPPED: (Generator.load(recipes.TEACHER), {}),
    }
    for name, run in runs.items():
        folder = recipes.pack(run, work / name / "model", recipes.SAMPLINGS[name])
        models[name] = (Generator.load(folder), {})
    rows = {name: _row(name, *model, num, work / name) for name, model in models.items()}
    for name, run in runs.items():
        rows[name] |= _cost(name, Path(run), work / name)
    _time(models, rows, rounds)
    found = {"date": today(), **commit(), "machine": machine(torch.device("cpu")), "num": num, "rows": rows}
    out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    typer.echo(shown(found))


def _row(name: str, generator: Generator, request: dict[str, Any], num: int, folder: Path) -> Row:
    """Scores with their intervals, Fréchet distance with its floor, and the spread of one prompt's seeds."""
    items = suite.stream_items(num)
    typer.echo(f"  scoring {name}", err=True)
    records = suite.run(items, folder, generator=generator, tasks=("t2av",), request=request)
    report = build(records, {})
    row: Row = {}
    for figure in FIGURES:
        group = "events" if figure in ("f1@45", "abs_offset_ms") else "all"
        for who, part in (("model", ""), ("real clips", "real/")):
            score = report.get(who, figure, group)
            if score is not None:
                row[part + figure] = {"value": score.value, "low": score.low, "high": score.high, "n": score.num}
    for who, distances in report.distances.items():
        row["frechet" if who == "model" else "frechet_floor"] = distances["frechet"]
    made = generator.generate([item.caption for item in items[:9]], num=4, **request)
    media = [to_media(one.clip, ClipShape()) for one in made]
    row |= {f"diversity/{m}": diversity(torch.stack([each[m] for each in media]), 4) for m in media[0].modalities}
    return row


def _cost(name: str, run: Path, folder: Path) -> Row:
    """Steps of the run, and processor seconds of one, by training a few again."""
    config = getattr(recipes, name)()
    shutil.rmtree(folder / "timed", ignore_errors=True)
    few = replace(config, steps=6, validate=None, save_every=100, out=str(folder / "timed"), log_every=100)
    train(replace(few, steps=1), tensorboard=False)
    start = time.process_time()
    train(few, tensorboard=False)
    # loading counts too, and is little beside five steps
    return {"steps": config.steps, "seconds_per_step": (time.process_time() - start) / 5, "run": run.name}


def _time(models: dict[str, tuple[Generator, dict[str, Any]]], rows: dict[str, Row], rounds: int) -> None:
    """Processor seconds of one clip from text, and of decoding alone."""
    latents = {name: g.generate(PROMPT, **request).latents for name, (g, request) in models.items()}
    cases = {
        name: lambda g=g, r=request: lambda: g.generate(PROMPT, **r) and None for name, (g, request) in models.items()
    }
    codec = models[LONG][0].system.codec
    x0 = latents[LONG].map(lambda x: x[None])
    decode = lambda: lambda: codec.decode(x0) and None  # noqa: E731
    found = compare({**cases, "decode": decode}, Timer(torch.device("cpu"), rounds))
    for name in models:
        rows[name] |= {"seconds": found[name].seconds, "decode": found["decode"].seconds}


def shown(found: dict[str, Any]) -> str:
    """The table of a file of figures."""
    rows = [{"name": name, **row} for name, row in found["rows"].items()]
    teacher = rows[0]

    def score(key: str, digits: int) -> Any:  # noqa: ANN401
        def cell(row: Row) -> str:
            s = row.get(key)
            return "-" if s is None else f"{s['value']:.{digits}f} ({s['low']:.{digits}f} to {s['high']:.{digits}f})"

        return cell

    def sampling(row: Row) -> float:
        return row["seconds"] - row["decode"]

    columns = {
        "": lambda row: row["name"],
        "F1 at 45 ms": score("f1@45", 2),
        "offset [ms]": score("abs_offset_ms", 1),
        "kind": score("kind", 2),
        "colour": score("colour", 2),
        "size": score("size", 2),
        "material": score("material", 2),
        "pitch [st]": score("pitch_semitones", 2),
        "Fréchet (floor)": lambda row: f"{row['frechet']:.1f} ({row['frechet_floor']:.1f})",
        "diversity v / a": lambda row: f"{row['diversity/video']:.3f} / {row['diversity/audio']:.3f}",
        "s per clip": lambda row: f"{row['seconds']:.2f}",
        "without decoding": lambda row: f"{sampling(row):.3f}",
        "times faster": lambda row: f"{sampling(teacher) / sampling(row):.1f}",
        "training": lambda row: f"{row['steps']} x {row['seconds_per_step']:.1f} s" if "steps" in row else "-",
    }
    return table(rows, columns)


if __name__ == "__main__":
    typer.run(command)
