"""Changes to a clip that keep picture and sound what they are to each other; what would spoil the target is refused.

A model learns to make what it is shown. So a change is allowed where the result could have been recorded: another part
of the clip, another part of the picture, its mirror image with left and right sound exchanged, another volume.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from soundstage.core.errors import ConfigError
from soundstage.data.reading import Raw
from soundstage.data.shapes import ClipShape
from soundstage.media.frames import resize
from soundstage.media.geometry import half_up
from soundstage.media.waves import ROLES, normalise_loudness

if TYPE_CHECKING:
    from soundstage.data.records import Sample, Source, SourceConfig

__all__ = ["REFUSED", "Augmented", "Crop", "Flip", "Loudness", "Polarity", "TimeCrop", "change", "time_crop"]

REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "pitch_shift": "the pitch of a thing follows from its size and material, which the picture shows",
        "time_stretch": "it moves sounds away from what is seen to make them; TimeCrop takes another part instead",
        "speed": "things fall and swing at the pace of the world; and sound stretched by 10 % to a kept pitch "
        "(ffmpeg's atempo) has its onsets 11 ms away at the median and up to 23, measured on 200 events of the world",
        "temporal_subsample": "it drops frames of the picture under an unchanged sound, so other motion is learnt",
        "noise": "the model learns to make the noise; use clean clips, or say the noise in the caption",
        "reverb": "the room that is heard would not be the room that is seen",
        "equalizer": "the model learns to make the colouring; loudness is evened by Loudness",
        "clipping": "the model learns to make the distortion",
        "sound_shift": "it breaks the sync that the model is to learn",
        "mix": "a second sound has nothing that is seen to make it",
        "blur": "the model learns to make blurred pictures",
        "brightness": "the model learns to make wrongly exposed pictures",
        "colour_jitter": "colours are in the caption, and the model learns to make wrong ones",
        "rotate": "the picture gets corners that nobody filmed, and the world a slope",
        "reverse": "causes come after their effects",
        "channel_swap": "sounds come from the side where nothing is seen; Flip mirrors both",
    }
)
"""Known augmentations that spoil what a generator learns, each with the reason. For training a discriminator or an
encoder some are right; they are not offered here."""
SECTION = "scan"
TEXT = "text"


class Change(Protocol):
    """A frozen dataclass: a clip to a clip, drawing only from `rng`."""

    def __call__(self, raw: Raw, rng: np.random.Generator, fps: Fraction) -> Raw: ...


def time_crop(raw: Raw, fps: Fraction, frame: int, num_frames: int) -> Raw:
    """`num_frames` frames from `frame` on, and the sound of that time: from sample round(t x rate), t = frame / fps.

    The sound starts within half a sample of its first frame. Raises ConfigError where the clip is shorter.
    """
    have = None if raw.frames is None else len(raw.frames)
    if frame < 0 or (have is not None and frame + num_frames > have):
        raise ConfigError(f"TimeCrop: frames {frame} to {frame + num_frames} are not in a clip of {have}")
    begin, end = (half_up(Fraction(at) / fps * raw.sample_rate) for at in (frame, frame + num_frames))
    if raw.wave is not None and end > raw.wave.shape[1] + 1:
        raise ConfigError(f"TimeCrop: samples {begin} to {end} are not in a clip of {raw.wave.shape[1]}")
    frames = None if raw.frames is None else raw.frames[frame : frame + num_frames]
    return replace(raw, frames=frames, wave=None if raw.wave is None else raw.wave[:, begin:end])


@dataclass(frozen=True)
class TimeCrop:
    """A random stretch of `num_frames` frames with its sound, starting on a frame."""

    num_frames: int

    def __call__(self, raw: Raw, rng: np.random.Generator, fps: Fraction) -> Raw:
        """As `time_crop`."""
        if raw.frames is not None:
            room = len(raw.frames) - self.num_frames
        else:
            assert raw.wave is not None
            room = int(Fraction(raw.wave.shape[1], raw.sample_rate) * fps) - self.num_frames
        if room < 0:
            raise ConfigError(f"TimeCrop: the clip has not {self.num_frames} frames; read longer windows")
        return time_crop(raw, fps, int(rng.integers(room + 1)), self.num_frames)


@dataclass(frozen=True)
class Crop:
    """A random part of the picture of its own aspect, scaled back to its size. least: of its area, above 0 to 1."""

    least: float = 0.7

    def __post_init__(self) -> None:
        if not 0 < self.least <= 1:
            raise ConfigError(f"Crop.least: {self.least} is not above 0 and up to 1")

    def __call__(self, raw: Raw, rng: np.random.Generator, fps: Fraction) -> Raw:
        """The same place in all frames; the sound stays."""
        del fps
        share, across, down = np.sqrt(rng.uniform(self.least, 1)), rng.random(), rng.random()
        if raw.frames is None:
            return raw
        size = raw.frames.shape[1:3]
        height, width = (max(1, round(side * share)) for side in size)
        top, left = round((size[0] - height) * down), round((size[1] - width) * across)
        part = raw.frames[:, top : top + height, left : left + width]
        return replace(raw, frames=resize(np.ascontiguousarray(part), (size[0], size[1])))


@dataclass(frozen=True)
class Flip:
    """The mirror image, with the left and right channels exchanged, with a probability.

    Not of a clip in which writing was found, that is whose measured `text` is above `most_text`; nor of one that was
    never measured, unless `unmeasured` says so.
    """

    probability: float = 0.5
    most_text: float = 0.02
    unmeasured: bool = False

    def __call__(self, raw: Raw, rng: np.random.Generator, fps: Fraction) -> Raw:
        """The clip or its mirror image."""
        del fps
        wanted = rng.random() < self.probability
        return mirrored(raw) if wanted and self.allows(raw.facts) else raw

    def allows(self, facts: Mapping[str, Any]) -> bool:
        """Whether a clip of which this is known may be mirrored."""
        text = (facts.get(SECTION) or {}).get(TEXT)
        return self.unmeasured if text is None else float(text) <= self.most_text


def mirrored(raw: Raw) -> Raw:
    """The mirror image: columns in reverse, and each left channel in the place of its right one."""
    frames = None if raw.frames is None else np.ascontiguousarray(raw.frames[:, :, ::-1])
    return replace(raw, frames=frames, wave=None if raw.wave is None else raw.wave[_sides(len(raw.wave))])


def _sides(channels: int) -> list[int]:
    """Where each channel comes from in a mirror image, by ffmpeg's layout of so many. Raises ConfigError."""
    roles = ROLES.get(channels)
    if roles is None:
        raise ConfigError(f"Flip: which of {channels} channels are left and right is not known; leave flip out")
    order = list(range(channels))
    for left in (i for i, role in enumerate(roles) if role == "L"):
        right = roles.index("R", left)
        order[left], order[right] = right, left
    return order


