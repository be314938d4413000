"""Autoencoder training: how near a codec's media come to the originals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from soundstage.core.denoiser import Losses
from soundstage.core.rng import Rng
from soundstage.objectives.base import Batch, Nets

Measure = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Reconstruction:
    """measures: (pair, term, measure): the codec's forward returns named pairs (made, true), each measured by terms.

    The term's key is "term/modality".
    """

    measures: tuple[tuple[str, str, Measure], ...]

    def turn(self, step: int) -> tuple[str, ...]:  # noqa: ARG002
        """The codec moves at every step."""
        return ("student",)

    def loss(self, role: str, nets: Nets, batch: Batch, rng: Rng) -> Losses:  # noqa: ARG002
        """One scalar per measure and modality."""
        pairs = nets[role](batch.x0)
        losses: Losses = {}
        for pair, term, measure in self.measures:
            made, true = pairs[pair]
            losses |= {f"{term}/{name}": measure(made[name], true[name]) for name in made.modalities}
        return losses


def absolute(made: Tensor, true: Tensor) -> Tensor:
    """Mean absolute error."""
    return (made - true).abs().mean()


def change(made: Tensor, true: Tensor) -> Tensor:
    """Mean absolute error of the difference between successive steps (axis 2): errors that flicker."""
    return (made.diff(dim=2) - true.diff(dim=2)).abs().mean()


@dataclass(frozen=True)
class Salient:
    """Absolute error where something happens: weighed by the distance from the clip's mean frame, plus a floor."""

    floor: float = 0.1

    def __call__(self, made: Tensor, true: Tensor) -> Tensor:
        """made, true: (B, C, F, H, W)."""
        weight = (true - true.mean(dim=2, keepdim=True)).abs().amax(dim=1, keepdim=True) + self.floor
        return (weight * (made - true).abs()).mean() / weight.mean()


@dataclass(frozen=True)
class MultiResolutionSTFT:
    """Distance of magnitudes |X|^0.5 at several window sizes (after arXiv:1910.11480, section 2.2).

    Short windows place the onsets, long ones the pitch. made, true: (B, 1, N).
    """

    sizes: tuple[int, ...] = (64, 256, 1024)

    def __call__(self, made: Tensor, true: Tensor) -> Tensor:
        """Mean over the window sizes."""
        return torch.stack([(self._root(made, n) - self._root(true, n)).abs().mean() for n in self.sizes]).mean()

    def _root(self, wave: Tensor, size: int) -> Tensor:
        window = torch.hann_window(size, device=wave.device)
        padded = F.pad(wave[:, 0].float(), (size // 2, size // 2))
        spectrum = torch.stft(padded, size, size // 4, window=window, center=False, return_complex=True)
        return (spectrum.real.square() + spectrum.imag.square() + 1e-6).pow(0.25)
