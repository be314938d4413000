"""Clips of the world on disk: a film, its truth and its caption for each, and one sheet to look at."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from soundstage.world.captions import caption
from soundstage.world.render import Rendered, render, stream_item
from soundstage.world.show import contact_sheet

ON_SHEET = 12


def truth(rendered: Rendered, text: str) -> dict[str, object]:
    """What is true of a clip, as plain numbers and words: scene, events, tracks per frame, envelopes every 10 ms."""
    scene = rendered.scene
    return {
        "caption": text,
        "canonical": caption(scene),
        "scene": {"seed": scene.seed, **scene.fields},
        "events": [asdict(event) for event in rendered.events],
        "tracks": {
            name: {axis: np.round(values, 5).tolist() for axis, values in vars(track).items()}
            for name, track in rendered.tracks.items()
        },
        "envelopes": {
            name: {"t": np.round(curve.t[::10], 3).tolist(), "value": np.round(curve.value[::10], 5).tolist()}
            for name, curve in rendered.envelopes.items()
        },
    }


def write_clips(
    folder: str | Path,
    num: int,
    *,
    seed: int = 0,
    kinds: Sequence[str] | None = None,
    holdout: bool = False,
    suffix: str = ".mp4",
    **options: object,
) -> Iterator[Path]:
    """Write `num` clips of the stream `seed` into `folder`, yielding each path when it is complete.

    Each clip 00042-bounce.mp4 has its truth in .json and its caption in .txt beside it; sheet.png shows the first
    twelve. options: passed to `render`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sheets = []
    for index in range(num):
        scene, text = stream_item(seed, index, kinds=kinds, holdout=holdout)
        rendered = render(scene, **options)  # type: ignore[arg-type]
        path = folder / f"{index:05d}-{scene.kind}{suffix}"
        path.with_suffix(".txt").write_text(text + "\n", encoding="utf-8")
        path.with_suffix(".json").write_text(json.dumps(truth(rendered, text), indent=1) + "\n", encoding="utf-8")
        rendered.clip.save(path)
        if index < ON_SHEET:
            sheets.append(contact_sheet(rendered.clip, events=rendered.events, title=text))
        if index == min(num, ON_SHEET) - 1:
            _stack(sheets, folder / "sheet.png")
        yield path


def _stack(sheets: Sequence[np.ndarray], path: Path) -> None:
    from PIL import Image

    Image.fromarray(np.concatenate(sheets)).save(path)
