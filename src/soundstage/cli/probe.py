"""`soundstage probe`: what a media file holds."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from soundstage.media.probe import MediaInfo


def command(
    files: Annotated[list[Path], typer.Argument(help="Media files, or folders of frames.", metavar="FILE...")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per file and line, for programs.")] = False,
) -> None:
    """Show what a media file holds: picture, sound, duration and tags.

    \b
    Examples:
      soundstage probe ball.mp4
      soundstage probe --json clips/*.mp4
    """
    from soundstage.media.probe import probe

    for path in files:
        info = probe(path)
        typer.echo(json.dumps(dataclasses.asdict(info), default=str) if as_json else _text(info))


def _text(info: MediaInfo) -> str:
    lines = [f"{info.path}: {info.format}, {info.duration:.3f} s"]
    if (v := info.video) is not None:
        rate = "variable, about " if v.variable_rate else ""
        turned = f", turned by {v.rotation} degrees" if v.rotation else ""
        frames = f", {v.declared_frames} frames" if v.declared_frames else ""
        lines.append(
            f"  picture  {v.codec}, {v.width}x{v.height}, {rate}{float(v.fps):.6g} fps{frames}, {v.bit_depth} bit "
            f"{v.pixel_format}, {v.duration:.3f} s{turned}"
        )
    if (a := info.audio) is not None:
        lines.append(f"  sound    {a.codec}, {a.sample_rate} Hz, {a.layout}, {a.duration:.3f} s")
    lines += [f"  {key}: {value}" for key, value in info.metadata.items()]
    return "\n".join(lines)
