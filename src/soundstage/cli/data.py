"""`soundstage data`: from sources to shards, through a flow whose every step is in a ledger."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from soundstage.cli import flows

if TYPE_CHECKING:
    from soundstage.data.flow import Flow, Item
    from soundstage.data.ledger import Ledger, Step
    from soundstage.data.reach import Count

app = typer.Typer(
    help="Collect, fetch, scan, filter and pack clips. Every command can be stopped and given again: it goes on.",
    epilog="A first run: soundstage data collect set clips/; soundstage data curate set; soundstage data funnel set",
    rich_markup_mode=None,
)

Folder = Annotated[Path, typer.Argument(help="The dataset folder.", metavar="DIR")]
Settings = Annotated[
    list[str] | None,
    typer.Argument(help="Settings of stages to change, remembered for this dataset.", metavar="[STAGE.FIELD=VALUE...]"),
]
FlowName = Annotated[
    str | None,
    typer.Option("--flow", help=f"Any importable module:function that returns a Flow; at first {flows.DEFAULT}."),
]
Where = Annotated[
    str | None,
    typer.Option(
        "--ledger", help="Path, or postgresql://USER@HOST/NAME to work on several hosts; DIR/ledger.sqlite otherwise."
    ),
]
Workers = Annotated[int | None, typer.Option("--workers", "-w", min=1, help="Processes; default one per core.")]
Cluster = Annotated[
    str | None, typer.Option("--ray", help="Work on a Ray cluster: its address, auto, or local to start one here.")
]
Forget = Annotated[bool, typer.Option("--forget", help="Without the settings given to this dataset before.")]
Retry = Annotated[bool, typer.Option("--retry", help="Try again what failed too often.")]
Json = Annotated[bool, typer.Option("--json", help="JSON on stdout, for programs.")]


@app.command("collect")
def collect(
    folder: Folder,
    sources: Annotated[list[str], typer.Argument(help="Folders, lists, addresses; see the examples.")],
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="A field of the sources, such as licence=CC-BY-4.0.")
    ] = None,
    ledger: Where = None,
) -> None:
    """Add what sources hold to a dataset; what is there already is left alone. Nothing is downloaded yet.

    \b
    Examples:
      soundstage data collect set clips/ --set licence=CC0-1.0
      soundstage data collect set addresses.csv more.jsonl
      soundstage data collect set shop:https://shop.example.com
      soundstage data collect set "ytdlp:ytsearch20:rain on a tin roof"
      soundstage data collect set s3://bucket/raw https://media.example.com/a.mp4
    """
    from soundstage.cli.progress import progress
    from soundstage.core.errors import ConfigError
    from soundstage.data.sources import parse

    fields = dict(text.partition("=")[::2] for text in settings or ())
    if not all(fields.values()):
        raise ConfigError(f"--set {' '.join(settings or ())}: is not name=value, such as licence=CC0-1.0")
    new = 0
    with _ledger(folder, ledger) as opened, progress("collecting") as advance:

        def counted(items: Iterator[Item]) -> Iterator[Item]:
            for item in items:
                yield item
                advance()

        for text in sources:
            new += opened.add(counted(iter(parse(text, **fields))))
    typer.echo(f"{new} new items of {advance.done} in {folder}")


def _stage_command(name: str, told: str, examples: str) -> None:
    """A command that runs the flow as far as one stage."""

    @app.command(name, help=f"{told}\n\n\b\nExamples:\n{examples}")
    def command(
        folder: Folder,
        settings: Settings = None,
        flow: FlowName = None,
        ledger: Where = None,
        workers: Workers = None,
        ray: Cluster = None,
        retry: Retry = False,
        forget: Forget = False,
        as_json: Json = False,
    ) -> None:
        _run(folder, settings, flow, ledger, workers, ray, retry, forget, as_json, name)


_stage_command(
    "fetch",
    "Download what was collected: the flow up to its stage fetch.",
    "  soundstage data fetch set\n  soundstage data fetch set --retry",
)
_stage_command(
    "scan",
    "Measure every clip in one decode: the flow up to its stage scan.",
    "  soundstage data scan set --workers 8",
)
_stage_command(
    "pack",
    "Work up to the stage pack, and put the shards with their manifest into DIR/shards.",
    "  soundstage data pack set\n  soundstage data pack set pack.num=500",
)


@app.command("curate")
def curate(
    folder: Folder,
    settings: Settings = None,
    until: Annotated[str | None, typer.Option("--until", help="The last stage to work on; default all.")] = None,
    flow: FlowName = None,
    ledger: Where = None,
    workers: Workers = None,
    ray: Cluster = None,
    retry: Retry = False,
    forget: Forget = False,
    as_json: Json = False,
) -> None:
    """Run the whole flow. A changed setting runs again what depends on it; the rest is found done.

    \b
    Examples:
      soundstage data curate set
      soundstage data curate set gate.limits.still.least=0.01 --until gate
      soundstage data curate set --flow my.flows:speech --ledger postgresql://me@db/clips
      soundstage data curate set --ray auto
    """
    _run(folder, settings, flow, ledger, workers, ray, retry, forget, as_json, until)


@app.command("index")
def index(
    folder: Folder,
    words: Annotated[str | None, typer.Argument(help="Look these words up in the index.")] = None,
    shards: Annotated[str | None, typer.Option(help="Folder or URL of the shards; default DIR/shards.")] = None,
    export: Annotated[
        str | None, typer.Option(help="Also write the table of clips: a .parquet file, or postgresql://...")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make the shards searchable (DIR/index.sqlite), or search them.

    \b
    Examples:
      soundstage data index set
      soundstage data index set "dog OR cat" --json
      soundstage data index set --export clips.parquet
    """
    from soundstage.data.index import INDEX, build_index, search
    from soundstage.data.index import export as write

    where, file = shards or folder / "shards", folder / INDEX
    if words is not None:
        for row in search(file, words):
            shown = json.dumps(row) if as_json else f"{row['key']}  {row['shard']}  {row['caption'] or ''}"
            typer.echo(shown)
        return
    count = build_index(where, file)
    if export:
        write(where, export)
    told = {"clips": count, "index": str(file), **({"export": export} if export else {})}
    typer.echo(json.dumps(told) if as_json else f"{count} clips in {file}{f', and in {export}' if export else ''}")


