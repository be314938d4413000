"""What the consistency family shares: a scene to learn from, laws of (t, r), derivatives and steps along the flow.

A flow map u(x_t, t, r) is the mean velocity of the flow from t to r < t: x_r = x_t - (t - r) u. With several
modalities the flow runs along a straight line of levels, from (t_video, t_audio) to (r_video, r_audio), so every
identity of one time holds with the derivative taken along that line. With r = 0 the line is a ray to clean data.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from soundstage.core.av import AV, spread
from soundstage.core.conditions import Conditions
from soundstage.core.denoiser import Denoiser, Losses
from soundstage.core.errors import ConfigError, one_of
from soundstage.core.flow import noised, velocity
from soundstage.core.rng import Rng
from soundstage.core.schedule import shift
from soundstage.core.times import Joint, LogitNormal, Uniform
from soundstage.objectives.base import Batch, Nets, mean_where, report
from soundstage.objectives.rollout import Given

Guide = Callable[[Denoiser, Conditions], Denoiser]
"""From a teacher and the conditions to the guided teacher, such as dmd.Guidance."""

Velocity = Callable[[AV[Tensor], AV[Tensor]], AV[Tensor]]
"""(x_t, t) -> velocity, conditions and known parts inside."""


@dataclass(frozen=True, eq=False)
class Scene:
    """A batch with its tasks drawn, and noise: points of the path at any levels, the given parts kept."""

    given: Given
    noise: AV[Tensor]

    @classmethod
    def of(cls, batch: Batch, tasks: Mapping[str, float], rng: Rng) -> Scene:
        """Draw tasks (objectives.tasks) and noise; raises ConfigError when no task fits the batch."""
        given = Given.of(batch, tasks, rng.fold("tasks"))
        return cls(given, rng.fold("noise").normal_like(given.x0))

    @property
    def cond(self) -> Conditions:
        """The conditions of the modalities present."""
        return self.given.cond

    @property
    def velocity(self) -> AV[Tensor]:
        """noise - x0 of this scene, whose mean given x_t is the flow's velocity."""
        return velocity(self.given.x0, self.noise)

    def pair(self, pairs: Pairs, rng: Rng) -> tuple[AV[Tensor], AV[Tensor]]:
        """(t, r) of a law, as `levels`."""
        t, r = pairs(rng.fold("times"), self.given.x0)
        return self.levels(t), self.levels(r)

    def levels(self, t: AV[Tensor]) -> AV[Tensor]:
        """(B,) levels in the precision of the latents, at least float32; 0 where a modality is given whole."""

        def one(x: Tensor, level: Tensor, made: Tensor) -> Tensor:
            return torch.where(made, level.to(x.device, torch.promote_types(x.dtype, torch.float32)), 0.0)

        return self.given.x0.map(one, t, self.given.generated())

    def at(self, t: AV[Tensor]) -> AV[Tensor]:
        """x_t of this scene's noise."""
        return noised(self.given.x0, self.noise, t)

    def around(self, denoiser: Denoiser) -> Denoiser:
        """The denoiser as it sees this scene: what is given enters clean at t = 0, and stays."""
        return self.given.around(denoiser)

    def teacher(self, nets: Nets, guidance: Guide | None) -> Denoiser:
        """The teacher as it sees this scene, guided; raises ConfigError when there is none."""
        teacher = play(nets, "teacher")
        return self.around(teacher if guidance is None else guidance(teacher, self.cond))

    def terms(self, name: str, values: AV[Tensor], t: AV[Tensor], bins: int) -> Losses:
        """`name/modality` from values (B,) per modality, and reports `name/modality/t0.00-0.25` by noise level."""
        terms: Losses = {}
        reports: Losses = {}
        edges = torch.linspace(0, 1, bins + 1).tolist()
        for modality, made in self.given.generated().items():
            value, level = values[modality], t[modality]
            terms[f"{name}/{modality}"] = mean_where(value, made)
            for low, high in pairwise(edges):
                inside = made & (level >= low) & ((level < high) if high < 1 else (level <= high))
                reports[f"{name}/{modality}/t{low:.2f}-{high:.2f}"] = report(value, inside)
        return terms | reports

    def report(self, name: str, values: AV[Tensor]) -> Losses:
        """The report `{name}` with the modality put in, of values (B,) where something is generated."""
        generated = self.given.generated()
        return {name.format(m): report(value, generated[m]) for m, value in values.items()}


def squared(error: AV[Tensor]) -> AV[Tensor]:
    """Elementwise squares, at least in float32."""
    return error.map(lambda e: e.to(torch.promote_types(e.dtype, torch.float32)).square())


