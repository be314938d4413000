"""Guidance: push the velocity away from what a weaker prediction says.

v = v_strong + (scale - 1) (v_strong - v_weak), per modality. The weak prediction is the same network told less
(`negative`), or a weaker network (`weak`): with blocks skipped, with the modalities isolated, or trained less
(arXiv:2406.02507). Wrappers nest; in `Guided(Guided(d, text, s), None, m, weak=w)` the text term counts m times.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from soundstage.core.av import AV, cat, split, spread
from soundstage.core.conditions import Conditions
from soundstage.core.denoiser import Denoiser
from soundstage.core.errors import ConfigError, ShapeError


@dataclass(frozen=True)
class APG:
    """Adaptive projected guidance (arXiv:2410.02416): less of what oversaturates.

    eta: share kept of the part of the x0 difference that is parallel to x0 (1 = plain guidance). limit: largest root
    mean square of the x0 difference per sample and modality (the paper's radius divided by the square root of the
    size, so that it does not depend on the latent shape). The paper's momentum is left out: a denoiser is pure.
    """

    eta: float = 0.0
    limit: float = math.inf

    def __call__(self, v: Tensor, v_weak: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The difference v - v_weak, limited and projected; v, v_weak, x_t of one shape, t (B,) or (B, F)."""
        level = spread(t, x_t).to(x_t.dtype)
        difference = v - v_weak
        in_x0 = level * difference
        x0 = torch.where(level > 0, x_t - level * v, 0.0)
        axes = tuple(range(1, x_t.ndim))
        tiny = torch.finfo(x_t.dtype).tiny
        share = (in_x0 * x0).sum(axes, keepdim=True) / x0.square().sum(axes, keepdim=True).clamp_min(tiny)
        parallel = share * x0 / level.clamp_min(tiny)
        size = in_x0.square().mean(axes, keepdim=True).sqrt().clamp_min(tiny)
        return (self.limit / size).clamp(max=1.0) * (difference - (1 - self.eta) * parallel)