@app.command("funnel")
def funnel(folder: Folder, flow: FlowName = None, ledger: Where = None, as_json: Json = False) -> None:
    """What became of every item at every stage; each line sums to what entered it.

    \b
    Examples:
      soundstage data funnel set
      soundstage data funnel set --json
    """
    with _ledger(folder, ledger, new=False) as opened:
        _show_funnel(opened.funnel(flows.choose(folder, flow).flow()), as_json)


@app.command("limits")
def limits(
    folder: Folder,
    settings: Annotated[
        list[str] | None,
        typer.Argument(help="Settings to try; they are not remembered.", metavar="[STAGE.FIELD=VALUE...]"),
    ] = None,
    flow: FlowName = None,
    ledger: Where = None,
    as_json: Json = False,
) -> None:
    """How the limits of the gate lie in your clips, and what they reject, from what was measured: nothing is decoded.

    \b
    "alone": rejected by this limit; "first": of those, not by one above it. Examples:
      soundstage data limits set
      soundstage data limits set gate.limits.blurred.most=2 "gate.limits.out of sync.most=80"
      soundstage data limits set gate.limits.still.least=none
    """
    from soundstage.core.errors import ConfigError
    from soundstage.data.gates import calibrate, gate_of, report, table

    chosen = flows.choose(folder, flow, settings or ()).flow()
    gate = gate_of(chosen)
    if gate is None:
        raise ConfigError("limits: the flow has no gate (soundstage.data.gates.Gate)")
    with _ledger(folder, ledger, new=False) as opened:
        columns = table(item.facts for item in opened.entering(chosen, gate))
    asked = chosen.stages[gate].limits  # type: ignore[union-attr]
    rows, counted = calibrate(columns, asked), report(columns, asked)
    if as_json:
        typer.echo(json.dumps({"counts": counted, "limits": rows}))
        return
    cells = [("limit", "measure", "least", "most", "1 %", "median", "99 %", "alone", "first")]
    for row in rows:
        curve = [row["percentiles"][name] for name in ("1", "50", "99")]
        numbers = ["" if x is None else f"{x:.4g}" for x in (row["least"], row["most"], *curve)]
        first = counted.get(row["reason"], 0)
        cells.append((row["reason"], row["measure"], *numbers, f"{row['rejected']:.1%}", str(first or "")))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    typer.echo(f"{counted['kept']} of {sum(counted.values())} clips are kept")


@app.command("report")
def report(
    folder: Folder,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The page; default DIR/report.html.")] = None,
    clips: Annotated[int, typer.Option(min=0, help="Pictures of clips kept, and as many of clips rejected.")] = 24,
    flow: FlowName = None,
    ledger: Where = None,
) -> None:
    """A page to look at: the funnel, every measure beside its limits, clips kept and rejected side by side.

    \b
    Examples:
      soundstage data report set
      soundstage data report set --clips 100 --out report.html
    """
    from soundstage.cli.progress import progress
    from soundstage.data.report import write_report

    with _ledger(folder, ledger, new=False) as opened, progress("drawing clips", 2 * clips) as advance:
        chosen = flows.choose(folder, flow).flow()
        path = out or folder / "report.html"
        write_report(opened, chosen, path, clips=clips, on_clip=lambda done, _: advance.reach(done))
    typer.echo(str(path))


