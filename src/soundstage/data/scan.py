"""Stage "scan": one decode of picture and sound that measures everything cheap and keeps traces of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from math import lcm
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from soundstage.data.flow import Drop, Item, Poison
from soundstage.data.picture import PictureMeter
from soundstage.data.sound import SoundMeter
from soundstage.data.traces import Traces
from soundstage.media.errors import MediaError
from soundstage.media.streams import streams

__all__ = ["Scan", "measure", "scan"]


@dataclass(frozen=True)
class Scan:
    """Adds the file "traces" and the facts "media" (what the file holds), "scan" (see MEASURES), "sync" and
    "hash" (see data.prints).

    The picture is measured on copies of 90 lines, the file decoded once, on one thread. Later stages cut, judge and
    compare by the traces alone, so that thresholds may change without decoding. A damaged file is poison.
    """

    version: ClassVar[int] = 2

    def __call__(self, item: Item, folder: Path) -> Iterable[Item | Drop]:
        try:
            traces, media = scan(item.files["media"])
        except MediaError as error:
            raise Poison(f"{error.reason}; {error.remedy}") from error
        files = {"traces": traces.save(folder / "traces.npz")}
        yield item.child(files, media=media, **measure(traces, item.facts.get("span")))


def measure(traces: Traces, span: list[float] | tuple[float, float] | None = None) -> dict[str, Any]:
    """The facts "scan", "sync" and "hash" over a span of seconds, or over all."""
    start, end = span or (0.0, None)
    prints = traces.print(start, end).facts()
    return {"scan": traces.summary(start, end), "sync": traces.sync(start, end), "hash": prints}


def scan(path: str | Path) -> tuple[Traces, dict[str, Any]]:
    """(traces, facts of the file) by one decode. Raises MediaError."""
    picture = PictureMeter()
    with streams(path) as opened:
        sound = None if opened.sample_rate is None else SoundMeter(opened.sample_rate)
        for time, piece in opened:
            if time is None:
                sound.add(piece)
            else:
                picture.add(time, piece)
        arrays = picture.close() | ({} if sound is None else sound.close())
        ticks, tick = _ticks(picture.times)
        rate, channels = (0, 0) if sound is None else (sound.rate, sound.channels)
        traces = Traces(arrays | {"ticks": ticks} if len(ticks) else arrays, tick, picture.size, rate, channels)
        media: dict[str, Any] = {"format": opened.format.split(",")[0], "duration": round(traces.duration, 6)}
        media |= {"bit_rate": opened.bit_rate, "tags": opened.tags}
        if opened.video is not None and picture.times:
            steps = np.diff(ticks[1:]) if len(ticks) > 2 else np.zeros(0)
            media |= {"codec": opened.video.stream.codec_context.codec.canonical_name, "fps": str(opened.fps)}
            media |= {"height": picture.size[0], "width": picture.size[1], "frames": len(picture.times)}
            media |= {"bit_depth": picture.depth, "pixel_format": picture.pixels}
            media |= {"variable_rate": bool(np.ptp(steps) * float(tick) > 0.004) if len(steps) else False}
        if sound is not None:
            media |= {"sample_rate": rate, "channels": channels}
            media |= {"sound_codec": opened.audio.stream.codec_context.codec.canonical_name}
    return traces, media


def _ticks(times: list[Fraction]) -> tuple[np.ndarray, Fraction]:
    """Exact times as (F,) int64 steps from one to the next (the first from 0), and the seconds of a tick."""
    if not times:
        return np.zeros(0, np.int64), Fraction(1)
    tick = Fraction(1, lcm(*{time.denominator for time in times}))
    whole = np.array([int(time / tick) for time in times], np.int64)
    return np.diff(whole, prepend=0), tick
