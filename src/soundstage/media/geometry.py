"""The exact clock: one object from which every count, position and timestamp of a clip follows.

Frames, samples, latent lengths, rotary positions in seconds, crop windows and mux timestamps are all derived from
exact fractions, so picture and sound cannot drift apart (23 for 24000/1001 frames per second loses 407 ms in 10 s).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from math import floor
from typing import NamedTuple

import numpy as np

from soundstage.media.errors import MediaError

Seconds = float | int | str | Fraction

# Rates written as N * 1000 / 1001, the only ones that people abbreviate (29.97, 23.98).
NTSC_BASES = (12, 15, 24, 30, 48, 60, 120)


def frame_rate(value: Seconds) -> Fraction:
    """The exact frame rate meant by `value`: 24, "24000/1001", "23.976", 29.97, 23.98, Fraction(25, 2).

    A decimal within 0.005 of an NTSC rate is that NTSC rate; a Fraction is taken as it is. Raises MediaError when not a
    positive number.
    """
    if isinstance(value, Fraction):
        rate = value
    else:
        rate = exact(value, "fps")
        if not (isinstance(value, str) and "/" in value):
            for base in NTSC_BASES:
                ntsc = Fraction(base * 1000, 1001)
                if abs(rate - ntsc) < Fraction(5, 1000):
                    return ntsc
    if rate <= 0:
        raise MediaError(f"fps: {value!r} is not above 0", remedy="give a rate such as 24 or '24000/1001'")
    return rate


def half_up(value: Fraction) -> int:
    """The nearest integer, halves upwards (unlike `round`, which makes uneven steps on a grid of halves)."""
    return floor(value + Fraction(1, 2))


def exact(value: Seconds, name: str) -> Fraction:
    """A decimal as people mean it: 0.1 is 1/10."""
    if isinstance(value, Fraction):
        return value
    try:
        return Fraction(value if isinstance(value, str) else str(float(value)))
    except (ValueError, ZeroDivisionError, TypeError, OverflowError):
        remedy = "give a number such as 24, 23.976 or '24000/1001'"
        raise MediaError(f"{name}: {value!r} is not a finite number", remedy=remedy) from None


class Steps(NamedTuple):
    """Start, middle and end of each latent step: three (L,) float64 arrays of seconds."""

    start: np.ndarray
    middle: np.ndarray
    end: np.ndarray


class Window(NamedTuple):
    """A crop in whole frames and samples: half-open ranges, and the exact time of its first frame in seconds."""

    frames: slice
    samples: slice
    start: Fraction


@dataclass(frozen=True)
class ClipPlan:
    """The counts of one clip, all consistent with `clock`: make it by `Clock.plan`."""

    clock: Clock
    num_frames: int
    num_samples: int

    @property
    def duration(self) -> Fraction:
        """Exact seconds of picture."""
        return self.clock.frame_time(self.num_frames)

    @property
    def video_latents(self) -> int:
        """Number of video latent steps."""
        return self.clock.latent_frames(self.num_frames)

    @property
    def audio_latents(self) -> int:
        """Number of audio latent steps."""
        return self.clock.audio_latents(self.num_samples)

    @property
    def video_steps(self) -> Steps:
        """Seconds of every video latent step."""
        return self.clock.video_steps(self.video_latents)

    @property
    def audio_steps(self) -> Steps:
        """Seconds of every audio latent step."""
        return self.clock.audio_steps(self.audio_latents)


@dataclass(frozen=True)
class Clock:
    """Exact rates of a clip and of the codecs that compress it.

    fps: frames per second (anything `frame_rate` reads; stored as a Fraction).
    sample_rate: samples per second.
    video_stride: frames per video latent step; audio_stride: samples per audio latent step.
    causal_first_frame: the first latent step holds frame 0 alone, so frame counts are 1 + k * video_stride;
        otherwise k * video_stride.
    """

    fps: Fraction
    sample_rate: int
    video_stride: int = 1
    audio_stride: int = 1
    causal_first_frame: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "fps", frame_rate(self.fps))
        for name in ("sample_rate", "video_stride", "audio_stride"):
            value = getattr(self, name)
            if isinstance(value, bool) or int(value) != value or value < 1:
                raise MediaError(f"Clock.{name}: {value!r} is not a whole number above 0")
            object.__setattr__(self, name, int(value))

    # Times, exact.

    def frame_time(self, index: int) -> Fraction:
        """Seconds at which frame `index` is first shown."""
        return Fraction(index) / self.fps

    def sample_time(self, index: int) -> Fraction:
        """Seconds at which sample `index` sounds."""
        return Fraction(index, self.sample_rate)

    def frame_pts(self, index: int, time_base: Fraction) -> int:
        """Mux timestamp of frame `index`, in ticks of `time_base` seconds."""
        return half_up(self.frame_time(index) / time_base)

    def sample_pts(self, index: int, time_base: Fraction) -> int:
        """Mux timestamp of sample `index`, in ticks of `time_base` seconds."""
        return half_up(self.sample_time(index) / time_base)

    # Counts.

    def frames_for(self, duration: Seconds) -> int:
        """Number of frames nearest to `duration` seconds, at least 1; not yet on the latent grid (see `plan`)."""
        return max(1, half_up(exact(duration, "duration") * self.fps))

    def samples_for(self, duration: Seconds) -> int:
        """Number of samples nearest to `duration` seconds."""
        return half_up(exact(duration, "duration") * self.sample_rate)

    def samples_for_frames(self, num_frames: int) -> int:
        """Number of samples that sound while `num_frames` frames are shown; also the sample at which a frame starts."""
        return half_up(self.frame_time(num_frames) * self.sample_rate)

    def nearest_frames(self, num_frames: int | Fraction) -> int:
        """The frame count on the latent grid nearest to `num_frames`."""
        first = 1 if self.causal_first_frame else 0
        steps = half_up((Fraction(num_frames) - first) / self.video_stride)
        return max(steps, 1 - first) * self.video_stride + first

    def nearest_samples(self, num_samples: int | Fraction) -> int:
        """The sample count on the latent grid nearest to `num_samples`."""
        return max(1, half_up(Fraction(num_samples) / self.audio_stride)) * self.audio_stride

    def latent_frames(self, num_frames: int) -> int:
        """Number of video latent steps of `num_frames` frames; raises MediaError off the grid."""
        if num_frames != self.nearest_frames(num_frames):
            grid = f"{'1 + ' if self.causal_first_frame else ''}k * {self.video_stride}"
            raise MediaError(
                f"num_frames: {num_frames} is not on the codec's grid {grid}",
                remedy=f"the nearest is {self.nearest_frames(num_frames)}",
            )
        return num_frames // self.video_stride + (1 if self.causal_first_frame and self.video_stride > 1 else 0)

    def audio_latents(self, num_samples: int) -> int:
        """Number of whole audio latent steps in `num_samples` samples."""
        return num_samples // self.audio_stride

    # Positions of latent steps.

    def video_step(self, index: int) -> tuple[Fraction, Fraction]:
        """Exact start and end in seconds of video latent step `index`."""
        lead = self.video_stride - 1 if self.causal_first_frame else 0
        start, end = index * self.video_stride - lead, (index + 1) * self.video_stride - lead
        return self.frame_time(max(0, start)), self.frame_time(end)

    def audio_step(self, index: int) -> tuple[Fraction, Fraction]:
        """Exact start and end in seconds of audio latent step `index`."""
        return self.sample_time(index * self.audio_stride), self.sample_time((index + 1) * self.audio_stride)

    def video_steps(self, num_latents: int) -> Steps:
        """Seconds of video latent steps 0 .. num_latents - 1 (each value the float nearest to the exact one)."""
        return _steps(self.video_step(i) for i in range(num_latents))

    def audio_steps(self, num_latents: int) -> Steps:
        """Seconds of audio latent steps 0 .. num_latents - 1 (each value the float nearest to the exact one)."""
        return _steps(self.audio_step(i) for i in range(num_latents))

    # Requests.

    @property
    def tolerance(self) -> Fraction:
        """Seconds by which picture and sound of one clip may differ: one frame or one audio step, the longer."""
        return max(1 / self.fps, Fraction(self.audio_stride, self.sample_rate))

    def plan(
        self, duration: Seconds | None = None, *, num_frames: int | None = None, num_samples: int | None = None
    ) -> ClipPlan:
        """The clip that was asked for: at least one of a duration in seconds, a frame count, a sample count.

        A duration alone is rounded to the nearest clip on both latent grids. Counts are taken literally: raises
        MediaError, naming the nearest possible request, when a count is off its grid or when picture, sound and
        duration differ by more than `tolerance`.
        """
        asked = {} if duration is None else {"clip": exact(duration, "duration")}
        if num_frames is not None:
            asked["video"] = self.frame_time(num_frames)
        if num_samples is not None:
            asked["sound"] = self.sample_time(num_samples)
        if not asked:
            raise MediaError("plan: nothing asked", remedy="give duration, num_frames or num_samples")
        for what, seconds in asked.items():
            if seconds <= 0:
                remedy = self._name(self._nearest(Fraction(0)))
                raise MediaError(f"{float(seconds):g} s of {what} is not above 0", remedy=remedy)
        nearest = self._nearest(next(asked[what] for what in ("video", "sound", "clip") if what in asked))
        if num_frames is not None:
            self.latent_frames(num_frames)
        if num_samples is not None and num_samples != self.nearest_samples(num_samples):
            raise MediaError(
                f"num_samples: {num_samples} is not on the codec's grid k * {self.audio_stride}",
                remedy=f"the nearest is {self.nearest_samples(num_samples)}",
            )
        plan = ClipPlan(self, nearest.num_frames, nearest.num_samples if num_samples is None else num_samples)
        lengths = [plan.duration, self.sample_time(plan.num_samples)]
        if len(asked) > 1:
            lengths += asked.values()
        if max(lengths) - min(lengths) > self.tolerance:
            words = " with ".join(f"{float(seconds):g} s of {what}" for what, seconds in asked.items())
            raise MediaError(f"{words} is not one clip", remedy=self._name(nearest))
        return plan

    def crop(self, start: Seconds, end: Seconds) -> Window:
        """The frames and samples of the window [start, end) in seconds.

        It starts on the frame nearest to `start`, has the counts of `plan(end - start)` (so windows of one length
        have one shape), and its sound starts within half a sample of its first frame.
        """
        first, last = exact(start, "start"), exact(end, "end")
        if first < 0 or last <= first:
            raise MediaError(f"crop: {start} to {end} s is not a window", remedy="give 0 <= start < end")
        plan = self.plan(last - first)
        frame = half_up(first * self.fps)
        sample = self.samples_for_frames(frame)
        return Window(
            slice(frame, frame + plan.num_frames), slice(sample, sample + plan.num_samples), self.frame_time(frame)
        )

    def _nearest(self, seconds: Fraction) -> ClipPlan:
        frames = self.nearest_frames(seconds * self.fps)
        return ClipPlan(self, frames, self.nearest_samples(self.frame_time(frames) * self.sample_rate))

    def _name(self, plan: ClipPlan) -> str:
        return (
            f"the nearest possible is {plan.num_frames} frames with {plan.num_samples} samples "
            f"({float(plan.duration):.4g} s)"
        )


def _steps(bounds: Iterable[tuple[Fraction, Fraction]]) -> Steps:
    exact = [(start, (start + end) / 2, end) for start, end in bounds]
    start, middle, end = np.array(exact, dtype=np.float64).reshape(-1, 3).T
    return Steps(start, middle, end)