def play(nets: Nets, role: str) -> Denoiser:
    """The network of a role; raises ConfigError when the run has none."""
    if role not in nets:
        raise ConfigError(f"roles: this objective needs {role!r}; the run has {', '.join(nets)}")
    return nets[role]


# Laws of pairs t >= r


class Pairs(Protocol):
    """Draws levels t and r <= t, per modality (B,), for latents x (B, C, ...)."""

    def __call__(self, rng: Rng, x: AV[Tensor]) -> tuple[AV[Tensor], AV[Tensor]]: ...


@dataclass(frozen=True)
class Grid:
    """Neighbours on an inference grid of `steps` equal steps, shifted per modality; modalities share the step."""

    steps: int
    shift: AV[float] = AV(1.0, 1.0)  # noqa: RUF009 (AV is frozen)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"Grid.steps: {self.steps} is too few, use at least 1")

    def __call__(self, rng: Rng, x: AV[Tensor]) -> tuple[AV[Tensor], AV[Tensor]]:
        k = rng.fold("step").integers(1, self.steps + 1).double()
        return self.level(k / self.steps, x), self.level((k - 1) / self.steps, x)

    def level(self, u: Tensor, x: AV[Tensor]) -> AV[Tensor]:
        """Levels of the places u in [0, 1] of the unshifted grid, in the type the samplers use."""

        def one(z: Tensor, by: float) -> Tensor:
            return shift(u, by).to(z.device, torch.promote_types(z.dtype, torch.float32))

        return x.map(one, self.shift.only(*x.modalities))


@dataclass(frozen=True)
class Narrowing:
    """r = t (1 - (1 + k sigmoid(-b t)) / 2^doublings), held above 0 (ECT, arXiv:2406.14548, section 3, with q = 2).

    Early stages have r = 0, which is denoising; each doubling halves the gap. All modalities keep one ratio r / t,
    that of the noisiest, so that r lies on the flow's ray.
    """

    times: Joint = field(default_factory=lambda: Joint(AV(Uniform(), Uniform())))
    doublings: int = 1
    k: float = 8.0
    b: float = 1.0

    def __call__(self, rng: Rng, x: AV[Tensor]) -> tuple[AV[Tensor], AV[Tensor]]:
        t = self.times(rng, x)
        top = torch.stack(list(t.values())).amax(0)
        ratio = (1 - (1 + self.k * torch.sigmoid(-self.b * top)) / 2**self.doublings).clamp_min(0)
        return t, t.map(lambda level: level * ratio)


@dataclass(frozen=True)
class Sorted:
    """Two draws of one law, the larger is t (arXiv:2505.13447, section 4.3). equal: share of samples with r = t."""

    times: Joint = field(default_factory=lambda: Joint(AV(LogitNormal(-0.4, 1.0), LogitNormal(-0.4, 1.0))))
    equal: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.equal <= 1:
            raise ConfigError(f"Sorted.equal: {self.equal} is not a share in [0, 1]")

    def __call__(self, rng: Rng, x: AV[Tensor]) -> tuple[AV[Tensor], AV[Tensor]]:
        one, two = self.times(rng, x), self.times(rng.fold("second"), x)
        alike = rng.fold("equal").uniform() < self.equal
        t = one.map(torch.maximum, two)
        return t, one.map(lambda a, b, top: torch.where(alike.to(a.device), top, torch.minimum(a, b)), two, t)


# Derivatives along the flow


