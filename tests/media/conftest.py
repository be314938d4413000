"""Clips made for the tests of media."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from soundstage.media.clip import Clip
from soundstage.media.geometry import Clock

EVENTS = (0.3, 0.71, 1.2)


@pytest.fixture
def flashes() -> Callable[..., tuple[Clip, np.ndarray]]:
    """flashes(fps, sample_rate, channels=1, size=(32, 32)) -> (clip, exact seconds of its clicks and flashes)."""

    def make(
        fps: str, sample_rate: int, channels: int = 1, size: tuple[int, int] = (32, 32)
    ) -> tuple[Clip, np.ndarray]:
        clock = Clock(fps, sample_rate)
        plan = clock.plan(1.6)
        frames = np.full((plan.num_frames, *size, 3), 40, np.uint8)
        wave = np.zeros((channels, plan.num_samples), np.float32)
        truth = []
        for time in EVENTS:
            frame = clock.frames_for(time)
            sample = clock.samples_for_frames(frame)
            frames[frame] = 230
            wave[:, sample : sample + 8] = np.tile([0.9, -0.9], 4)
            truth.append(float(clock.frame_time(frame)))
        return Clip(frames, clock.fps, wave, sample_rate), np.array(truth)

    return make


@pytest.fixture
def noise() -> Callable[..., Clip]:
    """noise(seconds, fps=24, sample_rate=16000, channels=2, size=(32, 48)) -> a clip whose frames all differ."""

    def make(
        seconds: float,
        fps: str = "24",
        sample_rate: int = 16000,
        channels: int = 2,
        size: tuple[int, int] = (32, 48),
    ) -> Clip:
        rng = np.random.default_rng(0)
        plan = Clock(fps, sample_rate).plan(seconds)
        frames = rng.integers(0, 200, (plan.num_frames, size[0] // 8, size[1] // 8, 3), np.uint8)
        frames = frames.repeat(8, axis=1).repeat(8, axis=2)
        wave = rng.normal(0, 0.1, (channels, plan.num_samples)).astype(np.float32)
        return Clip(frames, plan.clock.fps, wave, sample_rate)

    return make
