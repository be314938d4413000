"""`Known`: parts of the latents are given, the rest is generated around them.

Image-to-video, extension, inpainting and a kept background are all this wrapper with another mask.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from soundstage.core.av import AV, spread
from soundstage.core.conditions import Conditions
from soundstage.core.denoiser import Denoiser
from soundstage.core.errors import ShapeError


@dataclass(frozen=True, eq=False)
class Known:
    """A denoiser that leads to `latents` wherever `mask` is 0 and generates where it is 1.

    latents: clean, video (B, C, F, H, W), audio (B, C, A); a modality absent here has nothing known.
    mask: per modality, per latent step (B, F) or per cell (B, 1 or C, F, H, W).

    A step that is kept whole enters the network clean and with its own t = 0, so t becomes (B, F). Single kept cells
    enter at the level of their step: the velocity (x_t - latents) / t returned for them keeps them on the straight
    path from their first noise to the given value, under every sampler here. A mask of ones changes nothing.
    Wrap it around guidance, not inside; `keep(x)` after the last step removes the rounding. Raises ShapeError when
    latents, mask and x_t do not fit.
    """

    denoiser: Denoiser
    latents: AV[Tensor]
    mask: AV[Tensor]
    partly: tuple[str, ...] = field(init=False)
    """Modalities of which something is kept."""

    def __post_init__(self) -> None:
        self.latents.map(_check_mask, self.mask)
        partly = tuple(name for name, mask in self.mask.items() if bool((mask < 0.5).any()))
        object.__setattr__(self, "partly", partly)

    def __call__(self, x_t: AV[Tensor], t: AV[Tensor], cond: Conditions, *, r: AV[Tensor] | None = None) -> AV[Tensor]:
        names = [name for name in self.partly if name in x_t]
        if not names:
            return self.denoiser(x_t, t, cond, r=r)
        x, known = x_t.only(*names), self._latents(x_t, names)
        cells = known.map(_cells, self.mask.only(*names))
        steps = cells.map(_whole_steps)
        entering = x.map(lambda a, k, s: torch.where(spread(s, a), k, a), known, steps)
        v = self.denoiser(
            x_t.replace(**entering.as_dict()),
            _zero_at(t, steps),
            cond,
            r=None if r is None else _zero_at(r, steps),
        )
        led = x.map(_straight, known, t.only(*names))
        return v.replace(**v.only(*names).map(lambda a, b, kept: torch.where(kept, b, a), led, cells).as_dict())

    def keep(self, x: AV[Tensor]) -> AV[Tensor]:
        """x with the known part put in exactly."""
        names = [name for name in self.partly if name in x]
        known = self._latents(x, names)
        kept = known.map(lambda k, mask, a: torch.where(_cells(k, mask), k, a), self.mask.only(*names), x.only(*names))
        return x.replace(**kept.as_dict())

    def _latents(self, x: AV[Tensor], names: list[str]) -> AV[Tensor]:
        for name in names:
            if self.latents[name].shape != x[name].shape:
                raise ShapeError(
                    f"Known.latents.{name}: {tuple(self.latents[name].shape)} does not fit x_t {tuple(x[name].shape)}; "
                    "wrap Known around guidance, and give one sample per sample of x_t"
                )
        return self.latents.only(*names).map(lambda k, a: k.to(a), x.only(*names))


def _check_mask(latents: Tensor, mask: Tensor) -> None:
    per_step = (latents.shape[0], latents.shape[2])
    per_cell = mask.ndim == latents.ndim and all(
        a in (1, b) if axis == 1 else a == b for axis, (a, b) in enumerate(zip(mask.shape, latents.shape, strict=True))
    )
    if tuple(mask.shape) != per_step and not per_cell:
        raise ShapeError(
            f"Known.mask: {tuple(mask.shape)} fits neither the latent steps {per_step} nor the latents "
            f"{tuple(latents.shape)}"
        )


def _cells(latents: Tensor, mask: Tensor) -> Tensor:
    """Where cells are kept, broadcasting onto the latents: (B, 1 or C, F, ...) bool."""
    return spread(mask.to(latents.device) < 0.5, latents)


def _whole_steps(cells: Tensor) -> Tensor:
    """(B, F) bool: every cell of the step is kept."""
    return cells.movedim(2, 1).flatten(2).all(dim=2)


def _zero_at(t: AV[Tensor], steps: AV[Tensor]) -> AV[Tensor]:
    """t as (B, F) with 0 at the kept steps."""
    zeroed = {
        name: torch.where(kept, 0.0, t[name][:, None] if t[name].ndim == 1 else t[name]).to(t[name].dtype)
        for name, kept in steps.items()
    }
    return t.replace(**zeroed)


def _straight(x: Tensor, known: Tensor, t: Tensor) -> Tensor:
    """v = (x - known) / t, and 0 at t = 0."""
    level = spread(t, x)
    v = (x - known) / level.clamp_min(torch.finfo(level.dtype).tiny)
    return torch.where(level > 0, v, 0.0).to(x.dtype)
