"""MeanFlow: the exact flow map is its fixed point, r = t is flow matching, guidance is built in as the paper has it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from soundstage.core import AV, Conditions, ConfigError, Joint, LogitNormal, Rng, Uniform, noised, spread
from soundstage.objectives.base import Batch
from soundstage.objectives.dmd import Guidance
from soundstage.objectives.flow_map import Derivative, Scene, Sorted
from soundstage.objectives.flow_matching import FlowMatching
from soundstage.objectives.mean_flow import MeanFlow
from soundstage.testing.defects_flow import TRIALS, measure
from soundstage.testing.flow_maps import GaussianMap
from soundstage.testing.tiny import GaussianLatents
from soundstage.testing.toy import JointMLPConfig

EXACT = GaussianMap()
SHAPE: AV[tuple[int, ...]] = AV((2, 3, 2, 2), (3, 5))
NOTHING = Conditions()
UNIFORM = Joint(AV(Uniform(), Uniform()))
SIZE = 6


def batch(cond: Conditions = NOTHING, dtype: torch.dtype = torch.float64) -> Batch:
    drawn = GaussianLatents(shape=SHAPE, mean=EXACT.mean, std=EXACT.std).batch(0, SIZE)
    return Batch(drawn.x0.to(dtype), cond, drawn.ids)


def network(dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    """A flow map that reads both modalities at once; what reads t - r is random too."""
    torch.manual_seed(0)
    built = JointMLPConfig(SHAPE, width=24).build()
    torch.nn.init.normal_(built.span.weight, std=0.2)
    return built.to(dtype)


def worst(a: AV[Tensor], b: AV[Tensor]) -> float:
    return max(float((x - y).detach().abs().max()) for x, y in zip(a.values(), b.values(), strict=True))


@pytest.mark.parametrize(
    ("derivative", "bound"), [(Derivative(), 1e-10), (Derivative("difference"), 1e-4)], ids=["jvp", "difference"]
)
def test_the_exact_flow_map_is_the_target_of_itself(derivative: Derivative, bound: float) -> None:
    """With a time of its own for every modality and sample."""
    x0, rng = batch().x0, Rng.of(1, SIZE)
    objective = MeanFlow(derivative=derivative)
    t, r = Sorted(UNIFORM, equal=0.2)(rng, x0)
    t, r = t.to(torch.float64), r.to(torch.float64)
    x_t = noised(x0, rng.normal_like(x0), t)
    target = objective.target(EXACT, EXACT(x_t, t, NOTHING), x_t, t, r, NOTHING)
    assert worst(target, EXACT(x_t, t, NOTHING, r=r)) < bound
    for wrong in (replace(objective, ramp=0.0), replace(objective, ramp=-1.0)):
        assert worst(wrong.target(EXACT, EXACT(x_t, t, NOTHING), x_t, t, r, NOTHING), target) > 0.1


def test_the_exact_student_has_no_loss() -> None:
    nets = {"student": EXACT, "teacher": EXACT}
    for name in ("video", "audio"):
        total, count = MeanFlow().loss("student", nets, batch(), Rng.of(2, SIZE))[f"mean_flow/{name}/error"]
        assert float(total / count) < 1e-20
    total, _ = MeanFlow().loss("student", {"student": network(), "teacher": EXACT}, batch(), Rng.of(2, SIZE))[
        "mean_flow/video/error"
    ]
    assert float(total) > 1


@dataclass(frozen=True)
class Equal:
    """Pairs with r = t."""

    times: Joint

    def __call__(self, rng: Rng, x: AV[Tensor]) -> tuple[AV[Tensor], AV[Tensor]]:
        t = self.times(rng, x)
        return t, t


def test_with_r_at_t_it_is_flow_matching() -> None:
    student, law = network(), Joint(AV(LogitNormal(), LogitNormal()))
    mine = MeanFlow(Equal(law), power=0.0, teacher=False).loss(
        "student", {"student": student}, batch(), Rng.of(2, SIZE)
    )
    expected = FlowMatching(law, drop_text=0.0, given_noise=0.0).loss(
        "student", {"student": student}, batch(), Rng.of(2, SIZE)
    )
    for name in ("video", "audio"):
        a, b = mine[f"mean_flow/{name}"], expected[f"flow/{name}"]
        assert float(a.detach()) == pytest.approx(float(b.detach()), rel=1e-6)
        gradients = (
            torch.autograd.grad(term, list(student.parameters()), retain_graph=True, allow_unused=True)
            for term in (a, b)
        )
        for one, two in zip(*gradients, strict=True):
            assert (one is None or not one.any()) if two is None else torch.allclose(one, two, rtol=1e-5, atol=1e-6)


def test_the_weight_of_a_sample_is_adaptive_and_has_no_gradient() -> None:
    """e / stop(e + c)^p per sample and modality; the target has no gradient either."""
    student, objective = network(), MeanFlow(power=0.5, floor=0.1)
    nets = {"student": student, "teacher": EXACT}
    terms = objective.loss("student", nets, batch(), Rng.of(2, SIZE))
    scene = Scene.of(batch(), objective.tasks, Rng.of(2, SIZE))
    t, r = scene.pair(objective.pairs, Rng.of(2, SIZE))
    x_t = scene.at(t)
    target = objective.target(student, EXACT(x_t, t, NOTHING), x_t, t, r, NOTHING)
    assert not any(z.requires_grad for z in target.values())
    error = (student(x_t, t, NOTHING, r=r) - target)["audio"].square().flatten(1).mean(1)
    expected = (error / (error.detach() + 0.1).sqrt()).mean()
    assert float(terms["mean_flow/audio"].detach()) == pytest.approx(float(expected.detach()), rel=1e-9)
    mine, theirs = (
        torch.autograd.grad(term, list(student.parameters()), retain_graph=True)
        for term in (terms["mean_flow/audio"], expected)
    )
    assert all(torch.allclose(a, b, rtol=1e-8, atol=1e-12) for a, b in zip(mine, theirs, strict=True))


def told(size: int = SIZE) -> Conditions:
    """A number per sample as text."""
    text = torch.arange(1.0, size + 1, dtype=torch.float64)[:, None, None]
    return Conditions(text=AV(text, text), text_mask=AV(*(torch.ones(size, 1, dtype=torch.bool) for _ in range(2))))


@dataclass(frozen=True)
class Listening:
    """u = (what it is told, 0 where nothing) + x_t, and 10 (t - r) more."""

    def __call__(self, x_t: AV[Tensor], t: AV[Tensor], cond: Conditions, *, r: AV[Tensor] | None = None) -> AV[Tensor]:
        heard = torch.zeros(x_t.batch, dtype=torch.float64)
        if cond.text is not None and cond.text_mask is not None:
            heard = cond.text["video"][:, 0, 0] * cond.text_mask["video"][:, 0]
        lapse = t.map(torch.zeros_like) if r is None else t - r
        return x_t.map(lambda x, gap: x + spread(heard + 10 * gap, x), lapse)


def velocity_of(objective: MeanFlow, dropped: Tensor | None = None) -> tuple[Scene, AV[Tensor], AV[Tensor]]:
    """(scene, x_t, v~) of one draw."""
    scene = Scene.of(batch(told()), objective.tasks, Rng.of(2, SIZE))
    t, _ = scene.pair(objective.pairs, Rng.of(2, SIZE))
    cond = scene.cond if dropped is None else scene.cond.drop("text", dropped)
    x_t = scene.at(t)
    return scene, x_t, objective._velocity({"teacher": Listening()}, Listening(), scene, x_t, t, cond, dropped)


@pytest.mark.parametrize(("scale", "mix"), [(3.0, 0.5), (2.0, 0.0), (1.0, 0.0), (4.0, 0.9)])
def test_guidance_is_built_in_as_in_the_paper(scale: float, mix: float) -> None:
    """v~ = w v + k u(cond) + (1 - w - k) u(negative) with w = scale (1 - k), u the student's velocity at r = t."""
    objective = MeanFlow(teacher=False, guidance=Guidance(AV(scale, scale)), mix=mix)
    scene, x_t, v = velocity_of(objective)
    w = scale * (1 - mix)
    heard = torch.arange(1.0, SIZE + 1, dtype=torch.float64)
    for name, value in v.items():
        x = x_t[name]
        expected = w * scene.velocity[name] + mix * (x + spread(heard, x)) + (1 - w - mix) * x
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)