@dataclass(frozen=True)
class Loudness:
    """The sound at `target` LUFS, its peak at most `peak` dBFS; silence stays silent."""

    target: float = -23.0
    peak: float = -1.0

    def __call__(self, raw: Raw, rng: np.random.Generator, fps: Fraction) -> Raw:
        """One gain for all of the clip."""
        del rng, fps
        if raw.wave is None or not raw.wave.size:
            return raw
        wave = normalise_loudness(raw.wave, raw.sample_rate, target=self.target, peak=self.peak)
        return replace(raw, wave=wave)


@dataclass(frozen=True)
class Polarity:
    """All channels times -1, with a probability: inaudible, and no reason to learn one sign."""

    probability: float = 0.5

    def __call__(self, raw: Raw, rng: np.random.Generator, fps: Fraction) -> Raw:
        """The clip or its inverse."""
        del fps
        wanted = rng.random() < self.probability
        return replace(raw, wave=-raw.wave) if wanted and raw.wave is not None else raw


OFFERED: Mapping[str, type[Any]] = MappingProxyType(
    {"time_crop": TimeCrop, "crop": Crop, "flip": Flip, "loudness": Loudness, "polarity": Polarity}
)


def change(name: str, *arguments: float) -> Change:
    """An augmentation by name. Raises ConfigError, with the reason for one that would spoil the target."""
    if name in OFFERED:
        return OFFERED[name](*arguments)
    offered = ", ".join(OFFERED)
    if name in REFUSED:
        raise ConfigError(f"augment: {name} is refused: {REFUSED[name]}. Offered are {offered}")
    near = difflib.get_close_matches(name, [*OFFERED, *REFUSED], n=1)
    raise ConfigError(f"augment: {name!r} is unknown{f', is {near[0]!r} meant' if near else ''}; offered are {offered}")


