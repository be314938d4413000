"""Consistency: the boundary, pairs with and without a teacher, and the continuous limit as the paper has it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from soundstage.core import AV, Conditions, ConfigError, Joint, LogitNormal, Rng, Uniform, noised
from soundstage.core.denoiser import Denoiser
from soundstage.core.flow import ToData
from soundstage.objectives.base import Batch
from soundstage.objectives.consistency import (
    Consistency,
    ContinuousConsistency,
    as_velocity,
    clean,
    ect,
    even,
    inverse_gap,
)
from soundstage.objectives.flow_map import Derivative, Grid, Scene, euler_step, heun_step
from soundstage.testing.defects_flow import TRIALS, measure
from soundstage.testing.flow_maps import GaussianMap
from soundstage.testing.tiny import GaussianLatents, ToyConfig
from soundstage.testing.toy import JointMLPConfig, QuickRng

EXACT = GaussianMap()
STUDENT = ToData(EXACT)
SHAPE: AV[tuple[int, ...]] = AV((2, 3, 2, 2), (3, 5))
NOTHING = Conditions()
UNIFORM = Joint(AV(Uniform(), Uniform()))
SIZE = 6


def batch(
    dtype: torch.dtype = torch.float64, size: int = SIZE, modalities: tuple[str, ...] = ("video", "audio")
) -> Batch:
    drawn = GaussianLatents(shape=SHAPE.only(*modalities), mean=EXACT.mean, std=EXACT.std).batch(0, size)
    return Batch(drawn.x0.to(dtype), NOTHING, drawn.ids)


def network(dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    """A student that reads both modalities at once, with every layer random."""
    torch.manual_seed(0)
    return JointMLPConfig(AV((2, 3, 2, 2), (3, 5)), width=24).build().to(dtype)


def worst(a: AV[Tensor], b: AV[Tensor]) -> float:
    return max(float((x - y).detach().abs().max()) for x, y in zip(a.values(), b.values(), strict=True))


class Asked:
    """Passes calls on and notes them."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser = denoiser
        self.calls: list[tuple[AV[Tensor], AV[Tensor], bool]] = []

    def __call__(self, x_t: AV[Tensor], t: AV[Tensor], cond: Conditions, *, r: AV[Tensor] | None = None) -> AV[Tensor]:
        self.calls.append((x_t, t, torch.is_grad_enabled()))
        return self.denoiser(x_t, t, cond, r=r)


def level(t: float, size: int = SIZE) -> AV[Tensor]:
    return SHAPE.map(lambda _: torch.full((size,), t, dtype=torch.float64))


def test_at_the_boundary_it_is_the_identity_for_any_network() -> None:
    x = batch().x0
    assert worst(clean(network(), x, level(0.0), NOTHING), x) == 0


def test_along_the_exact_flow_the_exact_function_does_not_change() -> None:
    """df/dt = 0: the tangent of the continuous loss vanishes, and every point leads to the same end."""
    x0 = batch().x0
    t = AV(torch.linspace(0.05, 1, SIZE, dtype=torch.float64), torch.linspace(1, 0.05, SIZE, dtype=torch.float64))
    x_t = noised(x0, Rng.of(1, SIZE).normal_like(x0), t)
    scm = ContinuousConsistency()
    g = scm.tangent(STUDENT, EXACT(x_t, t, NOTHING), x_t, t, NOTHING)
    assert worst(g, g.map(torch.zeros_like)) < 1e-12
    near = replace(scm, derivative=Derivative("difference")).tangent(STUDENT, EXACT(x_t, t, NOTHING), x_t, t, NOTHING)
    assert worst(near, g) < 1e-4
    half = t * 0.5
    x_half = x_t - (t - half) * EXACT(x_t, t, NOTHING, r=half)
    assert worst(clean(STUDENT, x_half, half, NOTHING), clean(STUDENT, x_t, t, NOTHING)) < 1e-12
    wrong = scm.tangent(EXACT, EXACT(x_t, t, NOTHING), x_t, t, NOTHING)
    assert worst(wrong, g) > 0.1


@pytest.mark.parametrize(("step", "order"), [(euler_step, 2), (heun_step, 3)])
def test_the_error_of_the_target_falls_with_the_order_of_the_teachers_step(step: Any, order: int) -> None:  # noqa: ANN401
    x_t, t = noised(batch().x0, Rng.of(1, SIZE).normal_like(batch().x0), level(0.6)), level(0.6)
    right = clean(STUDENT, x_t, t, NOTHING)
    errors = []
    for h in (0.05, 0.025, 0.0125, 0.00625):
        r = level(0.6 - h)
        errors.append(worst(clean(STUDENT, step(EXACT, x_t, t, r, NOTHING), r, NOTHING), right))
    slope = math.log2(errors[0] / errors[-1]) / 3
    assert slope == pytest.approx(order, abs=0.1)


