"""For tests of flow maps: exact ones, a sampler that gives the network both times, and objectives that change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from soundstage.core.av import AV, spread
from soundstage.core.conditions import Conditions
from soundstage.core.denoiser import Denoiser
from soundstage.core.rng import Rng
from soundstage.core.sampling import OnStep
from soundstage.core.schedule import check


@dataclass(frozen=True)
class GaussianMap:
    """Exact mean velocity of data N(mean, std^2), every element independent; smooth in x, t and r, also at r = t.

    An element follows x_s = m_s + (sigma_s / sigma_t) (x_t - m_t) with m_s = (1 - s) mean and
    sigma_s^2 = (1 - s)^2 std^2 + s^2. In u = (x_t - x_r) / (t - r) the factor t - r cancels:
    u = -mean + ((t + r) - std^2 (2 - t - r)) / (sigma_t (sigma_t + sigma_r)) (x_t - m_t). Elements being independent,
    it holds for any t and r per modality, (B,) or (B, F). r None = the velocity.
    """

    mean: float = 0.7
    std: float = 0.5

    def __call__(
        self,
        x_t: AV[Tensor],
        t: AV[Tensor],
        cond: Conditions,  # noqa: ARG002
        *,
        r: AV[Tensor] | None = None,
    ) -> AV[Tensor]:
        """u(x_t, t, r)."""
        return x_t.map(self._one, t, t if r is None else r)

    def _one(self, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        t, r = spread(t, x), spread(r, x)
        sigma_t, sigma_r = self._sigma(t), self._sigma(r)
        slope = ((t + r) - self.std**2 * (2 - t - r)) / (sigma_t * (sigma_t + sigma_r))
        return slope * (x - (1 - t) * self.mean) - self.mean

    def _sigma(self, t: Tensor) -> Tensor:
        return ((1 - t).square() * self.std**2 + t.square()).sqrt()


def jump(
    denoiser: Denoiser,
    x: AV[Tensor],
    times: AV[Tensor],
    cond: Conditions,
    *,
    rng: Rng | None = None,  # noqa: ARG001
    on_step: OnStep | None = None,
) -> AV[Tensor]:
    """Sampler of flow maps: x_r = x_t - (t - r) u(x_t, t, r), one call per step."""
    for i in range(check(times)):
        t, r = (x.map(lambda z, grid, j=i + k: z.new_full((len(z),), float(grid[j])), times) for k in (0, 1))
        u = denoiser(x, t, cond, r=r)
        x0 = x - t * u
        x = x - (t - r) * u
        if on_step is not None:
            on_step(i, x, x0)
    return x


class Staged:
    """An objective whose settings change at given steps, as stages of a run change them.

    stages: first step to changed fields, {0: {"ramp": 0.0}, 500: {"ramp": 1.0}}. Changes replace those before.
    """

    def __init__(self, objective: Any, stages: Mapping[int, Mapping[str, Any]]) -> None:  # noqa: ANN401
        self.starts = sorted(stages)
        self.objectives = {start: replace(objective, **stages[start]) for start in self.starts}
        self.now = objective

    def turn(self, step: int) -> tuple[str, ...]:
        """The roles that move; from here on `loss` is that of this step's stage."""
        self.now = self.objectives[max(start for start in self.starts if start <= step)]
        return self.now.turn(step)

    def loss(self, role: str, nets: Any, batch: Any, rng: Rng) -> dict[str, Tensor]:  # noqa: ANN401
        """Terms of the stage of the last `turn`."""
        return self.now.loss(role, nets, batch, rng)
