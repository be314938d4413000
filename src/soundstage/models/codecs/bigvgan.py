"""The BigVGAN vocoder of MMAudio's 16 kHz sound: log-mel to wave, in chunks that equal the whole (arXiv:2206.04658).

diffusers' MMAudioVocoder is BigVGAN 2: it ends in a clamp and a convolution without bias, where the 16 kHz weights end
in tanh and have the bias. Names of modules are those of the published file once its weight normalisation is folded.
Shape letters: B batch, M mel frames, N samples, C channels, L length.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, reduce

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from soundstage.core.errors import ConfigError, ShapeError, WeightsError
from soundstage.models.weights import KeyMap, Source

TAPS = 12  # of the anti-aliasing filter
ACTIVATION_REACH = 5  # a smoothed activation sees so many samples on either side: up 2x, then down 2x, by TAPS taps


@dataclass(frozen=True)
class BigVGANConfig:
    """width: channels of the first layer, halved by every stage. rates, kernels: of the upsampling stages.

    stacks, dilations: kernel sizes and dilations of the residual stacks, whose mean ends each stage.
    """

    bands: int = 80
    width: int = 1536
    rates: tuple[int, ...] = (4, 4, 2, 2, 2, 2)
    kernels: tuple[int, ...] = (8, 8, 4, 4, 4, 4)
    stacks: tuple[int, ...] = (3, 7, 11)
    dilations: tuple[int, ...] = (1, 3, 5)

    def __post_init__(self) -> None:
        if len(self.rates) != len(self.kernels):
            raise ConfigError(f"vocoder: {len(self.rates)} rates and {len(self.kernels)} kernels; give one per stage")
        if any((kernel - rate) % 2 or kernel < rate for rate, kernel in zip(self.rates, self.kernels, strict=True)):
            raise ConfigError("vocoder.kernels: each must be its rate plus an even number")

    @property
    def hop(self) -> int:
        """Samples of a mel frame."""
        return math.prod(self.rates)

    @property
    def halo(self) -> int:
        """Mel frames that the samples of one frame depend on, on either side: the sum of all kernels' reaches."""
        reach = 3 + ACTIVATION_REACH
        for rate, kernel in zip(reversed(self.rates), reversed(self.kernels), strict=True):
            reach += max(
                sum((size - 1) // 2 * (dilation + 1) + 2 * ACTIVATION_REACH for dilation in self.dilations)
                for size in self.stacks
            )
            reach = (reach + (kernel + rate) // 2 - 1) // rate
        return reach + 3

    def build(self) -> BigVGAN:
        """The module, randomly initialised."""
        return BigVGAN(self)

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, ...]]) -> BigVGANConfig:
        """The widths of a published file, with weight normalisation or folded; raises WeightsError for another model.

        Shapes do not tell rates and dilations: a stage's rate is half its kernel, dilations are 1, 3, 5, ...
        """
        plain = {name.replace(RAW, ".weight"): shape for name, shape in shapes.items()}
        try:
            width, bands, _ = plain["conv_pre.weight"]
            plain["conv_post.bias"]  # BigVGAN 2 has none
            kernels = tuple(plain[f"ups.{i}.0.weight"][2] for i in range(_count(plain, "ups.{}.0.weight")))
            blocks = _count(plain, "resblocks.{}.convs1.0.weight")
            stacks = tuple(plain[f"resblocks.{i}.convs1.0.weight"][2] for i in range(blocks // max(len(kernels), 1)))
            dilations = tuple(1 + 2 * i for i in range(_count(plain, "resblocks.0.convs1.{}.weight")))
            return cls(bands, width, tuple(kernel // 2 for kernel in kernels), kernels, stacks, dilations)
        except (KeyError, ValueError) as error:
            raise WeightsError(f"not the weights of a BigVGAN vocoder ({error}); give MMAudio's best_netG.pt") from None


BIGVGAN_16K = BigVGANConfig()
"""The vocoder of MMAudio's 16 kHz sound: 112,199,473 parameters; with normalisation's gains 112,231,250."""


@cache
def lowpass_taps() -> list[float]:
    """TAPS taps of unit sum: a sinc that passes the lower half of a band, in Kaiser's window of half-width 0.3."""
    attenuation = 2.285 * (TAPS // 2 - 1) * math.pi * 4 * 0.3 + 7.95  # 51.0 dB: Kaiser's rule for more than 50 follows
    taps = np.kaiser(TAPS, 0.1102 * (attenuation - 8.7)) * np.sinc((np.arange(TAPS) - (TAPS - 1) / 2) / 2)
    return (taps / taps.sum()).tolist()


class Lowpass(nn.Module):
    """Holds `filter` (1, 1, TAPS): the taps of the file, or lowpass_taps."""

    filter: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("filter", torch.tensor(lowpass_taps()).view(1, 1, TAPS))

    def per_channel(self, x_BCL: Tensor) -> Tensor:
        """(C, 1, TAPS)."""
        return self.filter.expand(x_BCL.shape[1], -1, -1)


class Up(Lowpass):
    """Twice the rate: (B, C, L) -> (B, C, 2 L)."""

    def forward(self, x_BCL: Tensor) -> Tensor:
        x = F.pad(x_BCL, (5, 5), mode="replicate")
        return 2 * F.conv_transpose1d(x, self.per_channel(x), stride=2, groups=x.shape[1])[..., 15:-15]


class Down(nn.Module):
    """Half the rate: (B, C, 2 L) -> (B, C, L)."""

    def __init__(self) -> None:
        super().__init__()
        self.lowpass = Lowpass()

    def forward(self, x_BCL: Tensor) -> Tensor:
        x = F.pad(x_BCL, (5, 6), mode="replicate")
        return F.conv1d(x, self.lowpass.per_channel(x), stride=2, groups=x.shape[1])


class Snake(nn.Module):
    """x + sin^2(exp(alpha) x) / exp(beta), per channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, x_BCL: Tensor) -> Tensor:
        return x_BCL + (x_BCL * self.alpha.exp()[:, None]).sin().square() / (self.beta.exp()[:, None] + 1e-9)


class SmoothSnake(nn.Module):
    """A Snake at twice the rate, so that its harmonics do not fold back: (B, C, L) -> the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.act, self.upsample, self.downsample = Snake(channels), Up(), Down()

    def forward(self, x_BCL: Tensor) -> Tensor:
        return self.downsample(self.act(self.upsample(x_BCL)))


class Stack(nn.Module):
    """Residual pairs of a dilated and a plain convolution, a smooth Snake before each."""

    def __init__(self, channels: int, size: int, dilations: Sequence[int]) -> None:
        super().__init__()
        self.convs1 = nn.ModuleList(nn.Conv1d(channels, channels, size, 1, size // 2 * d, d) for d in dilations)
        self.convs2 = nn.ModuleList(nn.Conv1d(channels, channels, size, 1, size // 2) for _ in dilations)
        self.activations = nn.ModuleList(SmoothSnake(channels) for _ in range(2 * len(dilations)))

    def forward(self, x_BCL: Tensor) -> Tensor:
        """(B, C, L) -> the same."""
        for i, (dilated, plain) in enumerate(zip(self.convs1, self.convs2, strict=True)):
            h = dilated(self.activations[2 * i](x_BCL))
            x_BCL = x_BCL + plain(self.activations[2 * i + 1](h))
        return x_BCL


class BigVGAN(nn.Module):
    """forward: log10 mel (B, bands, M) -> wave (B, 1, hop M) within [-1, 1]."""

    def __init__(self, config: BigVGANConfig) -> None:
        super().__init__()
        self.config = config
        self.conv_pre = nn.Conv1d(config.bands, config.width, 7, padding=3)
        self.ups, self.resblocks = nn.ModuleList(), nn.ModuleList()
        width = config.width
        for rate, kernel in zip(config.rates, config.kernels, strict=True):
            up = nn.ConvTranspose1d(width, width // 2, kernel, rate, (kernel - rate) // 2)
            width //= 2
            self.ups.append(nn.ModuleList([up]))
            self.resblocks.extend(Stack(width, size, config.dilations) for size in config.stacks)
        self.activation_post = SmoothSnake(width)
        self.conv_post = nn.Conv1d(width, 1, 7, padding=3)

    def forward(self, mel_BML: Tensor) -> Tensor:
        """Mel to sound, the whole at once."""
        x, count = self.conv_pre(mel_BML), len(self.config.stacks)
        for stage, up in enumerate(self.ups):
            x = up[0](x)  # type: ignore[index]
            stacks = self.resblocks[stage * count : (stage + 1) * count]
            x = reduce(torch.add, (stack(x) for stack in stacks)) / count
        return self.conv_post(self.activation_post(x)).tanh()

    def stream(self, mel_BML: Tensor, frames: int | None = None) -> Iterator[Tensor]:
        """The same sound in pieces of `frames` mel frames (None: one piece), each made with a halo on either side."""
        length, halo, hop = mel_BML.shape[-1], self.config.halo, self.config.hop
        step = length if frames is None else frames
        if step < 1:
            raise ShapeError(f"vocoder: pieces of {step} mel frames; give 1 or more, or None for the whole")
        for start in range(0, length, step):
            first, stop = max(start - halo, 0), min(start + step, length)
            wave = self(mel_BML[..., first : stop + halo])
            yield wave[..., (start - first) * hop : (stop - first) * hop]


GAIN, RAW = ".parametrizations.weight.original0", ".parametrizations.weight.original1"


def fold(gain: Tensor, raw: Tensor) -> Tensor:
    """The weight that weight normalisation stands for (arXiv:1602.07868, eq. 2): gain (C, 1, 1), raw (C, ...)."""
    return raw * (gain / raw.flatten(1).norm(dim=1).view_as(gain))


def _keys(names: Sequence[str]) -> dict[str, Source]:
    found = {name: Source((name,)) for name in names if not name.endswith((GAIN, RAW))}
    stems = {name.removesuffix(end) for end in (GAIN, RAW) for name in names if name.endswith(end)}
    return found | {f"{stem}.weight": Source((stem + GAIN, stem + RAW), fold) for stem in stems}


BIGVGAN_KEYS: KeyMap = _keys
"""best_netG.pt (inside="generator"), weight-normalised (784 names) or folded (668), to a BigVGAN."""


def _count(shapes: Mapping[str, tuple[int, ...]], pattern: str) -> int:
    """How many of the numbered names exist, from 0."""
    return next(i for i in range(len(shapes) + 1) if pattern.format(i) not in shapes)
