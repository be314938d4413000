"""Regression to the teacher's ODE: pairs on its trajectories, and the error of a student at their ends."""

from typing import Any

import pytest
import torch
from torch import Tensor

from soundstage.core import AV, Conditions, ConfigError, Rng, heun
from soundstage.objectives.base import Batch
from soundstage.objectives.dmd import Guidance
from soundstage.objectives.regression import Pair, Regression, Solved
from soundstage.objectives.rollout import Given, Rollout, warped
from soundstage.testing.analytic import Gaussian
from soundstage.testing.tiny import GaussianLatents, ToyConfig

SHAPE = AV((2, 4, 2, 2), (3, 6))
BOTH = ("video", "audio")


def gaussian() -> Gaussian:
    size = 2 * 4 * 2 * 2 + 3 * 6
    root = torch.randn(size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64) / size**0.5
    mean = SHAPE.map(lambda shape: torch.full(shape, 0.3, dtype=torch.float64))
    return Gaussian(mean, root @ root.T + 0.1 * torch.eye(size, dtype=torch.float64))


def test_solved_pairs_lie_on_the_exact_flow() -> None:
    exact = gaussian()
    x0 = exact.sample(Rng.of(0, 6))
    here = Given(x0, x0.map(lambda x: torch.ones(6, x.shape[2])), Conditions())
    pair = Solved(substeps=64)({"teacher": exact}, Batch(x0, Conditions(), ("",) * 6), here, Rng.of(0, 6))
    end = exact.flow(pair.x_t, pair.t, pair.t.map(torch.zeros_like))
    for name in BOTH:
        torch.testing.assert_close(pair.x0[name], end[name], rtol=0, atol=2e-3)
        levels = torch.tensor(warped()[name], dtype=torch.float64)
        assert ((pair.t[name][:, None] - levels).abs().amin(1) < 1e-12).all()


def test_the_flow_map_has_no_regression_loss() -> None:
    """The exact student: x_t - t v leads to the end of the trajectory; the loss is that of the solver's error."""
    exact = gaussian()

    class FlowMap:
        def __call__(
            self, x_t: AV[Tensor], t: AV[Tensor], cond: Conditions, *, r: AV[Tensor] | None = None
        ) -> AV[Tensor]:
            assert cond.batch is None and r is None
            return (x_t - exact.flow(x_t, t, t.map(torch.zeros_like))) / t

    batch = Batch(exact.sample(Rng.of(0, 6)), Conditions(), ("",) * 6)
    losses = [
        Regression(Solved(substeps=n)).loss("student", {"teacher": exact, "student": FlowMap()}, batch, Rng.of(0, 6))
        for n in (8, 16, 32)
    ]
    for name in BOTH:
        errors = [float(terms[f"regression/{name}"]) for terms in losses]
        assert errors[0] < 1e-3
        assert errors[0] / errors[1] > 8 and errors[1] / errors[2] > 8


def toy(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return ToyConfig().build()


def data(size: int = 6) -> Batch:
    return GaussianLatents(shape=SHAPE).batch(0, size)


def all_of(x0: AV[Tensor]) -> Given:
    return Given(x0, x0.map(lambda x: torch.ones(len(x), x.shape[2])), Conditions())


def test_a_pair_is_the_solvers_own() -> None:
    """From the noise at the first level, `substeps` steps between neighbouring levels, of the guided teacher."""
    teacher, here, rng = toy(), data(), Rng.of(0, 6)
    solved = Solved(AV((1.0, 0.4), (1.0, 0.6)), substeps=2, guidance=Guidance(AV(2.0, 3.0)))
    pair = solved({"teacher": teacher}, here, all_of(here.x0), rng)
    times = AV(torch.tensor([1.0, 0.7, 0.4, 0.2, 0.0]), torch.tensor([1.0, 0.8, 0.6, 0.3, 0.0]))
    states = [rng.fold("start").normal_like(here.x0)]
    with torch.no_grad():
        end = heun(teacher, states[0], times.to(torch.float64), here.cond, on_step=lambda _i, x, _x0: states.append(x))
    level = rng.fold("level").integers(0, 2)
    assert 0 < int(level.sum()) < 6
    for name in BOTH:
        torch.testing.assert_close(pair.x0[name], end[name], rtol=1e-5, atol=1e-6)
        expected = torch.where(level.reshape(-1, *(1,) * (end[name].ndim - 1)) == 0, states[0][name], states[2][name])
        torch.testing.assert_close(pair.x_t[name], expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(pair.t[name], times[name][2 * level])


def test_the_starts_are_the_rollouts() -> None:
    """The same noise as backward simulation draws, so that both train the student on the same trajectories."""
    teacher, here, rng = toy(), data(), Rng.of(0, 6)
    pair = Solved(AV((1.0,), (1.0,)), substeps=1)({"teacher": teacher}, here, all_of(here.x0), rng)
    sample = Rollout(AV((1.0,), (1.0,)))(teacher, all_of(here.x0), rng)
    assert all(torch.equal(pair.x_t[name], sample.x_t[name]) for name in BOTH)


@pytest.mark.parametrize(("task", "given"), [("i2av", "video"), ("a2v", "audio")])
def test_what_is_given_stays_and_does_not_count(task: str, given: str) -> None:
    teacher, student, here = toy(1), toy(), data()
    pairs: list[Pair] = []

    class Noted(Solved):
        def __call__(self, *args: Any) -> Pair:  # noqa: ANN401
            pairs.append(super().__call__(*args))
            return pairs[-1]

    objective = Regression(Noted(substeps=1), {task: 1.0})
    assert objective.turn(3) == ("student",)
    terms = objective.loss("student", {"teacher": teacher, "student": student}, here, Rng.of(0, 6))
    assert torch.equal(pairs[0].x0[given][:, :, 0], here.x0[given][:, :, 0])
    if task == "a2v":
        assert torch.equal(pairs[0].x0["audio"], here.x0["audio"])
        assert float(terms["regression/audio"].detach()) == 0
    assert float(terms["regression/video"].detach()) > 0


def test_the_teacher_gets_no_gradient() -> None:
    nets = {"teacher": toy(1), "student": toy()}
    terms = Regression(Solved(substeps=1)).loss("student", nets, data(), Rng.of(0, 6))
    torch.stack(list(terms.values())).sum().backward()
    assert all(p.grad is None for p in nets["teacher"].parameters())
    assert all(p.grad is not None for p in nets["student"].parameters())


def test_pairs_may_be_read_instead_of_solved() -> None:
    """Any callable with pairs: here the student's own answers, so that nothing is lost."""
    student, here = toy(), data()
    x_t, t = here.x0, here.x0.map(lambda x: torch.full((len(x),), 0.5))
    with torch.no_grad():
        x0 = x_t - t * student(x_t, t, here.cond)
    read = Regression(lambda nets, batch, given, rng: Pair(x_t, t, x0))  # noqa: ARG005
    terms = read.loss("student", {"student": student}, here, Rng.of(0, 6))
    assert all(float(term.detach()) == 0 for term in terms.values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampler": "huen"}, r"Solved.sampler: 'huen'.*did you mean 'heun'"),
        ({"sampler": "renoise"}, r"Solved.sampler: 'renoise'"),
        ({"substeps": 0}, r"Solved.substeps: 0 is too few"),
    ],
)
def test_impossible_solvers_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Solved(**settings)
