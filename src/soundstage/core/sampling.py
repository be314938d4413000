"""Samplers: from noise to data along a grid of times, for any denoiser and any set of modalities.

A sampler is a function `(denoiser, x, times, cond, *, rng, on_step) -> x`. Each modality follows its own grid, and
one whose level does not change in a step is left untouched, bit for bit. Gradients flow; keep latents in float32 or
float64. `on_step(i, x, x0)` sees the sample after step i and the clean latents predicted in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from operator import itemgetter
from typing import Protocol

import torch
from torch import Tensor

from soundstage.core.av import AV
from soundstage.core.conditions import Conditions
from soundstage.core.denoiser import Denoiser
from soundstage.core.errors import ConfigError
from soundstage.core.flow import to_x0
from soundstage.core.rng import Rng
from soundstage.core.schedule import check

OnStep = Callable[[int, AV[Tensor], AV[Tensor]], None]


class Sampler(Protocol):
    """x: latents at times[0]; times: AV of (steps + 1,), from core.schedule; returns latents at times[-1]."""

    def __call__(
        self,
        denoiser: Denoiser,
        x: AV[Tensor],
        times: AV[Tensor],
        cond: Conditions,
        *,
        rng: Rng | None = None,
        on_step: OnStep | None = None,
    ) -> AV[Tensor]: ...


def euler(
    denoiser: Denoiser,
    x: AV[Tensor],
    times: AV[Tensor],
    cond: Conditions,
    *,
    rng: Rng | None = None,  # noqa: ARG001
    on_step: OnStep | None = None,
) -> AV[Tensor]:
    """First order: x += v dt. One call per step."""
    for i, t, span in _spans(x, times):
        v = denoiser(x, t, cond)
        x0 = to_x0(x, v, t)
        x = x.map(_euler_step, v, span)
        _report(on_step, i, x, x0)
    return x


def heun(
    denoiser: Denoiser,
    x: AV[Tensor],
    times: AV[Tensor],
    cond: Conditions,
    *,
    rng: Rng | None = None,  # noqa: ARG001
    on_step: OnStep | None = None,
) -> AV[Tensor]:
    """Second order: x += (v + v') dt / 2 with v' at the Euler guess; two calls per step, one where it ends at t = 0."""
    for i, t, span in _spans(x, times):
        v = denoiser(x, t, cond)
        x0 = to_x0(x, v, t)
        guess = x.map(_euler_step, v, span)
        if any(t_next > 0 for _, t_next in span.values()):
            v_next = denoiser(guess, _levels(x, span.map(itemgetter(1))), cond)
            v = v.map(lambda a, b, s: (a + b) / 2 if s[1] > 0 else a, v_next, span)
        x = x.map(_euler_step, v, span)
        _report(on_step, i, x, x0)
    return x


def dpmpp_2m(
    denoiser: Denoiser,
    x: AV[Tensor],
    times: AV[Tensor],
    cond: Conditions,
    *,
    rng: Rng | None = None,  # noqa: ARG001
    on_step: OnStep | None = None,
) -> AV[Tensor]:
    """DPM-Solver++ 2M (arXiv:2211.01095), order 2 from the last two x0; first and last step of order 1."""
    return _multistep(denoiser, x, times, cond, on_step, corrector=False)


def unipc(
    denoiser: Denoiser,
    x: AV[Tensor],
    times: AV[Tensor],
    cond: Conditions,
    *,
    rng: Rng | None = None,  # noqa: ARG001
    on_step: OnStep | None = None,
) -> AV[Tensor]:
    """UniPC (arXiv:2302.04867), order 2, B(h) = exp(h) - 1 ("bh2"): DPM++ 2M and a corrector without new calls."""
    return _multistep(denoiser, x, times, cond, on_step, corrector=True)


def renoise(
    denoiser: Denoiser,
    x: AV[Tensor],
    times: AV[Tensor],
    cond: Conditions,
    *,
    rng: Rng | None = None,
    on_step: OnStep | None = None,
) -> AV[Tensor]:
    """Few-step students: jump to x0, then add fresh noise, x = (1 - t') x0 + t' noise (arXiv:2303.01469, alg. 1).

    Raises ConfigError without an rng where fresh noise is needed.
    """
    for i, t, span in _spans(x, times):
        x0 = to_x0(x, denoiser(x, t, cond), t)
        noise = x0
        if any(0 < t_next < t for t, t_next in span.values()):
            if rng is None:
                raise ConfigError("renoise: needs rng=Rng.of(seed, batch) to draw the noise of each step")
            noise = rng.fold("renoise", i).normal_like(x0)
        x = x.map(_renoise_step, x0, noise, span)
        _report(on_step, i, x, x0)
    return x


SAMPLERS: Mapping[str, Sampler] = {
    "euler": euler,
    "heun": heun,
    "unipc": unipc,
    "dpmpp_2m": dpmpp_2m,
    "renoise": renoise,
}


def _spans(x: AV[Tensor], times: AV[Tensor]) -> Iterator[tuple[int, AV[Tensor], AV[tuple[float, float]]]]:
    """Per step: its index, t as (B,) per modality, and (t, t_next) as numbers per modality."""
    spans = x.map(lambda _, grid: list(pairwise(grid.tolist())), times)
    for i in range(check(times)):
        span = spans.map(itemgetter(i))
        yield i, _levels(x, span.map(itemgetter(0))), span


def _levels(x: AV[Tensor], t: AV[float]) -> AV[Tensor]:
    def full(z: Tensor, level: float) -> Tensor:
        return torch.full((z.shape[0],), level, dtype=torch.promote_types(z.dtype, torch.float32), device=z.device)

    return x.map(full, t)


def _report(on_step: OnStep | None, i: int, x: AV[Tensor], x0: AV[Tensor]) -> None:
    if on_step is not None:
        on_step(i, x, x0)


def _euler_step(x: Tensor, v: Tensor, span: tuple[float, float]) -> Tensor:
    t, t_next = span
    return x if t_next == t else x + (t_next - t) * v


def _renoise_step(x: Tensor, x0: Tensor, noise: Tensor, span: tuple[float, float]) -> Tensor:
    t, t_next = span
    if t_next in (0.0, t):
        return x if t_next == t else x0
    return (1 - t_next) * x0 + t_next * noise


def _multistep(
    denoiser: Denoiser,
    x: AV[Tensor],
    times: AV[Tensor],
    cond: Conditions,
    on_step: OnStep | None,
    corrector: bool,
) -> AV[Tensor]:
    tracks = x.map(lambda _, grid: _Track(grid.tolist()), times)
    for i, t, _ in _spans(x, times):
        x0 = to_x0(x, denoiser(x, t, cond), t)
        if corrector and i > 0:
            x = x.map(lambda z, m, track, i=i: track.correct(i, z, m), x0, tracks)
        x = x.map(lambda z, m, track, i=i: track.predict(i, z, m), x0, tracks)
        _report(on_step, i, x, x0)
    return x


class _Track:
    """One modality of a multistep run: its grid, the sample each step started from, and the last two x0.

    With lambda = ln((1 - t) / t), the exact step from t to s under a constant x0 is x0 + (s / t) (x - x0): the
    exponential integrator needs no exponential on this path, and t = 1 and s = 0 are ordinary numbers. Second order
    puts a weighted mean of several x0 in its place; the weights come from the steps h in lambda.
    """

    def __init__(self, times: list[float]) -> None:
        self.times = times
        self.log_snr = [math.inf if t == 0 else -math.inf if t == 1 else math.log((1 - t) / t) for t in times]
        self.start: Tensor | None = None
        self.x0: list[Tensor] = []

    def _moved(self, i: int) -> bool:
        """Whether step i exists and changes the level, so that the x0 at its start is history of use."""
        return i >= 0 and self.times[i] != self.times[i + 1]

    def predict(self, i: int, x: Tensor, x0: Tensor) -> Tensor:
        """From times[i] to times[i + 1]; first order at the start, at the last step, and into t = 0."""
        self.start, self.x0 = x, [*self.x0[-1:], x0]
        if not self._moved(i):
            return x
        mean = x0
        if self._moved(i - 1) and i + 2 < len(self.times) and self.times[i + 1] > 0:
            h, h_before = (self.log_snr[j + 1] - self.log_snr[j] for j in (i, i - 1))
            mean = x0 + (0.5 * h / h_before) * (x0 - self.x0[0])
        return _toward(x, mean, self.times[i], self.times[i + 1])

    def correct(self, i: int, x: Tensor, x0: Tensor) -> Tensor:
        """Redo step i - 1, which led to x, now that x0 at its end is known."""
        if not self._moved(i - 1) or self.times[i] == 0 or self.start is None:
            return x
        m = self.x0[-1]
        if self._moved(i - 2):
            weight_before, weight = _corrector_weights(*self.log_snr[i - 2 : i + 1])
            mean = m + weight_before * (self.x0[0] - m) + weight * (x0 - m)
        else:
            mean = m + 0.5 * (x0 - m)
        return _toward(self.start, mean, self.times[i - 1], self.times[i])


def _corrector_weights(before: float, start: float, end: float) -> tuple[float, float]:
    """Weights of x0 one step before and at the end, from three lambdas (arXiv:2302.04867, UniC-2 with B(h) = e^h - 1).

    They solve rho1 + rho2 = b1, r rho1 + rho2 = b2, and rho1 is divided by r.
    """
    h = end - start
    r = (before - start) / h
    growth = math.expm1(-h)
    phi = growth / -h - 1
    b1 = phi / growth
    b2 = 2 * (phi / -h - 0.5) / growth
    rho1 = (b2 - b1) / (r - 1)
    return rho1 / r, b1 - rho1


def _toward(x: Tensor, x0: Tensor, t: float, t_next: float) -> Tensor:
    """The straight line from x at t to x0 at 0, read at t_next."""
    return x0 if t_next == 0 else x0 + (t_next / t) * (x - x0)