@app.command("show")
def show(
    folder: Folder,
    item: Annotated[
        str | None, typer.Argument(help="An item's id, or its beginning: what it is and its history.")
    ] = None,
    stage: Annotated[str | None, typer.Option(help="List what came out of this stage; default the last.")] = None,
    sources: Annotated[bool, typer.Option("--sources", help="List what was collected.")] = False,
    dropped: Annotated[bool, typer.Option("--dropped", help="List what was let go, and why.")] = False,
    quarantine: Annotated[bool, typer.Option("--quarantine", help="List what was given up, and why.")] = False,
    num: Annotated[int, typer.Option("--num", "-n", min=1, help="Lines at most.")] = 20,
    flow: FlowName = None,
    ledger: Where = None,
    as_json: Json = False,
) -> None:
    """List items, or tell the history of one: what it was made from, and what was made of it.

    \b
    Examples:
      soundstage data show set
      soundstage data show set 2fbd8299
      soundstage data show set --dropped --stage gate
      soundstage data show set --quarantine --json
    """
    with _ledger(folder, ledger, new=False) as opened:
        if item is not None:
            _show_item(opened, item, as_json)
            return
        rows = _listed(opened, flows.choose(folder, flow).flow(), stage, sources, dropped, quarantine)
        for row in rows[:num]:
            typer.echo(json.dumps(row) if as_json else "  ".join(_short(value) for value in row.values()))
        if len(rows) > num:
            typer.echo(f"{len(rows) - num} more; --num {len(rows)} lists all", err=True)


@app.command("validate")
def validate(
    folder: Folder,
    shards: Annotated[str | None, typer.Option(help="Folder or URL of the shards; default DIR/shards.")] = None,
    decoded: Annotated[int, typer.Option(min=0, help="Samples to decode whole, drawn at random.")] = 16,
    ledger: Where = None,
    as_json: Json = False,
) -> None:
    """Read every byte again: stored files against their hashes, shards against their manifest. Exit code 1: damage.

    \b
    Examples:
      soundstage data validate set
      soundstage data validate set --shards s3://bucket/set/shards --decoded 100
    """
    from soundstage.cli.progress import progress
    from soundstage.data.manifest import MANIFEST
    from soundstage.data.validate import validate as check

    problems: list[str] = []
    told: dict[str, Any] = {}
    with _ledger(folder, ledger, new=False) as opened, progress("stored files") as advance:
        problems += opened.damaged(lambda: advance())
        told["files"] = advance.done
    if shards or (folder / "shards" / MANIFEST).exists():
        with progress("shards") as advance:
            report = check(
                shards or folder / "shards",
                decoded=decoded,
                progress=lambda done, total: advance.reach(done, f"of {total}"),
            )
        problems += [str(each) for each in report.problems]
        told |= {"shards": report.shards, "samples": report.samples, "decoded": report.decoded}
    if as_json:
        typer.echo(json.dumps({**told, "problems": problems}))
    else:
        for each in problems:
            typer.echo(each)
        checked = ", ".join(f"{count} {name}" for name, count in told.items())
        typer.echo(f"{checked}: {len(problems) or 'no'} problem{'' if len(problems) == 1 else 's'}")
    if problems:
        raise typer.Exit(1)


# What the commands share


@contextmanager
def _ledger(folder: Path, where: str | None, *, new: bool = True) -> Iterator[Ledger]:
    from soundstage.core.errors import ConfigError
    from soundstage.data.ledger import FILE, Ledger

    if not new and where is None and not (folder / FILE).exists():
        raise ConfigError(f"{folder}: holds no dataset; begin with soundstage data collect {folder} SOURCE")
    with Ledger.open(where or folder / FILE, folder) as ledger:
        yield ledger