@dataclass(frozen=True)
class Derivative:
    """Value and derivative of a function along a direction, without gradient and at least in float32.

    by: "jvp", forward-mode differentiation, exact; attention takes the plain kernel, the fused ones having no forward
        mode. "difference", two more calls that any kernel can serve, error of order h^2: h in [1e-3, 1e-2], since
        below that float32 rounds (and bfloat16 rounds at every h).
    """

    by: Literal["jvp", "difference"] = "jvp"
    h: float = 5e-3

    def __post_init__(self) -> None:
        if self.by not in ("jvp", "difference"):
            raise one_of("Derivative.by", self.by, ("jvp", "difference"))
        if not self.h > 0:
            raise ConfigError(f"Derivative.h: {self.h} must be above 0; 5e-3 suits float32")

    def __call__(
        self, fn: Velocity, x: AV[Tensor], t: AV[Tensor], dx: AV[Tensor], dt: AV[Tensor]
    ) -> tuple[AV[Tensor], AV[Tensor]]:
        """fn(x, t) and d/ds fn(x + s dx, t + s dt) at s = 0. Raises ConfigError where it cannot be had."""
        x, t, dx, dt = (value.map(_precise) for value in (x, t, dx, dt))
        with torch.no_grad(), torch.autocast(next(x.values()).device.type, enabled=False):
            return self._jvp(fn, x, t, dx, dt) if self.by == "jvp" else self._difference(fn, x, t, dx, dt)

    def _jvp(
        self, fn: Velocity, x: AV[Tensor], t: AV[Tensor], dx: AV[Tensor], dt: AV[Tensor]
    ) -> tuple[AV[Tensor], AV[Tensor]]:
        with _forward_mode():
            value, slope = torch.func.jvp(fn, (x, t), (dx, dt))  # type: ignore[misc]
        return value, slope

    def _difference(
        self, fn: Velocity, x: AV[Tensor], t: AV[Tensor], dx: AV[Tensor], dt: AV[Tensor]
    ) -> tuple[AV[Tensor], AV[Tensor]]:
        """Through s = a, 0, b: central a = h, b = -h; where t + h dt would pass 1, a = -h, b = -2h, of order 2 too."""
        value = fn(x, t)
        if any(v.dtype in (torch.bfloat16, torch.float16) for v in value.values()):
            raise ConfigError("Derivative.by: a difference needs a network that answers in float32; use by='jvp'")
        beyond = torch.stack([level + self.h * d > 1 for level, d in zip(t.values(), dt.values(), strict=True)]).any(0)
        like = next(t.values())
        a = torch.where(beyond, -self.h, self.h).to(like)
        b = torch.where(beyond, -2 * self.h, -self.h).to(like)
        at_a, at_b = (fn(x + s * dx, t + s * dt) for s in (_each(x, a), _each(x, b)))
        parts = (at_a - value) * _each(x, b / a) - (at_b - value) * _each(x, a / b)
        return value, parts * _each(x, 1 / (b - a))


def _precise(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _each(x: AV[Tensor], value: Tensor) -> AV[Tensor]:
    return x.map(lambda _: value)


@contextmanager
def _forward_mode() -> Iterator[None]:
    """The plain attention kernel; where another part of the network has no forward mode, the remedy is named."""
    try:
        with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
            # torch's own, at the first use of forward mode
            warnings.filterwarnings("ignore", "`torch.jit.script` is", DeprecationWarning)
            yield
    except RuntimeError as error:
        if not isinstance(error, NotImplementedError) and "jvp" not in str(error):
            raise
        raise ConfigError(
            f"Derivative.by: this network has a part without forward-mode differentiation ({error}); "
            "use by='difference'"
        ) from error


def along(
    derivative: Derivative, u: Velocity, x_t: AV[Tensor], t: AV[Tensor], r: AV[Tensor], v: AV[Tensor]
) -> tuple[AV[Tensor], AV[Tensor]]:
    """u(x_t, t) and (t - r) du/dt, the total derivative along the flow of velocity v (arXiv:2505.13447, eq. 8).

    With a time per modality: the derivative by s at s = 1 along the line of levels r + s (t - r).
    """
    span = t - r
    return derivative(u, x_t, t, span * v, span)


# Steps of a teacher


class Step(Protocol):
    """From x at levels t to levels r, (B,) per modality, along the flow of the velocity field."""

    def __call__(
        self, denoiser: Denoiser, x: AV[Tensor], t: AV[Tensor], r: AV[Tensor], cond: Conditions
    ) -> AV[Tensor]: ...


def euler_step(denoiser: Denoiser, x: AV[Tensor], t: AV[Tensor], r: AV[Tensor], cond: Conditions) -> AV[Tensor]:
    """First order, one call: what core.sampling.euler does, with levels of their own for every sample."""
    return x - (t - r) * denoiser(x, t, cond)


def heun_step(denoiser: Denoiser, x: AV[Tensor], t: AV[Tensor], r: AV[Tensor], cond: Conditions) -> AV[Tensor]:
    """Second order, two calls, as core.sampling.heun; first order where r = 0."""
    v = denoiser(x, t, cond)
    v_next = denoiser(x - (t - r) * v, r, cond)
    mean = v.map(lambda a, b, level: torch.where(spread(level, a) > 0, (a + b) / 2, a), v_next, r)
    return x - (t - r) * mean


def map_step(denoiser: Denoiser, x: AV[Tensor], t: AV[Tensor], r: AV[Tensor], cond: Conditions) -> AV[Tensor]:
    """One call of a teacher that is a flow map itself, such as a student of MeanFlow."""
    return x - (t - r) * denoiser(x, t, cond, r=r)
