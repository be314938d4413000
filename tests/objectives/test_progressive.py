"""Progressive distillation: one step of the student is several of its teacher's, and a gate stands between stages."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from soundstage.core import AV, Conditions, ConfigError, Rng, Sampler, euler, heun, shifted
from soundstage.core.denoiser import Denoiser
from soundstage.objectives.base import Batch
from soundstage.objectives.dmd import Guidance
from soundstage.objectives.flow_map import Grid, Scene, euler_step, heun_step, map_step
from soundstage.objectives.progressive import Gate, Progressive
from soundstage.testing.defects_flow import TRIALS, measure
from soundstage.testing.flow_maps import GaussianMap, jump
from soundstage.testing.tiny import GaussianLatents, ToyConfig

EXACT = GaussianMap()
SHAPE: AV[tuple[int, ...]] = AV((2, 3, 2, 2), (3, 5))
NOTHING = Conditions()
SIZE = 8


def batch() -> Batch:
    drawn = GaussianLatents(shape=SHAPE, mean=EXACT.mean, std=EXACT.std).batch(0, SIZE)
    return Batch(drawn.x0.to(torch.float64), NOTHING, drawn.ids)


def worst(a: AV[Tensor], b: AV[Tensor]) -> float:
    return max(float((x - y).detach().abs().max()) for x, y in zip(a.values(), b.values(), strict=True))


@pytest.mark.parametrize(
    ("step", "sampler"), [(euler_step, euler), (heun_step, heun), (map_step, jump)], ids=["euler", "heun", "map"]
)
@pytest.mark.parametrize("substeps", [2, 3])
def test_one_step_of_the_student_is_the_teachers_steps(step: Any, sampler: Sampler, substeps: int) -> None:  # noqa: ANN401
    """The teacher's sampler on its own grid, each modality with its shift."""
    apart = AV(5.0, 2.0)
    objective = Progressive(Grid(4, apart), substeps, step)
    fine = shifted(4 * substeps, apart)
    x = Rng.of(0, SIZE).normal_like(batch().x0)
    for k in range(4, 0, -1):
        levels = objective._levels(torch.full((SIZE,), k, dtype=torch.float64), x)
        first = (4 - k) * substeps
        walked = sampler(EXACT, x, fine.map(lambda g, a=first: g[a : a + substeps + 1]), NOTHING)
        v = objective.target(EXACT, x, levels, NOTHING)
        assert worst(euler_step(lambda *_a, v=v, **_k: v, x, levels[0], levels[-1], NOTHING), walked) < 1e-12
        x = walked


class Halved:
    """The ideal student: asked at t it answers with what its teacher's steps make of it."""

    def __init__(self, objective: Progressive, teacher: Denoiser) -> None:
        self.objective, self.teacher = objective, teacher

    def __call__(self, x_t: AV[Tensor], t: AV[Tensor], cond: Conditions, *, r: AV[Tensor] | None = None) -> AV[Tensor]:
        assert r is None
        k = (t["video"] * self.objective.grid.steps).round()
        return self.objective.target(self.teacher, x_t, self.objective._levels(k, x_t), cond)


def test_three_ideal_stages_are_the_long_walk() -> None:
    """32 -> 16 -> 8 -> 4 steps, each student the teacher of the next, make what 32 steps of the teacher make."""
    student: Denoiser = EXACT
    for steps in (16, 8, 4):
        objective = Progressive(Grid(steps))
        student, before = Halved(objective, student), student
        nets = {"student": student, "teacher": before}
        terms = objective.loss("student", nets, batch(), Rng.of(1, SIZE))
        assert float(terms["progressive/video"]) == 0 == float(terms["progressive/audio"])
    x, even = Rng.of(0, SIZE).normal_like(batch().x0), AV(1.0, 1.0)
    made = euler(student, x, shifted(4, even), NOTHING)
    assert worst(made, euler(EXACT, x, shifted(32, even), NOTHING)) < 1e-12
    assert worst(made, euler(EXACT, x, shifted(4, even), NOTHING)) > 1e-2