def value(objective: Any, nets: dict[str, Any], data: Batch, name: str) -> float:  # noqa: ANN401
    terms = objective.loss("student", nets, data, Rng.of(3, len(data)))
    return float(terms[name].detach())


def test_the_loss_of_the_exact_student_is_that_of_the_solver() -> None:
    nets = {"student": STUDENT, "teacher": EXACT}
    losses = [value(Consistency(Grid(n)), nets, batch(), "cd/video") for n in (16, 32, 64)]
    assert losses[0] < 1e-5
    assert losses[0] / losses[1] > 20 and losses[1] / losses[2] > 20
    zero = {"student": network(), "teacher": EXACT}
    assert value(Consistency(Grid(16)), zero, batch(), "cd/video") > 1e-3


def pair(objective: Consistency, scene: Scene) -> tuple[AV[Tensor], AV[Tensor]]:
    return scene.pair(objective.pairs, Rng.of(3, SIZE))


@pytest.mark.parametrize(
    "objective", [Consistency(), Consistency(step=euler_step), ect(UNIFORM, 4)], ids=["cd", "euler", "ect"]
)
def test_the_target_is_asked_at_r_where_the_teacher_leads(objective: Consistency) -> None:
    """With a teacher x_r is its step from x_t, not data noised to r; without one it is x0 with the same noise."""
    asked, data = Asked(network()), batch()
    terms = objective.loss("student", {"student": asked, "teacher": EXACT}, data, Rng.of(3, SIZE))
    scene = Scene.of(data, objective.tasks, Rng.of(3, SIZE))
    t, r = pair(objective, scene)
    x_t = scene.at(t)
    x_r = objective.step(EXACT, x_t, t, r, NOTHING) if objective.teacher else scene.at(r)
    (target_x, target_t, with_grad), (student_x, student_t, _) = asked.calls
    assert not with_grad
    assert worst(target_x, x_r) == 0 and worst(target_t, r) == 0
    assert worst(student_x, x_t) == 0 and worst(student_t, t) == 0
    assert worst(x_r, scene.at(r)) == 0 or objective.teacher
    error = clean(network(), x_t, t, NOTHING) - clean(network(), x_r, r, NOTHING)
    for name, e in error.items():
        expected = (objective.weight(t[name], r[name]) * e.square().flatten(1).mean(1)).mean()
        term = terms[f"{'cd' if objective.teacher else 'ct'}/{name}"]
        assert float(term.detach()) == pytest.approx(float(expected.detach()), rel=1e-9)