@dataclass(frozen=True, eq=False)
class Guided:
    """Classifier-free guidance (arXiv:2207.12598) with a scale per modality.

    negative: what the weak prediction is told. Text absent in it means no text; reference, control, mask and positions
        absent in it are those of the call, and a batch of one serves every sample. None means the same conditions.
    scale: per modality; 1 is exactly the strong prediction, and 1 everywhere costs one plain call.
    interval: levels t, ends included, at which guidance acts (arXiv:2404.07724); per modality by its own t.
    weak: another denoiser for the weak prediction, in a call of its own.
    projection: a rule for the difference, such as APG().
    together: both predictions in one batched call, or in two calls that need half of the memory. A weak denoiser always
        costs a call of its own.
    """

    denoiser: Denoiser
    negative: Conditions | None
    scale: AV[float]
    interval: tuple[float, float] = (0.0, 1.0)
    weak: Denoiser | None = None
    projection: APG | None = None
    together: bool = True
    _joined: list[tuple[Conditions, Conditions]] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.negative is None and self.weak is None:
            raise ConfigError("Guided: needs a negative (Conditions() for none) or a weak denoiser")
        if not self.interval[0] <= self.interval[1]:
            raise ConfigError(f"Guided.interval: {self.interval} must be (low, high) with low <= high")

    def __call__(self, x_t: AV[Tensor], t: AV[Tensor], cond: Conditions, *, r: AV[Tensor] | None = None) -> AV[Tensor]:
        scale = self.scale.only(*x_t.modalities)
        if all(s == 1 for s in scale.values()) or self._idle(t):
            return self.denoiser(x_t, t, cond, r=r)
        v, v_weak = self._pair(x_t, t, cond, r)
        return v.map(self._combine, v_weak, x_t, t, scale)

    def _combine(self, v: Tensor, v_weak: Tensor, x_t: Tensor, t: Tensor, scale: float) -> Tensor:
        if scale == 1:
            return v
        difference = v - v_weak if self.projection is None else self.projection(v, v_weak, x_t, t)
        guided = v + (scale - 1) * difference
        return guided if self._always else torch.where(spread(self._inside(t), v), guided, v)

    def _pair(
        self, x_t: AV[Tensor], t: AV[Tensor], cond: Conditions, r: AV[Tensor] | None
    ) -> tuple[AV[Tensor], AV[Tensor]]:
        negative = cond if self.negative is None else _complete(self.negative, cond, x_t)
        if self.weak is not None or not self.together:
            return self.denoiser(x_t, t, cond, r=r), (self.weak or self.denoiser)(x_t, t, negative, r=r)
        both = self._both(cond, negative)
        v = self.denoiser(cat([x_t, x_t]), cat([t, t]), both, r=None if r is None else cat([r, r]))
        strong, weak = split(v, 2)
        return strong, weak

    def _both(self, cond: Conditions, negative: Conditions) -> Conditions:
        """Both conditions as one batch: the same tensors for the same `cond`, so that a memo of the text can hold."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return Conditions.cat([cond, negative])
        if not self._joined or self._joined[0][0] is not cond:
            self._joined[:] = [(cond, Conditions.cat([cond, negative]))]
        return self._joined[0][1]

    @property
    def _always(self) -> bool:
        return self.interval[0] <= 0 and self.interval[1] >= 1

    def _inside(self, t: Tensor) -> Tensor:
        return (t >= self.interval[0]) & (t <= self.interval[1])

    def _idle(self, t: AV[Tensor]) -> bool:
        """No level is inside the interval: the weak call can be saved (not asked while tracing)."""
        if self._always or torch.compiler.is_compiling():
            return False
        return not any(bool(self._inside(level).any()) for level in t.values())


@dataclass(frozen=True, eq=False)
class Isolated:
    """Each modality denoised alone, the other absent: the weak denoiser of cross-modal guidance."""

    denoiser: Denoiser

    def __call__(self, x_t: AV[Tensor], t: AV[Tensor], cond: Conditions, *, r: AV[Tensor] | None = None) -> AV[Tensor]:
        alone = {}
        for name in x_t.modalities:
            r_alone = None if r is None else r.only(name)
            alone[name] = self.denoiser(x_t.only(name), t.only(name), cond.only(name), r=r_alone)[name]
        return AV(**alone)


def cross_modal(
    denoiser: Denoiser, scale: AV[float], interval: tuple[float, float] = (0.0, 1.0), weak: Denoiser | None = None
) -> Guided:
    """Strengthen what one modality tells the other: away from the modalities isolated, or from a given `weak` network
    whose exchange between modalities is perturbed."""
    return Guided(denoiser, None, scale, interval, weak=Isolated(denoiser) if weak is None else weak)


def skip_layer(
    denoiser: Denoiser, skipped: Denoiser, scale: AV[float], interval: tuple[float, float] = (0.0, 1.0)
) -> Guided:
    """Away from `skipped`, the same network with some blocks left out (the models package provides it).

    Ovi skips a block in the negative pass instead: `Guided(denoiser, negative, scale, weak=skipped)`.
    """
    return Guided(denoiser, None, scale, interval, weak=skipped)


def _complete(negative: Conditions, cond: Conditions, x_t: AV[Tensor]) -> Conditions:
    """The negative for this call: its batch spread, and everything but text taken from `cond` where absent."""
    negative = negative.only(*x_t.modalities)
    batch = x_t.batch
    if negative.batch not in (None, 1, batch):
        raise ShapeError(f"Guided.negative: batch {negative.batch} fits neither 1 nor the {batch} samples of x_t")
    if negative.batch == 1 and batch > 1:
        negative = negative.map(lambda x: x.expand(batch, *x.shape[1:]))
    shared = ("reference", "control", "mask", "positions")
    return replace(negative, **{n: getattr(cond, n) for n in shared if getattr(negative, n) is None})