def test_the_student_is_asked_at_its_own_grid_and_regressed_to_the_target() -> None:
    objective, student = Progressive(Grid(5, AV(3.0, 1.0))), ToyConfig().build().double()
    seen: list[AV[Tensor]] = []

    def asked(x_t: AV[Tensor], t: AV[Tensor], cond: Conditions, *, r: AV[Tensor] | None = None) -> AV[Tensor]:
        seen.append(t)
        return student(x_t, t, cond, r=r)

    terms = objective.loss("student", {"student": asked, "teacher": EXACT}, batch(), Rng.of(1, SIZE))
    scene = Scene.of(batch(), objective.tasks, Rng.of(1, SIZE))
    for name, grid in shifted(5, AV(3.0, 1.0)).items():
        assert float((seen[0][name][:, None] - grid[:-1]).abs().amin(1).max()) < 1e-15
    k = (seen[0]["audio"] * 5).round()
    levels = objective._levels(k, scene.given.x0)
    x_t = scene.at(levels[0])
    error = student(x_t, levels[0], NOTHING) - objective.target(EXACT, x_t, levels, NOTHING)
    for name, e in error.items():
        expected = float(e.detach().square().flatten(1).mean(1).mean())
        assert float(terms[f"progressive/{name}"].detach()) == pytest.approx(expected, rel=1e-9)
        assert terms[f"progressive/{name}"].requires_grad
    assert objective.turn(0) == ("student",)


def test_guidance_belongs_to_the_teacher_alone() -> None:
    """A scale of 1 is the plain teacher; the student is called once, told no negative."""
    calls = 0

    def asked(x_t: AV[Tensor], t: AV[Tensor], cond: Conditions, *, r: AV[Tensor] | None = None) -> AV[Tensor]:
        nonlocal calls
        calls += 1
        return EXACT(x_t, t, cond, r=r)

    nets = {"student": asked, "teacher": EXACT}
    plain, one, four = (
        Progressive(guidance=g).loss("student", nets, batch(), Rng.of(1, SIZE))["progressive/video"]
        for g in (None, Guidance(AV(1.0, 1.0)), Guidance(AV(4.0, 4.0)))
    )
    assert calls == 3 and float(plain) == float(one)
    assert float(four) == pytest.approx(float(plain), rel=1e-9)


@pytest.mark.parametrize(("task", "given"), [("a2v", "audio"), ("v2a", "video"), ("i2av", None)])
def test_what_is_given_is_not_judged(task: str, given: str | None) -> None:
    student = ToyConfig().build().double()
    nets = {"student": student, "teacher": EXACT}
    terms = Progressive(tasks={task: 1.0}).loss("student", nets, batch(), Rng.of(1, SIZE))
    assert all(term.isfinite().all() for term in terms.values())
    if given is not None:
        assert float(terms[f"progressive/{given}"].detach()) == 0


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"Progressive.substeps: 0"):
        Progressive(substeps=0)
    with pytest.raises(ConfigError, match="at_least or at_most"):
        Gate("score")


@pytest.mark.parametrize(
    ("value", "extended", "verdict"),
    [
        (0.9, 0, "pass"),
        (0.8, 0, "pass"),
        (0.79, 0, "extend"),
        (0.79, 1, "extend"),
        (0.79, 2, "stop"),
        (0.9, 5, "pass"),
        (math.nan, 0, "extend"),
        (math.inf, 2, "stop"),
    ],
)
def test_a_gate_passes_extends_and_stops(value: float, extended: int, verdict: str) -> None:
    assert Gate("f1", at_least=0.8, extensions=2)({"f1": value}, extended) == verdict


def test_a_gate_may_be_a_ceiling_or_a_window() -> None:
    assert Gate("distance", at_most=0.1)({"distance": 0.05}) == "pass"
    assert Gate("distance", at_most=0.1, extensions=0)({"distance": 0.2}) == "stop"
    assert Gate("loudness", at_least=-1.0, at_most=1.0)({"loudness": -2.0}) == "extend"
    with pytest.raises(ConfigError, match=r"'f1' was not measured; there are a, b"):
        Gate("f1", at_least=0.8)({"b": 1.0, "a": 2.0})


@pytest.mark.trial
def test_trained_students_reach_their_gates() -> None:
    measured = measure(TRIALS["progressive"])
    assert measured.passes(TRIALS["progressive"].gates), measured
