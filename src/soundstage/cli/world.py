"""`soundstage world`: clips of the procedural world with their exact truth, and sheets to look at."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.exceptions import TyperException

if TYPE_CHECKING:
    from soundstage.world import Scene

app = typer.Typer(help="Clips of the procedural world, with their exact truth.", rich_markup_mode=None)

Seed = Annotated[int, typer.Option(help="The same seed gives the same clips.")]
Kinds = Annotated[str | None, typer.Option(help="Kinds to draw from, such as bounce,drums; all when left out.")]
HeldOut = Annotated[bool, typer.Option("--held-out", help="Only combinations that training never sees.")]
Size = Annotated[int, typer.Option(help="Height and width in pixels, 16 to 256.")]
Fps = Annotated[str, typer.Option(help="Frames per second, such as 16, 23.976 or 24000/1001.")]
Duration = Annotated[float, typer.Option(help="Seconds, to the nearest frame; 2.0625 is what world-tiny makes.")]


@app.command("render")
def render(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the clips.")] = Path("world"),
    num: Annotated[int, typer.Option(min=1, help="How many clips.")] = 8,
    seed: Seed = 0,
    kinds: Kinds = None,
    held_out: HeldOut = False,
    size: Size = 64,
    fps: Fps = "16",
    duration: Duration = 2.0625,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per clip and line, for programs.")] = False,
) -> None:
    """Write clips, each with its caption (.txt) and exact truth (.json), and sheet.png to look at.

    \b
    Examples:
      soundstage world render --num 100 -o clips
      soundstage world render --kinds bounce,drums --size 128 --fps 24 --duration 4
      soundstage world render --held-out --json
    """
    from soundstage.cli.progress import progress
    from soundstage.world.write import write_clips

    with told(), progress("rendering", num) as advance:
        shape = _shape(size, fps, duration)
        for path in write_clips(out, num, seed=seed, kinds=_split(kinds), holdout=held_out, **shape):
            if as_json:
                caption = path.with_suffix(".txt").read_text(encoding="utf-8").strip()
                typer.echo(json.dumps({"path": str(path), "caption": caption}))
            advance()
    if not as_json:
        typer.echo(f"{num} clips and sheet.png in {out}")


@app.command("show")
def show(
    prompt: Annotated[str | None, typer.Argument(help="A caption of the world; drawn by seed when left out.")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Picture to write.")] = Path("world.png"),
    seed: Seed = 0,
    kinds: Kinds = None,
    held_out: HeldOut = False,
    size: Size = 64,
    fps: Fps = "16",
    duration: Duration = 2.0625,
) -> None:
    """Write a contact sheet of one clip: frames over the waveform, with its events marked.

    \b
    Examples:
      soundstage world show "a small red metal ball bounces three times" -o ball.png
      soundstage world show --kinds drums --seed 3 -o drums.png
    """
    from soundstage.world import render
    from soundstage.world.show import contact_sheet

    with told():
        scene, caption = _scene(prompt, seed, _split(kinds), held_out)
        made = render(scene, **_shape(size, fps, duration))
    contact_sheet(made.clip, out, events=made.events, title=caption)
    typer.echo(f"{out}  {caption}")


@contextmanager
def told() -> Iterator[None]:
    """The world refuses with ValueError, since it knows no error of ours; the command line tells it as one sentence."""
    try:
        yield
    except ValueError as error:
        raise TyperException(str(error)) from error


def _split(kinds: str | None) -> list[str] | None:
    return kinds.split(",") if kinds else None


def _shape(size: int, fps: str, duration: float) -> dict[str, Any]:
    from soundstage.media.geometry import frame_rate, half_up

    rate = frame_rate(fps)
    return {"size": size, "fps": rate, "num_frames": half_up(duration * rate)}


def _scene(prompt: str | None, seed: int, kinds: list[str] | None, held_out: bool) -> tuple[Scene, str]:
    """The first scene of the stream; with a prompt, of its kind and with the fields that it names."""
    from soundstage.world import parse, stream_item

    if prompt is None:
        return stream_item(seed, 0, kinds=kinds, holdout=held_out)
    named = parse(prompt)
    if "kind" not in named:
        example = "a small red metal ball bounces three times"
        raise ValueError(f"prompt: {prompt!r} names no kind of the world; say for example {example!r}")
    scene, _ = stream_item(seed, 0, kinds=[str(named["kind"])])
    fitting = {name: value for name, value in named.items() if name in scene.fields}
    return replace(scene, **fitting), prompt  # type: ignore[arg-type]
