"""rCM: the terms of a consistency loss and of DMD, each as it is by itself, on rollouts at levels drawn anew."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from soundstage.core import AV, Conditions, ConfigError, Joint, Rng, Uniform, explicit, renoise, shift
from soundstage.core.flow import ToData
from soundstage.objectives.base import Batch
from soundstage.objectives.consistency import Consistency, ContinuousConsistency
from soundstage.objectives.dmd import DMD, Guidance
from soundstage.objectives.mean_flow import MeanFlow
from soundstage.objectives.rcm import RCM, Wandering
from soundstage.objectives.rollout import Given
from soundstage.testing.defects_flow import TRIALS, measure
from soundstage.testing.flow_maps import GaussianMap
from soundstage.testing.tiny import GaussianLatents
from soundstage.testing.toy import JointMLP, JointMLPConfig

EXACT = GaussianMap()
SHAPE: AV[tuple[int, ...]] = AV((2, 3, 2, 2), (3, 5))
NOTHING = Conditions()
UNIFORM = Joint(AV(Uniform(), Uniform()))
SIZE = 6
BOTH = RCM(ContinuousConsistency(UNIFORM), DMD(Wandering(), Guidance(AV(1.0, 1.0))))


def batch() -> Batch:
    drawn = GaussianLatents(shape=SHAPE).batch(0, SIZE)
    return Batch(drawn.x0, NOTHING, drawn.ids)


def network(seed: int) -> JointMLP:
    torch.manual_seed(seed)
    built = JointMLPConfig(SHAPE, width=24).build()
    torch.nn.init.normal_(built.span.weight, std=0.2)
    return built


def nets() -> dict[str, Any]:
    return {"student": network(0), "teacher": EXACT, "fake_score": network(1)}


def gradients(term: Tensor, module: torch.nn.Module) -> list[Tensor | None]:
    return list(torch.autograd.grad(term, list(module.parameters()), retain_graph=True, allow_unused=True))


@pytest.mark.parametrize("modality", ["video", "audio"])
def test_the_terms_are_those_of_both_and_no_others(modality: str) -> None:
    players, rng = nets(), Rng.of(2, SIZE)
    terms = BOTH.loss("student", players, batch(), rng)
    scm = BOTH.consistency.loss("student", players, batch(), rng.fold("consistency"))
    dmd = BOTH.dmd.loss("student", players, batch(), rng.fold("dmd"))
    assert terms.keys() == scm.keys() | dmd.keys() and not scm.keys() & dmd.keys()
    for name, term in (scm | dmd).items():
        assert torch.equal(terms[name], term), name
    for part, name in ((scm, f"scm/{modality}"), (dmd, f"dmd/{modality}")):
        for a, b in zip(
            gradients(terms[name], players["student"]), gradients(part[name], players["student"]), strict=True
        ):
            assert (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))


def test_other_roles_and_turns_are_those_of_dmd() -> None:
    players, rng = nets(), Rng.of(2, SIZE)
    terms = BOTH.loss("fake_score", players, batch(), rng)
    alone = BOTH.dmd.loss("fake_score", players, batch(), rng.fold("dmd"))
    assert terms.keys() == alone.keys() == {"fake_score/video", "fake_score/audio"}
    assert all(torch.equal(terms[name], alone[name]) for name in terms)
    assert [BOTH.turn(step) for step in range(11)] == [BOTH.dmd.turn(step) for step in range(11)]
    assert BOTH.turn(5) == ("student", "fake_score") and BOTH.turn(6) == ("fake_score",)


def test_the_perfect_student_gets_nothing_from_either() -> None:
    """The exact flow map down to data, its samples' own score as fake score: no tangent, no gap."""
    players = {"student": ToData(EXACT), "teacher": EXACT, "fake_score": EXACT}
    terms = BOTH.loss("student", players, batch(), Rng.of(2, SIZE))
    for name in ("video", "audio"):
        assert float(terms[f"dmd/{name}"]) == 0
        total, count = terms[f"scm/{name}/tangent"]
        assert float(total / count) < 1e-5


