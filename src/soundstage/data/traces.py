"""Traces of a file: what a scan saw and heard, frame by frame, and its summary in numbers over any span."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import isfinite, nan
from pathlib import Path

import numpy as np

from soundstage.data.prints import SOUNDS, Print
from soundstage.data.sound import bandwidth, from_levels
from soundstage.media.shots import CutSignal, Shot, shots_of
from soundstage.media.sync import ENVELOPE_RATE, NEAR, curve_offset, impulse_events, match, rise

__all__ = ["MEASURES", "Traces"]

MEASURES = {
    "seconds": "length of the span",
    "lines": "the shorter side, pixels",
    "height": "pixels as shown",
    "width": "pixels as shown",
    "fps": "frames per second, by their times",
    "cuts": "boundaries inside the span",
    "level": "mean brightness, 0 to 1",
    "black": "share of frames that are black",
    "blank": "share of frames without any structure",
    "dark": "share of pixels crushed to black, in frames that are not black",
    "bright": "share of pixels blown to white",
    "static": "share of frames equal to the one before",
    "shake": "median of displacement times the share that moves, picture heights per second",
    "motion": "mean displacement of what has structure, picture heights per second",
    "moving": "share of the picture that moves, mean",
    "bars": "share of the picture in black bars",
    "blur": "standard deviation of the sharpest edges, pixels of a picture 720 pixels high",
    "text": "share of the picture that looks like writing and stays",
    "blocks": "share of rows that step at one phase of 8 pixels, beyond any other phase",
    "sample_rate": "samples per second",
    "channels": "channels",
    "loudness": "LUFS, gated as EBU R128",
    "peak": "sample peak, dB full scale",
    "silence": "share of time in silences of a second or more",
    "quiet": "share of time below -70 dB full scale",
    "clipped": "samples at full scale in runs, of those from half of it",
    "bandwidth": "Hz up to which the sound reaches before a wall; half the sample rate without one",
    "dc": "largest mean of a second, of full scale",
    "side": "dB of left minus right, relative to left plus right",
    "balance": "dB between the louder and the quieter channel",
    "phase": "correlation of left and right",
    "snr": "dB of the sound over its steady noise, where the sound pauses",
    "speech": "0 to 1, how like a voice it moves; a rough guess",
}
PULSE = 0.02  # seconds: silence is judged by mean squares over so long
SILENT = -70.0  # dB full scale: quieter than the noise of a room
SPREAD = 0.4  # frames of spread between matched events at which confidence halves
EDGE = 10.0  # levels, of 255: the least step, averaged along it, with which a black bar ends
STILL = 0.05  # mean difference, of 255, up to which a frame repeats the one before


@dataclass(frozen=True, eq=False)
class Traces:
    """Arrays by name (see PictureMeter and SoundMeter), and "ticks" with "tick": times of frames, exact.

    tick: seconds per tick as "1/12800". size: (height, width) as shown.
    """

    arrays: dict[str, np.ndarray]
    tick: Fraction = Fraction(1)
    size: tuple[int, int] = (0, 0)
    sample_rate: int = 0
    channels: int = 0

    @property
    def times(self) -> np.ndarray:
        """(F,) float64 seconds at which the frames are shown."""
        return np.cumsum(self.arrays.get("ticks", np.zeros(0, np.int64)), dtype=np.int64) * float(self.tick)

    @property
    def duration(self) -> float:
        """Seconds of picture, or of sound where there is no picture."""
        times = self.times
        if len(times):
            return float(times[-1]) + (float(np.median(np.diff(times))) if len(times) > 1 else 0.0)
        return len(self.arrays.get("sound", ())) / ENVELOPE_RATE

    def save(self, path: Path) -> Path:
        """Write an npz without pickled objects; the same traces give the same bytes."""
        about = [self.tick.numerator, self.tick.denominator, *self.size, self.sample_rate, self.channels]
        with path.open("wb") as file:
            np.savez_compressed(file, about=np.array(about, np.int64), **self.arrays)
        return path

    @classmethod
    def load(cls, path: Path) -> Traces:
        """Read what `save` wrote."""
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        over, under, height, width, rate, channels = arrays.pop("about").tolist()
        return cls(arrays, Fraction(over, under), (height, width), rate, channels)

    def shots(self, *, threshold: float = 0.25, shortest: float = 0.25) -> list[Shot]:
        """The shots by the stored signal of cuts; the numbers are those of media.shots.shots."""
        times = self.times
        if not len(times):
            return [Shot(0.0, self.duration)]
        signal = CutSignal(*(self.arrays[name].astype(np.float32) for name in CutSignal.__dataclass_fields__))
        return shots_of(signal, times, threshold=threshold, shortest=shortest)

    def summary(self, start: float = 0.0, end: float | None = None) -> dict[str, float]:
        """The numbers of MEASURES over [start, end) seconds; those of an absent picture or sound are left out."""
        end = self.duration if end is None else end
        found = {"seconds": end - start} | self._picture(start, end) | self._sound(start, end)
        return {name: round(float(value), 5) for name, value in found.items() if isfinite(value)}

    def sync(self, start: float = 0.0, end: float | None = None) -> dict[str, float] | None:
        """{"lag_ms", "confidence"} of sound behind picture over the span; None without either or without events."""
        end = self.duration if end is None else end
        times = self.times
        if not len(times) or "sound" not in self.arrays:
            return None
        frames = self._frames(start, end)
        low, high = (round(x * ENVELOPE_RATE) for x in (start, end))
        envelope = rise(10 ** (from_levels(self.arrays["sound"][low:high]).astype(np.float64) / 20))
        onsets = self.arrays["onsets"]
        onsets = onsets[(onsets >= start) & (onsets < end)] - start
        shown = times[frames] - start
        if len(shown) < 3:
            return None
        impulse = self.arrays["impulse"][frames].astype(np.float64)
        impulse[[0, -1]] = 0  # those see beyond the span
        fps = 1 / float(np.median(np.diff(shown)))
        offset = curve_offset(impulse, shown, fps, envelope, onsets)
        if not isfinite(offset.ms):
            return None
        lag, spread = offset.ms, offset.spread_ms
        # What repeats agrees at many lags: where nearly as much agrees without any, that is meant.
        visual = impulse_events(impulse, shown)
        pairs = match(visual, onsets, gate=max(1.5 / fps, NEAR))
        if abs(lag) > 1500 / fps and len(pairs) >= max(2, 0.7 * offset.matched):
            late = 1000 * (onsets[pairs[:, 1]] - visual[pairs[:, 0]])
            lag = float(np.median(late))
            spread = float(np.median(np.abs(late - lag)))
        # Sound of its own agrees within a fraction of a frame; by chance events agree within the gate of the matching.
        confidence = offset.confidence / (1 + (spread * fps / 1000 / SPREAD) ** 4)
        beat = np.diff(onsets)
        if len(beat) > 1 and beat.std() < 0.1 * beat.mean() and abs(lag) > 200 * beat.mean():
            confidence /= 2  # an even beat does not tell which event is meant
        if offset.matched < 2 and abs(lag) > 1000 * NEAR:
            confidence /= 2  # a lone sound far from a lone movement may have nothing to do with it
        return {"lag_ms": round(lag, 2), "confidence": round(confidence, 6)}

    def print(self, start: float = 0.0, end: float | None = None) -> Print:
        """Fingerprints over a span."""
        end = self.duration if end is None else end
        empty = np.zeros(0, np.uint64), np.zeros((0, 12), np.uint8), np.zeros(0, np.uint16)
        pictures, colours, sounds = (self.arrays.get(n, x) for n, x in zip(PRINTS, empty, strict=True))
        if len(pictures):
            times = self.times[self.arrays["print_at"]]
            inside = (times >= start - 1e-6) & (times < end - 1e-6)
            pictures, colours = pictures[inside], colours[inside]
        return Print(pictures, colours, sounds[round(start * SOUNDS) : round(end * SOUNDS)])

    def _frames(self, start: float, end: float) -> slice:
        slack = float(self.tick) / 2 + 1e-9
        return slice(*np.searchsorted(self.times, [start - slack, end - slack]).tolist())

    def _picture(self, start: float, end: float) -> dict[str, float]:
        frames, times = self._frames(start, end), self.times
        if frames.stop <= frames.start:
            return {}
        part = {name: self.arrays[name][frames].astype(np.float32) for name in PER_FRAME}
        looks = (self.arrays["look"] >= frames.start) & (self.arrays["look"] < frames.stop)
        blur, text, blocks = (self.arrays[name][looks] for name in ("blur", "text", "blocks"))
        height, width = self.size
        step = np.diff(times[frames])
        black = (part["level"] < 20) & (part["spread"] < 4)
        lit = ~black if (~black).any() else np.ones(len(black), bool)
        after = slice(1, None)
        seconds = max(float(step.sum()), 1e-9)
        inside = sum(start + 1e-6 < shot.start < end - 1e-6 for shot in self.shots())
        return {
            "lines": min(height, width),
            "height": height,
            "width": width,
            "fps": len(step) / seconds if len(step) else nan,
            "cuts": inside,
            "level": part["level"].mean() / 255,
            "black": black.mean(),
            "blank": (part["spread"] < 4).mean(),
            "dark": part["dark"][lit].mean() / 255,
            "bright": part["bright"].mean() / 255,
            "static": (part["change"][after] < STILL).mean() if len(step) else nan,
            "motion": part["motion"][after].sum() / seconds if len(step) else nan,
            "shake": np.median((part["motion"] * part["moving"])[after] / 255 / np.maximum(step, 1e-6))
            if len(step)
            else nan,
            "moving": part["moving"][after].mean() / 255 if len(step) else nan,
            "bars": self._bars(frames),
            "blur": np.nanmin(blur) * 720 / min(height, width) if np.isfinite(blur).any() else nan,
            "text": text[1:].mean() if len(text) > 1 else text.mean() if len(text) else nan,
            "blocks": np.median(blocks) if len(blocks) else nan,
        }

    def _bars(self, frames: slice) -> float:
        """Share that is black in all frames but those black altogether, and ends sharply in some where it ends.

        One dark moment at an edge is no bar, nor is a dark room.
        """
        bars, edges = self.arrays["bars"][frames], self.arrays["edges"][frames]
        bars, edges = bars[bars[:, 0] < 255], edges[bars[:, 0] < 255]
        if not len(bars):
            return 0.0
        least = np.quantile(bars, 0.05, axis=0)
        sharp = np.where(np.abs(bars - least) <= 1, edges, 0).max(axis=0) >= EDGE
        above, below, left, right = least * sharp
        factor = min(1.0, 90 / min(self.size))
        height, width = (2 * round(side * factor / 2) for side in self.size)
        return 1 - max(0.0, 1 - (above + below) / height) * max(0.0, 1 - (left + right) / width)

    def _sound(self, start: float, end: float) -> dict[str, float]:
        if "sound" not in self.arrays:
            return {}
        fast = slice(round(start * ENVELOPE_RATE), round(end * ENVELOPE_RATE))
        tenths = slice(round(start * 10), max(round(end * 10), round(start * 10) + 1))
        low = min(int(start), len(self.arrays["peak"]) - 1)
        seconds = slice(low, max(low + 1, int(np.ceil(end - 0.25))))
        part = {name: self.arrays[name][seconds] for name in PER_SECOND}
        power = 10 ** (from_levels(self.arrays["sound"][fast]) / 10)
        steps = round(PULSE * ENVELOPE_RATE)
        pulses = power[: len(power) // steps * steps].reshape(-1, steps).mean(axis=1)
        if not len(pulses):
            return {}
        silent = pulses < 10 ** (SILENT / 10)
        left, right, product = (float(part[name].mean()) for name in ("left", "right", "product"))
        known = np.isfinite(part["noise"])
        total, noise = (float(part[name][known].sum()) for name in ("power", "noise"))
        found = {
            "sample_rate": self.sample_rate,
            "channels": self.channels,
            "loudness": _loudness(self.arrays["energy"][tenths]),
            "peak": 20 * np.log10(max(float(part["peak"].max()), 1e-6)),
            "silence": _long(silent, round(1 / PULSE)),
            "quiet": silent.mean(),
            "clipped": float(part["clipped"].sum()) / max(float(part["loud"].sum()), 100.0),
            # A wall shows in what is loudest or in the room's own noise, whichever the coder has left clean.
            "bandwidth": min(
                bandwidth(from_levels(part["spectrum"].max(axis=0)), self.sample_rate),
                bandwidth(from_levels(np.median(part["usual"], axis=0)), self.sample_rate),
            ),
            "dc": part["dc"].max(),
            "snr": 10 * np.log10(max(total - noise, 1e-4 * total) / max(noise, 1e-12)) if total > 1e-10 else nan,
            "speech": _speech(part["voiced"]),
        }
        if self.channels > 1 and max(left, right) > 1e-10:
            mid, side = left + right + 2 * product, left + right - 2 * product
            found |= {
                "side": 10 * np.log10(max(side, 1e-12) / max(mid, 1e-12)),
                "balance": 10 * np.log10(max(left, right) / max(min(left, right), 1e-12)),
                "phase": product / max(np.sqrt(left * right), 1e-12),
            }
        return found


PRINTS = ("prints", "colours", "sounds")
PER_FRAME = ("level", "dark", "bright", "change", "motion", "moving", "spread")
PER_SECOND = (
    "peak",
    "clipped",
    "loud",
    "dc",
    "left",
    "right",
    "product",
    "power",
    "noise",
    "voiced",
    "spectrum",
    "usual",
)


def _loudness(energy: np.ndarray) -> float:
    """(N,) K-weighted mean squares of 0.1 s -> LUFS by the two gates of BS.1770-4; -70 for silence."""
    count = min(4, len(energy))
    blocks = np.convolve(energy, np.full(count, 1 / count), mode="valid") if count else np.zeros(0)
    level = 10 * np.log10(np.maximum(blocks, 1e-30)) - 0.691
    blocks, level = blocks[level > -70], level[level > -70]
    if not len(blocks):
        return -70.0
    blocks = blocks[level > 10 * np.log10(blocks.mean()) - 0.691 - 10]
    return 10 * np.log10(blocks.mean()) - 0.691


def _long(silent: np.ndarray, least: int) -> float:
    """Share of places in runs of at least `least`."""
    edges = np.flatnonzero(np.diff(np.r_[False, silent, False].astype(int))).reshape(-1, 2)
    runs = edges[:, 1] - edges[:, 0]
    return float(runs[runs >= least].sum()) / max(len(silent), 1)


def _speech(voiced: np.ndarray) -> float:
    """(N,) shares of voiced time -> 0 to 1: a voice sounds for some of the time, and pauses."""
    share = float(voiced.mean())
    return float(np.clip((share - 0.1) / 0.15, 0, 1) * np.clip((0.97 - share) / 0.05, 0, 1))