@dataclass(frozen=True)
class Augmented:
    """A source each of whose clips comes in `variants` ways, each made by `changes` from (seed, clip, variant).

    So a sample is still a pure function of its index, and can be kept encoded. Variant 0 is the clip as it is, but for
    changes that are not drawn. longer: frames that windows have beyond the model's, for a TimeCrop among the changes,
    which is added where it is not 0.
    """

    source: SourceConfig
    changes: tuple[Change, ...]
    variants: int = 4
    seed: int = 0
    longer: int = 0

    def build(self, shape: ClipShape) -> AugmentedSource:
        """The source; raises ConfigError as the one within does."""
        return AugmentedSource(self, shape)


class AugmentedSource:
    """Sample i is variant i mod variants of clip i // variants."""

    def __init__(self, config: Augmented, shape: ClipShape) -> None:
        if config.variants < 1 or config.longer < 0:
            raise ConfigError("Augmented: variants is at least 1, and longer at least 0")
        self._config, self._shape = config, shape
        read = replace(shape, num_frames=shape.num_frames + config.longer, num_samples=None)
        self._source: Source = config.source.build(read)
        self._changes = (*((TimeCrop(shape.num_frames),) if config.longer else ()), *config.changes)
        size = self._source.size
        self.size: int | None = None if size is None else size * config.variants
        self.key = repr((self._source.key, self._changes, config.variants, config.seed))

    def window(self, index: int) -> Altered:
        """What a worker does for sample `index`."""
        clip, variant = divmod(index, self._config.variants)
        window = getattr(self._source, "window", None)
        if window is None:
            from soundstage.data.workers import Whole

            inner: Any = Whole(self._source, clip, self._shape.sample_rate)
        else:
            inner = window(clip)
        return Altered(inner, self._changes, (self._config.seed, clip, variant), self._shape)

    def item(self, index: int) -> Sample:
        """The sample."""
        from soundstage.data.records import sample_of

        return sample_of(self.window(index).read())


@dataclass(frozen=True, eq=False)
class Altered:
    """A window and what is done to it."""

    window: Any
    changes: Sequence[Change]
    draw: tuple[int, int, int]
    shape: ClipShape

    @property
    def id(self) -> str:
        return f"{self.window.id}~{self.draw[2]}"

    def read(self) -> Raw:
        """The changed clip, in the shape."""
        raw = self.window.read()
        rng = np.random.default_rng(self.draw)
        for each in self.changes if self.draw[2] else [c for c in self.changes if not _drawn(c)]:
            raw = each(raw, rng, self.shape.rate)
        if raw.wave is not None:
            raw = replace(raw, wave=_length(raw.wave, self.shape.samples))
        return replace(raw, id=self.id)


def _drawn(one: Change) -> bool:
    """Whether a change is a matter of chance, which variant 0 is spared; a crop in time there must be."""
    return isinstance(one, Crop | Flip | Polarity)


def _length(wave: np.ndarray, samples: int) -> np.ndarray:
    """Cut, or padded with silence: windows of one length may differ by one sample in where their ends round to."""
    return np.pad(wave[:, :samples], ((0, 0), (0, max(0, samples - wave.shape[1]))))
