"""A tiny system with a linear codec and a random denoiser in which each modality hears the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from soundstage.core.av import AV, spread
from soundstage.core.conditions import Conditions
from soundstage.core.denoiser import StreamGeometry
from soundstage.core.system import Sampling, System
from soundstage.media.clip import Clip

GEOMETRY = AV(
    video=StreamGeometry(Fraction(8), 2, channels=3, spatial_stride=4, size=(8, 8), causal_first=True),
    audio=StreamGeometry(Fraction(8000), 1000, channels=8),
)
FRAMES, SAMPLES = 9, 9000
SHAPE = AV(video=(3, 5, 2, 2), audio=(8, 9))


class LinearCodec:
    """Means over blocks of 2 frames by 4 by 4 pixels, and over blocks of 125 samples."""

    geometry = GEOMETRY

    def encode(self, media: AV[Tensor]) -> AV[Tensor]:
        return AV(
            video=None if media.video is None else self._pictures(media.video),
            audio=None if media.audio is None else self._sound(media.audio),
        )

    def decode(self, latents: AV[Tensor]) -> AV[Tensor]:
        video = latents.video
        if video is not None:
            video = video.repeat_interleave(2, 2)[:, :, 1:].repeat_interleave(4, 3).repeat_interleave(4, 4)
        audio = latents.audio
        if audio is not None:
            audio = audio.movedim(1, 2).flatten(1)[:, None].repeat_interleave(125, 2)
        return AV(video=video, audio=audio)

    def _pictures(self, video: Tensor) -> Tensor:
        blocks = torch.nn.functional.avg_pool3d(torch.cat([video[:, :, :1], video], dim=2), (2, 4, 4))
        assert blocks.shape[2] == GEOMETRY["video"].steps(video.shape[2])
        return blocks

    def _sound(self, audio: Tensor) -> Tensor:
        short = -audio.shape[2] % 1000
        means = torch.nn.functional.pad(audio, (0, short)).unflatten(2, (-1, 8, 125)).mean(-1)
        return means[:, 0].movedim(1, 2)


class RandomDenoiser(torch.nn.Module):
    """v = x - tanh(W x + U mean of the other modality + text + t), per latent step."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.own = AV(*(torch.randn(c, c, generator=generator) for c in (3, 8)))
        self.other = AV(torch.randn(3, 8, generator=generator), torch.randn(8, 3, generator=generator))
        self.words = AV(torch.randn(256, 3, generator=generator), torch.randn(256, 8, generator=generator))

    def forward(self, x_t: AV[Tensor], t: AV[Tensor], cond: Conditions, *, r: AV[Tensor] | None = None) -> AV[Tensor]:
        assert r is None
        means = x_t.map(lambda x: x.flatten(2).mean(2))
        out = {}
        for name, x in x_t.items():
            y = torch.einsum("dc,bc...->bd...", self.own[name], x) + spread(t[name], x)
            for rest in means.modalities:
                if rest != name:
                    y = y + (means[rest] @ self.other[name].T).reshape(*y.shape[:2], *(1,) * (y.ndim - 2))
            told = (self.words[name][cond.text[name]] * cond.text_mask[name][..., None]).sum(1)
            out[name] = x - torch.tanh(y + told.reshape(*y.shape[:2], *(1,) * (y.ndim - 2)))
        return AV(**out)


def encode_text(prompts: Sequence[str]) -> Conditions:
    """Byte ids of a fixed length, with a mask."""
    rows = [list(prompt.encode()[:32]) for prompt in prompts]
    ids = torch.tensor([row + [0] * (32 - len(row)) for row in rows])
    mask = torch.tensor([[True] * len(row) + [False] * (32 - len(row)) for row in rows])
    return Conditions(text=AV(ids, ids), text_mask=AV(mask, mask))


@pytest.fixture
def make_system() -> Callable[..., System]:
    def make(*modalities: str, **sampling: object) -> System:
        names = modalities or ("video", "audio")
        codec = LinearCodec()
        how = Sampling(**{"steps": 6, "guidance": AV(2.0, 1.5), **sampling})
        return System("tiny", RandomDenoiser(), codec, encode_text, how, names, SHAPE.only(*names))

    return make


@pytest.fixture
def clip() -> Clip:
    """1.125 s: a bar that moves over noise, and two tones in stereo, at other rates and sizes than the system's."""
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 80, (14, 12, 20, 3)).astype(np.uint8)
    for i in range(14):
        frames[i, :, i : i + 5] = 200
    t = np.arange(18000) / 16000
    wave = np.stack([0.5 * np.sin(2 * np.pi * 220 * t), 0.25 * np.sin(2 * np.pi * 330 * t)]).astype(np.float32)
    return Clip(frames=frames, fps=Fraction(12), wave=wave, sample_rate=16000)


@pytest.fixture
def saved(clip: Clip, tmp_path: Path) -> Path:
    return clip.save(tmp_path / "given.mp4")