def test_the_target_gives_no_gradient() -> None:
    student, data = network(), batch()
    objective = Consistency()
    terms = objective.loss("student", {"student": student, "teacher": EXACT}, data, Rng.of(3, SIZE))
    mine = torch.autograd.grad(terms["cd/video"], list(student.parameters()), allow_unused=True)
    scene = Scene.of(data, objective.tasks, Rng.of(3, SIZE))
    t, r = pair(objective, scene)
    x_t = scene.at(t)
    with torch.no_grad():
        aim = clean(network(), heun_step(EXACT, x_t, t, r, NOTHING), r, NOTHING)["video"]
    error = (clean(student, x_t, t, NOTHING)["video"] - aim).square().flatten(1).mean(1)
    expected = torch.autograd.grad(
        (error * as_velocity(t["video"], r["video"])).mean(), list(student.parameters()), allow_unused=True
    )
    for a, b in zip(mine, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_the_average_can_play_the_target() -> None:
    student, average = Asked(network()), Asked(network())
    nets = {"student": student, "ema": average, "teacher": EXACT}
    Consistency(target="ema").loss("student", nets, batch(), Rng.of(3, SIZE))
    assert len(student.calls) == len(average.calls) == 1
    with pytest.raises(ConfigError, match="needs 'ema'"):
        Consistency(target="ema").loss("student", {"student": student, "teacher": EXACT}, batch(), Rng.of(3, SIZE))


def test_weights_and_distances() -> None:
    t, r = torch.tensor([1.0, 0.5]), torch.tensor([0.75, 0.5])
    assert even(t, r).tolist() == [1, 1]
    assert as_velocity(t, r).tolist() == pytest.approx([1 / 1.05, 1 / 0.3])
    assert inverse_gap(t, r).tolist() == pytest.approx([4, 1e4])
    nets, data = {"student": network(), "teacher": EXACT}, batch()
    plain = value(Consistency(weight=even), nets, data, "cd/video")
    tight = value(Consistency(weight=even, huber=1e3), nets, data, "cd/video")
    assert tight == pytest.approx(plain / 2e3, rel=1e-3)


# The continuous loss against the paper


def trigflow(
    student: Denoiser, velocity: AV[Tensor], x_t: AV[Tensor], t: AV[Tensor], ramp: float, c: float = 0.1
) -> tuple[Callable[[], AV[Tensor]], AV[Tensor]]:
    """sCM in TrigFlow as arXiv:2410.11081 writes it (algorithm 1, sigma_d = 1), with a wrapped network.

    Returns the network's output (with gradient) and the normalised tangent; the paper's norm over the root of the size.
    """
    angle = t.map(lambda s: torch.atan2(s, 1 - s))

    def one(a: Tensor, z: Tensor) -> Tensor:
        return a.reshape(-1, *(1,) * (z.ndim - 1))

    # on the unit circle: cos(a) x0 + sin(a) noise, with t = sin / (cos + sin)
    x = x_t.map(lambda z, a: z * (one(a, z).cos() + one(a, z).sin()), angle)

    def network_of(y: AV[Tensor], a: AV[Tensor]) -> AV[Tensor]:
        """F' for which cos(a) y - sin(a) F' is the student's clean prediction."""
        total = a.map(lambda s: s.cos() + s.sin())
        level = a.map(lambda s, n: s.sin() / n, total)
        x_line = y.map(lambda z, n: z / one(n, z), total)
        x0 = x_line - level * student(x_line, level, NOTHING)
        return y.map(lambda z, s, d: (one(s, z).cos() * z - d) / one(s, z).sin(), a, x0)

    # the same of the teacher is dx/da of the probability flow
    dx = x.map(lambda z, s, d: (one(s, z).cos() * z - d) / one(s, z).sin(), angle, x_t - t * velocity)
    with torch.no_grad():
        made, dmade = torch.func.jvp(network_of, (x, angle), (dx, angle.map(torch.ones_like)))  # type: ignore[misc]

    def tangent(z: Tensor, f: Tensor, df: Tensor, d: Tensor, a: Tensor) -> Tensor:
        cos, sin = one(a, z).cos(), one(a, z).sin()
        g = -cos.square() * (f - d) - ramp * cos * sin * (z + df)
        norm = g.flatten(1).norm(dim=1) / g[0].numel() ** 0.5
        return g / (one(norm, g) + c)

    return lambda: network_of(x, angle), x.map(tangent, made, dmade, dx, angle)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is:DeprecationWarning")
@pytest.mark.parametrize("ramp", [0.0, 0.4, 1.0])
def test_the_continuous_loss_is_the_papers(ramp: float) -> None:
    student, data = network(), batch()
    law = Joint(AV(LogitNormal(0.2, 1.2), LogitNormal(0.2, 1.2)), shared=True)
    objective = ContinuousConsistency(law, ramp=ramp)
    terms = objective.loss("student", {"student": student, "teacher": EXACT}, data, Rng.of(3, SIZE))
    scene = Scene.of(data, objective.tasks, Rng.of(3, SIZE))
    t = scene.levels(law(Rng.of(3, SIZE).fold("times"), scene.given.x0))
    x_t = scene.at(t)
    out, g = trigflow(student, EXACT(x_t, t, NOTHING), x_t, t, ramp)
    made = out()
    for name in ("video", "audio"):
        loss = (made[name] - made[name].detach() - g[name]).square().mean()
        assert float(terms[f"scm/{name}"].detach()) == pytest.approx(float(loss.detach()), rel=1e-8)
        mine, expected = (
            torch.autograd.grad(term, list(student.parameters()), retain_graph=True, allow_unused=True)
            for term in (terms[f"scm/{name}"], loss)
        )
        for a, b in zip(mine, expected, strict=True):
            if b is not None:
                torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)