def _run(
    folder: Path,
    settings: Sequence[str] | None,
    name: str | None,
    where: str | None,
    workers: int | None,
    ray: str | None,
    retry: bool,
    forget: bool,
    as_json: bool,
    until: str | None,
) -> None:
    chosen = flows.choose(folder, name, settings or (), forget=forget)
    whole = chosen.flow()
    flow = whole.until(until) if until else whole
    crew = None
    if ray is not None:
        from soundstage.data.cluster import ray_crew

        crew = ray_crew(workers, None if ray == "local" else ray)
    with _ledger(folder, where, new=False) as ledger:
        chosen.remember(folder)
        if retry:
            typer.echo(f"{ledger.retry(flow)} tasks get new attempts", err=True)
        _show_funnel(flows.run_shown(flow, ledger, until or "curating", workers, crew), as_json)
        if "pack" in flow.stages:
            _publish(ledger, flow, folder)


def _publish(ledger: Ledger, flow: Flow, folder: Path) -> None:
    from soundstage.data.shards import publish

    shards = ledger.results(flow, "pack")
    if shards:
        manifest = publish(shards, folder / "shards")
        typer.echo(f"{len(manifest)} clips in {len(manifest.shards)} shards: {folder / 'shards'}", err=True)


def _show_funnel(lines: Sequence[Count], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps([asdict(line) for line in lines]))
        return
    heads = ("stage", "entered", "passed", "dropped", "quarantine", "failed", "waiting", "made", "s/item")
    rows = [heads]
    for line in lines:
        settled = line.entered - line.waiting
        each = f"{line.seconds / settled:.3g}" if settled else ""
        counts = (
            line.entered,
            line.passed,
            sum(line.dropped.values()),
            line.poisoned,
            line.failed,
            line.waiting,
            line.made,
        )
        rows.append((line.name, *map(str, counts), each))
    widths = [max(len(row[k]) for row in rows) for k in range(len(heads))]
    for row, line in zip(rows, (None, *lines), strict=True):
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        reasons = (
            {**line.dropped, **{f"{k} (pieces)": n for k, n in line.cut.items() if k not in line.dropped}}
            if line
            else {}
        )
        merged = [f"{line.merged} made twice"] if line and line.merged else []
        said = ", ".join([f"{n} {reason}" for reason, n in reasons.items()] + merged)
        typer.echo(("  ".join(cells) + (f"  {said}" if said else "")).rstrip())


def _listed(
    ledger: Ledger, flow: Flow, stage: str | None, sources: bool, dropped: bool, quarantine: bool
) -> list[dict[str, Any]]:
    if dropped:
        found = ledger.dropped(flow, stage)
        return [{"id": d.item.id, "stage": d.stage, "reason": d.reason, "score": d.score} for d in found]
    if quarantine:
        return [
            {"id": each.id, "stage": q.stage, "state": q.state, "attempts": q.attempts, "reason": q.reason}
            for q in ledger.quarantine(flow, stage)
            for each in q.items
        ]
    items = ledger.sources() if sources else ledger.results(flow, stage)
    return [{"id": item.id, "files": {role: str(path) for role, path in item.files.items()}} for item in items]


def _show_item(ledger: Ledger, beginning: str, as_json: bool) -> None:
    item = ledger.item(beginning)
    above, below = ledger.history(item.id)
    files = {role: str(path) for role, path in item.files.items()}
    if as_json:
        told = {"id": item.id, "files": files, "facts": dict(item.facts)}
        typer.echo(json.dumps({**told, "from": [asdict(step) for step in above], "into": [asdict(s) for s in below]}))
        return
    typer.echo(f"{item.id}\n")
    for role, path in files.items():
        typer.echo(f"  {role}: {path}")
    for name, value in sorted(item.facts.items()):
        typer.echo(f"  {name}: {_short(value)}")
    for title, steps in (("made from", above), ("made into", below)):
        if steps:
            typer.echo(f"\n{title}")
        for step in steps:
            typer.echo(f"  {_line(step)}")


def _line(step: Step) -> str:
    kept = [each[:12] for each, reason in step.outputs if reason is None]
    gone = [f"{each[:12]} dropped: {reason}" for each, reason in step.outputs if reason is not None]
    inputs = " ".join(each[:12] for each in step.inputs[:4]) + (
        f" and {len(step.inputs) - 4} more" if step.inputs[4:] else ""
    )
    told = f"{step.stage}: {inputs} -> {', '.join([*kept, *gone][:4]) or step.state}"
    more = [f"{step.attempts} attempts"] if step.attempts > 1 else []
    more += [f"{step.seconds:.3g} s"] if step.seconds is not None else []
    more += [step.reason] if step.reason and not gone else []
    return f"{told}  ({'; '.join([step.state, *more])})"


def _short(value: Any, most: int = 100) -> str:  # noqa: ANN401
    if isinstance(value, dict) and all(isinstance(each, str) for each in value.values()):
        text = "  ".join(f"{name}: {each}" for name, each in value.items())
        return text
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= most else text[: most - 3] + "..."
