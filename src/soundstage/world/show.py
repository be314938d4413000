"""Contact sheets: a clip at a glance, its frames over its waveform, with what is seen and heard marked on both."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from soundstage.media.clip import Clip
from soundstage.world.captions import parse
from soundstage.world.oracle.matching import match
from soundstage.world.oracle.observe import Observation, observe
from soundstage.world.oracle.score import align
from soundstage.world.stage import Event

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

WIDTH, MARGIN, COLUMNS = 1200, 24, 9
WAVE, SOUND, AXIS = 120, 92, 30  # heights in pixels: waveform, spectrogram, time axis
SCALE = 2  # drawn larger and scaled down, for smooth lines
GROUND, PANEL, LINE, TEXT, FAINT = "#0e1116", "#161b22", "#2b323c", "#e6edf3", "#8b949e"
SEEN, HEARD, CORE = "#ffb454", "#56c7ff", "#c4ecff"
# Dark to light stops of the spectrogram's colours.
SPECTRUM = np.array([(22, 27, 34), (38, 42, 92), (92, 50, 140), (200, 72, 110), (255, 150, 84), (255, 232, 170)], float)


def contact_sheet(
    clip: Clip, path: str | Path | None = None, *, events: Sequence[Event] | Observation | None = None, title: str = ""
) -> np.ndarray:
    """(H, 1200, 3) uint8: frames over the waveform and spectrogram on one time axis; a .png too where `path` is given.

    events: the truth, or an observation, to mark; by default what the oracle reads if `title` names a kind of the
        world. Seen events are drawn from the frames downwards, heard onsets from the waveform upwards.
    """
    seen, heard, note = _marks(clip, events, title)
    image, draw = _blank(clip, bool(title))
    top = _title(draw, title, note)
    if clip.frames is not None:
        top = _film(image, draw, clip, seen, top)
    if clip.wave is not None:
        top = _sound(image, draw, clip, seen, heard, top)
    _axis(draw, clip.duration, top)
    image = image.resize((WIDTH, image.height // SCALE), 1)
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    return np.asarray(image)


def _pillow() -> Any:  # noqa: ANN401 - a module
    try:
        import PIL.Image
        import PIL.ImageDraw
        import PIL.ImageFont
    except ImportError as error:
        raise ImportError('contact sheets need Pillow: pip install "soundstage[media]"') from error
    return PIL


def _blank(clip: Clip, titled: bool) -> tuple[Image, ImageDraw]:
    height = MARGIN + (44 if titled else 0) + AXIS + MARGIN
    if clip.frames is not None:
        height += _frame_height(clip) + 10
    if clip.wave is not None:
        height += WAVE + SOUND + 4
    pillow = _pillow()
    image = pillow.Image.new("RGB", (WIDTH * SCALE, height * SCALE), GROUND)
    return image, pillow.ImageDraw.Draw(image)


def _frame_height(clip: Clip) -> int:
    high, wide = clip.frames.shape[1:3]
    return round((WIDTH - 2 * MARGIN) / COLUMNS * high / wide)


def _marks(clip: Clip, events: Sequence[Event] | Observation | None, title: str) -> tuple[np.ndarray, np.ndarray, str]:
    """(times seen, times heard, a note on the offset)."""
    if events is None:
        kind = parse(title).get("kind")
        if kind is None:
            return np.zeros(0), np.zeros(0), ""
        events = observe(clip, str(kind))
    if isinstance(events, Observation):
        found = align(events)
        note = f"sound {1000 * found.median:+.1f} ms" if len(found.offsets) else ""
        if events.lag is not None:
            note = f"sound {1000 * events.lag:+.1f} ms behind the motion"
        return events.visual, events.audio, note
    seen = np.array([e.t for e in events if e.x >= 0])
    heard = np.array([e.t for e in events])
    return seen, heard, "truth" if len(match(seen, heard).offsets) else ""


def _font(size: int) -> Any:  # noqa: ANN401 - a Pillow font
    return _pillow().ImageFont.load_default(size * SCALE)


def _title(draw: ImageDraw, title: str, note: str) -> int:
    if not title:
        return MARGIN
    at, right = MARGIN * SCALE, (WIDTH - MARGIN) * SCALE
    draw.text((at, at), title, fill=TEXT, font=_font(20))
    draw.text((right, at + 6 * SCALE), note, fill=FAINT, font=_font(14), anchor="ra")
    return MARGIN + 44


def _x(t: float, duration: float) -> float:
    """Horizontal position of a time, in drawn pixels."""
    return SCALE * (MARGIN + (WIDTH - 2 * MARGIN) * t / duration)


def _film(image: Image, draw: ImageDraw, clip: Clip, seen: np.ndarray, top: int) -> int:
    """One frame per column of time: that of the first event seen in the column, else that of its middle."""
    pillow, times, duration = _pillow(), clip.frame_times, clip.duration
    step = duration / len(times)
    wide, high = (WIDTH - 2 * MARGIN) * SCALE / COLUMNS, _frame_height(clip) * SCALE
    for column in range(COLUMNS):
        start, stop = duration * column / COLUMNS, duration * (column + 1) / COLUMNS
        inside = seen[(seen >= start) & (seen < stop)]
        # Just after rather than just before an event, so that a light that it switches on can be seen.
        wanted = inside[0] + 0.25 * step if len(inside) else (start + stop) / 2
        frame = clip.frames[int(np.argmin(np.abs(times - wanted)))]
        left, right = (round(MARGIN * SCALE + k * wide) for k in (column, column + 1))
        picture = pillow.Image.fromarray(frame).resize((right - left - 2 * SCALE, high), 1)
        image.paste(picture, (left + SCALE, top * SCALE))
        if len(inside):
            draw.rectangle((left + SCALE, top * SCALE, right - SCALE - 1, top * SCALE + high), outline=SEEN, width=3)
    return top + _frame_height(clip) + 10


def _sound(image: Image, draw: ImageDraw, clip: Clip, seen: np.ndarray, heard: np.ndarray, top: int) -> int:
    """Waveform and spectrogram with the marks over both."""
    wave, left, right = clip.wave.mean(0), MARGIN * SCALE, (WIDTH - MARGIN) * SCALE
    low, middle, bottom = top * SCALE, (top + WAVE / 2) * SCALE, (top + WAVE) * SCALE
    draw.rectangle((left, low, right, bottom), fill=PANEL)
    draw.line((left, middle, right, middle), fill=LINE, width=SCALE)
    columns = round(_x(clip.audio_duration, clip.duration)) - left
    gain = (WAVE / 2 - 6) * SCALE / max(float(np.abs(wave).max(initial=0)), 0.1)
    edges = np.linspace(0, len(wave), max(columns, 1) + 1).astype(int)
    for k, (first, last) in enumerate(pairwise(edges)):
        part = wave[first:last]
        if len(part):
            rms = float(np.sqrt(np.mean(part**2)))
            peak = (middle - gain * float(part.max()), middle - gain * float(part.min()))
            draw.line((left + k, peak[0], left + k, peak[1] + 1), fill=HEARD)
            draw.line((left + k, middle - gain * rms, left + k, middle + gain * rms), fill=CORE)
    base = top + WAVE + 4
    colours = _spectrogram(wave, clip.sample_rate, SOUND * SCALE)
    picture = _pillow().Image.fromarray(colours).resize((columns, SOUND * SCALE), 1)
    image.paste(picture, (left, base * SCALE))
    for t in seen:
        x = _x(t, clip.duration)
        draw.line((x, low - 10 * SCALE, x, (base + SOUND) * SCALE), fill=SEEN, width=SCALE)
        draw.ellipse((x - 4 * SCALE, low - 9 * SCALE, x + 4 * SCALE, low - SCALE), fill=SEEN)
    for t in heard:
        x = _x(t, clip.duration)
        draw.polygon(((x, bottom - 10 * SCALE), (x - 5 * SCALE, bottom), (x + 5 * SCALE, bottom)), fill=TEXT)
    return base + SOUND


def _spectrogram(wave: np.ndarray, sample_rate: int, height: int) -> np.ndarray:
    """(height, frames, 3) uint8: power in decibels over 70, from 80 Hz (bottom) to half the rate, on a log axis."""
    size, hop = 1024, max(1, len(wave) // 600)
    padded = np.pad(wave, (size // 2, size))
    starts = np.arange(0, max(len(wave), 1), hop)
    parts = padded[starts[:, None] + np.arange(size)] * np.hanning(size)
    level = 20 * np.log10(np.abs(np.fft.rfft(parts)) + 1e-5)
    rows = np.geomspace(sample_rate / 2, min(80, sample_rate / 8), height) * size / sample_rate
    spread = np.stack([np.interp(rows, np.arange(size // 2 + 1), frame) for frame in level], 1)
    part = np.clip((spread - max(level.max(), 0) + 70) / 70, 0, 1) * (len(SPECTRUM) - 1)
    return np.stack([np.interp(part, np.arange(len(SPECTRUM)), stop) for stop in SPECTRUM.T], -1).astype(np.uint8)


def _axis(draw: ImageDraw, duration: float, top: int) -> None:
    """Ticks every quarter of a second, labels every half (every second from 5 s on)."""
    every = 0.5 if duration < 5 else 1.0
    for k in range(int(duration / (every / 2)) + 1):
        t, x, label = k * every / 2, _x(k * every / 2, duration), k % 2 == 0
        draw.line((x, (top + 2) * SCALE, x, (top + (9 if label else 6)) * SCALE), fill=FAINT, width=SCALE)
        if label:
            edge = "la" if k == 0 else "ra" if x > (WIDTH - 2 * MARGIN) * SCALE else "ma"
            draw.text((x, (top + 11) * SCALE), f"{t:g} s", fill=FAINT, font=_font(13), anchor=edge)