def test_the_papers_law_of_times() -> None:
    """tan(tau) = t / (1 - t) is log-normal."""
    t = Joint(AV(LogitNormal(0.2, 1.2)))(QuickRng.of(0, 20000), AV(torch.zeros(20000, 1, 1, 1, 1)))["video"].double()
    log_tan = (t / (1 - t)).log()
    assert float(log_tan.mean()) == pytest.approx(0.2, abs=0.03)
    assert float(log_tan.std()) == pytest.approx(1.2, abs=0.03)


def test_without_a_teacher_the_velocity_is_that_of_the_data() -> None:
    student, data = network(), batch()
    objective = ContinuousConsistency(UNIFORM, teacher=False)
    scene = Scene.of(data, objective.tasks, Rng.of(3, SIZE))
    v = scene.velocity

    class Told:
        def __call__(
            self, x_t: AV[Tensor], t: AV[Tensor], cond: Conditions, *, r: AV[Tensor] | None = None
        ) -> AV[Tensor]:
            assert x_t.modalities == t.modalities and cond.batch is None and r is None
            return v

    mine, told = (
        value(one, {"student": student, "teacher": Told()}, data, "scm/audio")
        for one in (objective, replace(objective, teacher=True))
    )
    assert mine == told


OBJECTIVES = [Consistency(), ect(UNIFORM, 3), ContinuousConsistency(UNIFORM)]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=["cd", "ect", "scm"])
@pytest.mark.parametrize(("task", "given"), [("a2v", "audio"), ("v2a", "video")])
def test_a_given_modality_is_clean_and_not_judged(objective: Any, task: str, given: str) -> None:  # noqa: ANN401
    asked, data = Asked(network()), batch()
    nets = {"student": asked, "teacher": EXACT}
    terms = replace(objective, tasks={task: 1.0}).loss("student", nets, data, Rng.of(3, SIZE))
    name = next(key for key in terms if key.endswith(f"/{given}"))
    assert float(terms[name].detach()) == 0
    made = next(key for key in terms if key.count("/") == 1 and not key.endswith(f"/{given}"))
    assert float(terms[made].detach()) > 0
    seen = [call for call in asked.calls if call[2]]
    assert all(torch.equal(x[given], data.x0[given]) and not t[given].any() for x, t, _ in seen)
    terms[name].backward()
    assert not any(p.grad.any() for p in asked.denoiser.parameters() if p.grad is not None)  # type: ignore[attr-defined]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=["cd", "ect", "scm"])
def test_a_given_frame_enters_clean_and_is_not_judged(objective: Any) -> None:  # noqa: ANN401
    asked, data = Asked(network()), batch()
    nets = {"student": asked, "teacher": EXACT}
    objective = replace(objective, tasks={"i2av": 1.0})
    terms = objective.loss("student", nets, data, Rng.of(3, SIZE))
    plain = [call for call in asked.calls if call[2] or not isinstance(objective, ContinuousConsistency)]
    assert plain
    for x, t, _ in plain:
        assert torch.equal(x["video"][:, :, 0], data.x0["video"][:, :, 0])
        assert not t["video"][:, 0].any()
    assert all(term.isfinite().all() for term in terms.values())


@pytest.mark.parametrize("objective", OBJECTIVES, ids=["cd", "ect", "scm"])
@pytest.mark.parametrize("modality", ["video", "audio"])
def test_one_modality_alone_and_the_same_terms_again(objective: Any, modality: str) -> None:  # noqa: ANN401
    data, student = batch(torch.float32, modalities=(modality,)), ToyConfig(AV(2, 3).only(modality)).build()
    nets = {"student": student, "teacher": EXACT}
    one, two = (objective.loss("student", nets, data, Rng.of(3, SIZE)) for _ in range(2))
    assert {key.split("/")[1] for key in one} == {modality}
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    assert objective.turn(0) == ("student",)
    terms = [term for term in one.values() if term.ndim == 0]
    assert len(terms) == 1 and terms[0].requires_grad


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Consistency(target="average"), "not one of ema, student"),  # type: ignore[arg-type]
        (lambda: Consistency(teacher=False, guidance=lambda d, _: d), r"Consistency.guidance.*teacher=True"),
        (lambda: ContinuousConsistency(teacher=False, guidance=lambda d, _: d), r"Continuous.*guidance"),
        (lambda: ContinuousConsistency(floor=0.0), r"floor: 0.0 must be above 0"),
    ],
)
def test_impossible_settings_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.trial
@pytest.mark.parametrize("name", ["cd", "ect", "scm"])
def test_a_trained_student_reaches_its_gates(name: str) -> None:
    measured = measure(TRIALS[name])
    assert measured.passes(TRIALS[name].gates), measured