def test_a_flow_map_learns_by_both_its_times() -> None:
    """MeanFlow asks it with r; DMD sees a network that jumps to data; fake score and teacher are asked as ever."""
    players, rng = nets(), Rng.of(2, SIZE)
    both = RCM(MeanFlow(), BOTH.dmd, two_times=True)
    terms = both.loss("student", players, batch(), rng)
    jumping = {**players, "student": ToData(players["student"])}
    expected = BOTH.dmd.loss("student", jumping, batch(), rng.fold("dmd"))
    expected |= MeanFlow().loss("student", players, batch(), rng.fold("consistency"))
    assert terms.keys() == expected.keys()
    assert all(torch.equal(terms[name], term) for name, term in expected.items())
    plain = replace(both, two_times=False).loss("student", players, batch(), rng)
    assert not torch.equal(plain["dmd/video"], terms["dmd/video"])


def test_two_parts_may_not_share_a_name() -> None:
    twice = RCM(Consistency(), replace(BOTH.dmd, anchors=(Consistency(),)))
    with pytest.raises(ConfigError, match=r"RCM.consistency: it names 'cd/"):
        twice.loss("student", nets(), batch(), Rng.of(2, SIZE))


@pytest.mark.parametrize(("task", "given"), [("a2v", "audio"), ("v2a", "video")])
def test_a_given_modality_gets_no_loss(task: str, given: str) -> None:
    tasks = {task: 1.0}
    both = RCM(replace(BOTH.consistency, tasks=tasks), replace(BOTH.dmd, tasks=tasks))  # type: ignore[type-var]
    players = nets()
    terms = both.loss("student", players, batch(), Rng.of(2, SIZE))
    for name in (f"dmd/{given}", f"scm/{given}"):
        assert float(terms[name].detach()) == 0
        assert not any(g.any() for g in gradients(terms[name], players["student"]) if g is not None)


def test_the_levels_wander_from_one_and_are_shared() -> None:
    wandering = Wandering(4, AV(5.0, 2.0))
    lists = [wandering.times(Rng.of(0, 3).fold(step)) for step in range(300)]
    for times in lists:
        assert len(times["video"]) == len(times["audio"]) <= 4
        for name, levels in times.items():
            assert levels[0] == 1.0 and levels[-1] > 0
            assert list(levels) == sorted(set(levels), reverse=True), name
        assert times["audio"] == pytest.approx([shift(shift(t, 1 / 5.0), 2.0) for t in times["video"]])
    counts = torch.tensor([len(times["video"]) for times in lists]).bincount(minlength=5)[1:] / 300
    assert float((counts - 0.25).abs().max()) < 0.08
    second = torch.tensor([shift(t, 1 / 5.0) for times in lists for t in times["video"][1:]])
    assert float(second.mean()) == pytest.approx(0.5, abs=0.05)
    elsewhere = [wandering.times(Rng.of(0, 2, start=3).fold(step)) for step in range(300)]
    other = [wandering.times(Rng.of(1, 3).fold(step)) for step in range(300)]
    assert [times["video"] for times in elsewhere] == [times["video"] for times in lists]
    assert [times["video"] for times in other] != [times["video"] for times in lists]
    with pytest.raises(ConfigError, match=r"Wandering.steps: 0"):
        Wandering(0)


@pytest.mark.parametrize("steps", [1, 4])
def test_a_wandering_rollout_is_the_sampler(steps: int) -> None:
    student, rng, wandering = network(0), Rng.of(2, SIZE), Wandering(steps)
    given = Given.of(batch(), {"t2av": 1.0}, rng)
    for step in range(3):
        here = rng.fold(step)
        simulated = wandering(student, given, here)
        grid = explicit(wandering.times(here).map(lambda levels: (*levels, 0.0)))
        noise = here.fold("start").normal_like(given.x0)
        sampled = renoise(student, noise, grid, NOTHING, rng=here.fold("sampler"))
        for name, x in sampled.items():
            assert torch.equal(x, simulated.x0[name])
        assert all(x.requires_grad for x in simulated.x0.values())


@pytest.mark.trial
def test_a_trained_student_reaches_its_gates() -> None:
    measured = measure(TRIALS["rcm"])
    assert measured.passes(TRIALS["rcm"].gates), measured
