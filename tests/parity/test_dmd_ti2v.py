"""Backward simulation with a clean first frame against the recorded one, for every exit."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from soundstage.core import AV, Conditions, Rng, renoise, shift, spread
from soundstage.objectives.rollout import Given, Rollout, warped

STEM = "dmd_ti2v"


def latents(x: Tensor) -> Tensor:
    """Recorded (B, F, C, H, W) as (B, C, F, H, W), and back."""
    return x.transpose(1, 2)


class Stub(nn.Module):
    """The recorded linear student as a Denoiser; it is told timesteps truncated to integers."""

    def __init__(self, vector: Any) -> None:  # noqa: ANN401
        super().__init__()
        self.numbers = nn.Parameter(torch.tensor([float(vector.info["generator"][key]) for key in "abk"]))
        self.w, self.steps = latents(vector.tensors["in.w_generator"]), vector.tensors["sim.steps"].double()
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, x_t: AV[Tensor], t: AV[Tensor], cond: Conditions, *, r: AV[Tensor] | None = None) -> AV[Tensor]:
        assert r is None and cond.text is not None
        x, level = x_t["video"], t["video"]
        nearest = self.steps[(1000 * level[..., None] - self.steps).abs().argmin(-1)]
        token = torch.where(level > 0, nearest.trunc(), 0.0).to(x.dtype)
        self.seen.append((x, token))
        a, b, k = self.numbers
        return AV(video=a * x + b * spread(token / 1000, x) + k * cond.text["video"].mean() * self.w)


@dataclass(frozen=True)
class Recorded(Rng):
    """The recorded noises in place of drawn ones."""

    draws: Mapping[str, Tensor] = field(default_factory=dict)

    def normal_like(self, x: AV[Tensor]) -> AV[Tensor]:
        last = self.path[-1]
        name = f"renoise{last}" if isinstance(last, int) else "noise"
        return x.map(lambda _: latents(self.draws[f"sim.in.{name}"]))


@dataclass(frozen=True, eq=False)
class Case:
    """What every test of a file needs."""

    student: Stub
    given: Given
    rollout: Rollout
    rng: Recorded


@pytest.fixture
def case(vector: Any) -> Case:  # noqa: ANN401
    noise, image = latents(vector.tensors["sim.in.noise"]), latents(vector.tensors["in.image_latent"])
    x0 = torch.cat([image, torch.zeros_like(noise[:, :, 1:])], dim=2)
    mask = (torch.arange(noise.shape[2]) > 0).expand(len(noise), -1)
    given = Given(AV(video=x0), AV(video=mask), Conditions(text=AV(video=vector.tensors["in.cond"])))
    times = tuple((vector.tensors["sim.steps"].double() / 1000).tolist())
    return Case(Stub(vector), given, Rollout(AV(video=times)), Recorded((0,) * len(noise), draws=vector.tensors))


def test_every_exit(vector: Any, case: Case) -> None:  # noqa: ANN401
    for k in range(case.rollout.steps):
        case.student.seen.clear()
        case.student.zero_grad()
        sample = case.rollout(case.student, case.given, case.rng, torch.full((len(case.rng),), k))
        torch.testing.assert_close(latents(sample.x0["video"]), vector.tensors[f"sim.exit{k}.x0"], **vector.tolerance)
        assert torch.equal(sample.x0["video"][:, :, :1], case.given.x0["video"][:, :, :1])
        sample.x0["video"].square().mean().backward()
        gradient = case.student.numbers.grad
        assert gradient is not None
        torch.testing.assert_close(gradient, vector.tensors[f"sim.exit{k}.grad_abk"], **vector.tolerance)
        assert len(case.student.seen) == k + 1
        for i, (x, token) in enumerate(case.student.seen):
            torch.testing.assert_close(latents(x), vector.tensors[f"sim.input{i}"], **vector.tolerance)
            told = vector.tensors[f"sim.t_tokens{i}"]
            assert torch.equal(token.repeat_interleave(told.shape[1] // token.shape[1], dim=1).long(), told)


def test_the_last_exit_is_the_sampler(case: Case) -> None:
    known = case.given.around(case.student)
    noise = case.rng.fold("start").normal_like(case.given.x0)
    sampled = renoise(known, noise, case.rollout.grid, case.given.cond, rng=case.rng.fold("sampler"))
    last = torch.full((len(case.rng),), case.rollout.steps - 1)
    simulated = case.rollout(case.student, case.given, case.rng, last).x0
    assert torch.equal(known.keep(sampled)["video"], simulated["video"])


def test_the_list_is_warped(vector: Any, case: Case) -> None:  # noqa: ANN401
    """The recorded steps are the raw ones shifted by 5; equal raw steps give the default list of that length."""
    exits = [vector.tensors[f"sim.exit{k}.t_from_to"] for k in range(case.rollout.steps)]
    raw = torch.stack([exit_[0] for exit_ in exits]).double() / 1000
    torch.testing.assert_close(1000 * shift(raw, 5.0), vector.tensors["sim.steps"].double(), **vector.tolerance)
    assert [int(exit_[1]) for exit_ in exits] == [*(int(exit_[0]) for exit_ in exits[1:]), 0]
    if torch.equal(raw, torch.linspace(1, 0, len(raw) + 1, dtype=torch.float64)[:-1]):
        assert warped(len(raw))["video"] == pytest.approx(case.rollout.times["video"], rel=2e-4)