def test_samples_without_text_learn_the_plain_velocity() -> None:
    dropped = torch.tensor([True, False] * 3)
    objective = MeanFlow(teacher=False, guidance=Guidance(AV(3.0, 3.0)), mix=0.5, drop_text=0.5)
    scene, _, v = velocity_of(objective, dropped)
    for name, value in v.items():
        assert torch.equal(value[dropped], scene.velocity[name][dropped])
        assert not torch.isclose(value[~dropped], scene.velocity[name][~dropped]).all()
    rates = [objective._dropped(scene, Rng.of(s, SIZE)) for s in range(50)]
    assert float(torch.stack([r for r in rates if r is not None]).float().mean()) == pytest.approx(0.5, abs=0.1)
    assert replace(objective, drop_text=0.0)._dropped(scene, Rng.of(0, SIZE)) is None


def test_with_a_teacher_the_velocity_is_the_guided_teachers() -> None:
    _, x_t, v = velocity_of(MeanFlow(guidance=Guidance(AV(3.0, 1.0))))
    heard = torch.arange(1.0, SIZE + 1, dtype=torch.float64)
    for name, scale in (("video", 3.0), ("audio", 1.0)):
        torch.testing.assert_close(v[name], x_t[name] + spread(scale * heard, x_t[name]))


@pytest.mark.parametrize(("task", "given"), [("a2v", "audio"), ("v2a", "video"), ("i2av", None)])
def test_what_is_given_is_clean_and_not_judged(task: str, given: str | None) -> None:
    student = network()
    nets = {"student": student, "teacher": EXACT}
    terms = MeanFlow(tasks={task: 1.0}).loss("student", nets, batch(), Rng.of(2, SIZE))
    assert all(term.isfinite().all() for term in terms.values())
    if given is None:
        return
    assert float(terms[f"mean_flow/{given}"].detach()) == 0 == float(terms[f"mean_flow/{given}/error"][1])
    terms[f"mean_flow/{given}"].backward()
    assert not any(p.grad.any() for p in student.parameters() if p.grad is not None)


def test_the_terms_are_the_same_again() -> None:
    nets = {"student": network(torch.float32), "teacher": EXACT}
    one, two = (MeanFlow().loss("student", nets, batch(dtype=torch.float32), Rng.of(2, SIZE)) for _ in range(2))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    assert MeanFlow().turn(3) == ("student",)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MeanFlow(teacher=False, guidance=Guidance(), mix=1.0), r"mix: 1.0 is not in"),
        (lambda: MeanFlow(teacher=False, guidance=Guidance(AV(2.0, 3.0)), mix=0.5), "leaves no weight"),
        (lambda: MeanFlow(mix=0.5), "guidance without a teacher"),
        (lambda: MeanFlow(floor=0.0), r"floor: 0.0 must be above 0"),
    ],
)
def test_impossible_settings_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.trial
def test_a_trained_student_reaches_its_gates() -> None:
    measured = measure(TRIALS["mean_flow"])
    assert measured.passes(TRIALS["mean_flow"].gates), measured
