"""Recipes on the procedural world: the two small codecs, then the tiny joint model.

soundstage train soundstage.recipes.world:video_codec
soundstage train soundstage.recipes.world:audio_codec
soundstage train soundstage.recipes.world:tiny
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from soundstage.core.av import AV
from soundstage.core.errors import ConfigError
from soundstage.core.system import Sampling, System, load_system
from soundstage.core.times import Joint, LogitNormal
from soundstage.data.clips import Clips
from soundstage.data.latents import Latents
from soundstage.data.records import ClipShape, Sample, to_media
from soundstage.evaluation.oracle import Oracle
from soundstage.evaluation.suite import stream_items
from soundstage.inference.generator import Generator
from soundstage.models.codecs.audio import AudioCodecConfig
from soundstage.models.codecs.pair import PairCodec, fit_statistics
from soundstage.models.codecs.video import VideoCodecConfig
from soundstage.models.system import save_system
from soundstage.models.text.bytes import ByteTextConfig, tokenize
from soundstage.models.unified_dit import UnifiedDiTConfig
from soundstage.objectives.flow_matching import FlowMatching
from soundstage.objectives.reconstruction import MultiResolutionSTFT, Reconstruction, Salient, absolute, change
from soundstage.training.checkpoint import load_weights
from soundstage.training.config import Optim, TrainConfig
from soundstage.training.state import Validation
from soundstage.world import KINDS, render, stream_item


@dataclass(frozen=True)
class World:
    """The endless world as a source of clips; held-out cells never appear. kinds: None = all."""

    seed: int = 0
    kinds: tuple[str, ...] | None = None

    def build(self, shape: ClipShape) -> WorldSource:
        """The source for clips of `shape`."""
        unknown = set(self.kinds or ()) - set(KINDS)
        if unknown:
            raise ConfigError(f"kinds: {sorted(unknown)} are not kinds of the world: use {', '.join(KINDS)}")
        return WorldSource(self, shape)


class WorldSource:
    """Clip i is a pure function of (seed, i)."""

    size: int | None = None

    def __init__(self, config: World, shape: ClipShape) -> None:
        self._config, self._shape = config, shape
        self.key = f"world-{config.seed}-{'-'.join(config.kinds or ('all',))}"

    def item(self, index: int) -> Sample:
        """Render clip `index` with one of its captions."""
        shape = self._shape
        scene, text = stream_item(self._config.seed, index, kinds=self._config.kinds)
        clip = render(
            scene, size=shape.size[0], fps=shape.rate, num_frames=shape.num_frames, sample_rate=shape.sample_rate
        ).clip
        return Sample(to_media(clip, shape), text, f"{self.key}-{index}")


def video_codec() -> TrainConfig:
    """The causal video autoencoder.

    soundstage train soundstage.recipes.world:video_codec

    25 600 clips in about 25 minutes on two busy cores of an AMD EPYC: mean absolute error 0.027 of [-1, 1].
    """
    return TrainConfig(
        name="world-video-codec",
        model=VideoCodecConfig(),
        objective=Reconstruction(
            (("frames", "recon", absolute), ("frames", "salient", Salient()), ("frames", "change", change))
        ),
        data=Clips(World(seed=11), modalities=("video",)),
        steps=1600,
        batch_size=16,
        precision="bf16",
        optim=Optim(kind="muon", lr=2e-3, warmup=50, schedule="wsd", decay=0.3, weight_decay=0.0),
        ema=0.995,
        save_every=200,
    )


def audio_codec() -> TrainConfig:
    """The mel autoencoder and its vocoder.

    soundstage train soundstage.recipes.world:audio_codec

    25 600 clips in 14 minutes on one busy core of an AMD EPYC: mean absolute error 0.07 decades of mel magnitude.
    """
    return TrainConfig(
        name="world-audio-codec",
        model=AudioCodecConfig(),
        objective=Reconstruction((("mel", "recon", absolute), ("wave", "stft", MultiResolutionSTFT()))),
        data=Clips(World(seed=12), modalities=("audio",)),
        steps=1600,
        batch_size=16,
        precision="bf16",
        optim=Optim(kind="muon", lr=2e-3, warmup=50, schedule="wsd", decay=0.3, weight_decay=0.0),
        ema=0.995,
        save_every=200,
    )


@dataclass(frozen=True)
class WorldCodec:
    """Both codecs from the folders of their runs; without folders, those of a model (default: the shipped one)."""

    video: str | None = None
    audio: str | None = None
    model: str | None = None

    def build(self) -> PairCodec:
        """The codec, with latents of zero mean and unit variance over 256 clips of the world."""
        if self.video is None or self.audio is None:
            codec = load_system(self.model).codec
            if not isinstance(codec, PairCodec):
                raise ConfigError(f"data.codec.model: the codec of {self.model} is not one of the world's")
            return codec
        streams = AV(video=VideoCodecConfig().build(), audio=AudioCodecConfig().build())
        load_weights(streams["video"], self.video)
        load_weights(streams["audio"], self.audio)
        codec = PairCodec(streams).eval().requires_grad_(False)
        measured = Clips(World(seed=13)).build()
        media = [measured.batch(step, 32).x0 for step in range(8)]
        for name, stream in streams.items():
            fit_statistics(stream, [batch[name] for batch in media])
        return codec


MIXTURE = (
    *("bounce",) * 5,
    *("metronome",) * 3,
    *("drums",) * 4,
    *("engine", "typing", "talker", "roll", "silent", "offscreen"),
)
"""Kinds with their weights: events that can be counted and timed come more often."""


def tiny() -> TrainConfig:
    """The tiny joint model: 4.2 M parameters, 36 video and 33 audio tokens, every task at once.

    soundstage train soundstage.recipes.world:tiny

    268 800 samples in 65 minutes on two busy cores of an AMD EPYC without AMX; the figures are in the card of the
    shipped model (weights/world-tiny/README.md), which these settings made.
    """
    tasks = {"t2av": 0.5, "a2v": 0.1, "v2a": 0.1, "i2av": 0.08, "extension": 0.06, "inpainting_time": 0.06}
    return TrainConfig(
        name="world-tiny",
        model=UnifiedDiTConfig(text=ByteTextConfig(alphabet=128)),
        objective=FlowMatching(
            times=Joint(AV(video=LogitNormal(0.4, 1.2), audio=LogitNormal(0.4, 1.2))),
            tasks=tasks | {"t2v": 0.05, "t2a": 0.05},
        ),
        data=Latents(World(seed=1, kinds=MIXTURE), WorldCodec(), tokenize, num=40000),
        steps=2800,
        batch_size=96,
        precision="bf16",
        optim=Optim(kind="muon", lr=2e-3, warmup=100, schedule="wsd", decay=0.35, weight_decay=0.01),
        ema=0.998,
        log_every=20,
        save_every=200,
        validate=score,
        validate_every=1000,
    )


SAMPLING = Sampling("dpmpp_2m", 20, AV(video=3.0, audio=3.0), AV(video=3.0, audio=3.0))
"""How the tiny model is sampled unless asked otherwise."""


def system_of(config: TrainConfig, student: torch.nn.Module, device: str | torch.device = "cpu") -> System:
    """The student of a run of `tiny`, with the codec its data was encoded by."""
    codec = config.data.codec.build().to(device)
    return System(
        config.name,
        student,
        codec,
        lambda prompts: tokenize(prompts).to(device),
        SAMPLING,
        config.model.geometry.modalities,
        config.model.shape,
    )


def score(validation: Validation) -> dict[str, float]:
    """The world score of eight prompts each of bounce, metronome and drums; writes their clips as samples."""
    system = system_of(validation.config, validation.student, validation.device)
    return scored(Generator(system, validation.device), validation.folder)


def scored(generator: Generator, folder: Path) -> dict[str, float]:
    """The means of `score` for any generator of the world's clips, which are written to the folder."""
    items = stream_items(24, seed=1, kinds=("bounce", "metronome", "drums"))
    made = generator.generate([item.caption for item in items], seed=[item.index for item in items])
    found: dict[str, list[float]] = {}
    for item, one in zip(items, made, strict=True):
        one.save(folder / f"{item.id}.mp4")
        for key, value in Oracle()(one.clip, item.wanted).items():
            found.setdefault(key, []).append(value)
    wanted = ("f1@45", "abs_offset_ms", "kind", "colour", "pitch_semitones", "misses", "hallucinations")
    measured = {key: [value for value in found.get(key, ()) if np.isfinite(value)] for key in wanted}
    return {f"world/{key}": float(np.mean(values)) for key, values in measured.items() if values}


def pack(run: str | Path, folder: str | Path, recipe: TrainConfig | None = None) -> Path:
    """Write the averaged student of a run of `tiny`, with its codec, as a model folder; returns the folder."""
    config = tiny() if recipe is None else recipe
    student = config.model.build()
    load_weights(student, run)
    return save_system(Path(folder), config.name, config.model, student, config.data.codec.build(), SAMPLING)
