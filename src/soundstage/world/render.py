"""From a scene to a clip with its exact truth, and the endless stream of scenes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from soundstage.media.clip import Clip
from soundstage.world.captions import caption
from soundstage.world.kinds import PERFORM
from soundstage.world.spec import Scene, sample_scene
from soundstage.world.stage import Envelope, Event, Stage, Track


@dataclass(frozen=True, eq=False)
class Rendered:
    """A clip and everything that is true of it.

    events are in order of time, with continuous time stamps; tracks give the pose of each source at every frame;
    envelopes ("speed", "aperture", "f0", ...) are sampled every millisecond.
    """

    scene: Scene
    clip: Clip
    events: tuple[Event, ...]
    tracks: dict[str, Track]
    envelopes: dict[str, Envelope]


def render(
    scene: Scene,
    *,
    size: int = 64,
    fps: Fraction | int = 16,
    num_frames: int = 33,
    sample_rate: int = 16000,
    num_samples: int | None = None,
) -> Rendered:
    """Render a scene; the same scene and options always give the same clip.

    size: frame height and width in pixels, 16 to 256. Frame i shows the instant i / fps.
    num_samples: default num_frames / fps seconds, rounded. Lasting 2 to 4 s, a clip holds exactly the counted events.
    """
    fps = Fraction(fps)
    duration = num_frames / fps
    if not 16 <= size <= 256:
        raise ValueError(f"size: {size} pixels is not between 16 and 256")
    if not 1 <= duration <= 8:
        raise ValueError(
            f"num_frames: {num_frames} frames at {fps} per second last {float(duration):.2f} s, "
            f"not 1 to 8; the nearest is {round(min(max(duration, 1), 8) * fps)}"
        )
    num_samples = round(duration * sample_rate) if num_samples is None else num_samples
    stage = Stage(scene.seed, size, fps, num_frames, sample_rate, num_samples)
    PERFORM[scene.kind](stage, scene)
    frames = (stage.canvas + np.float32(0.5)).clip(0, 255).astype(np.uint8)
    wave = stage.mixer.wave.clip(-1, 1)[None]
    clip = Clip(frames=frames, fps=fps, wave=wave, sample_rate=sample_rate)
    events = tuple(sorted(stage.events, key=lambda event: event.t))
    return Rendered(scene, clip, events, stage.tracks, stage.envelopes)


def stream_item(
    seed: int, index: int, *, kinds: Sequence[str] | None = None, holdout: bool = False
) -> tuple[Scene, str]:
    """Item `index` of the endless stream `seed`: a scene and one paraphrase of its caption, a pure function of both."""
    rng = np.random.Generator(np.random.Philox(key=[seed, index]))
    scene = sample_scene(rng, kinds=kinds, holdout=holdout)
    return scene, caption(scene, rng)
