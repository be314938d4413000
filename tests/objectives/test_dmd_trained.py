"""Students trained by distribution matching: the gates they keep, and the defects that miss them."""

import pytest
import torch

from soundstage.core import AV, Conditions, renoise
from soundstage.core.schedule import linear
from soundstage.objectives.dmd import DMD
from soundstage.objectives.rollout import Given, Rollout
from soundstage.testing.defects_dmd import ALONE, DEFECTS, TRIALS, UNSEEN, Coupling, couple
from soundstage.testing.defects_flow import measure
from soundstage.testing.toy import JointMLPConfig, QuickRng, ring


def test_ten_defects_and_more_are_kept() -> None:
    """Each differs from the right objective, and moves the student in some step."""
    assert len(DEFECTS) >= 10
    for name, defect in DEFECTS.items():
        assert defect.objective != ALONE, name
        assert isinstance(defect.objective, DMD) and "student" in defect.objective.turn(ALONE.warmup)


def is_right(objective: DMD) -> bool:
    """Nothing moves where the scores agree, a rollout to the end is the sampler, and every exit is drawn."""
    torch.manual_seed(0)
    rng, data = QuickRng.of(0, 64), ring().batch(0, 64)
    student, score = (JointMLPConfig(width=16).build() for _ in range(2))
    agreeing = objective.loss("student", {"student": student, "teacher": score, "fake_score": score}, data, rng)
    given, last = Given.of(data, {"t2av": 1.0}, rng), torch.full((64,), 3)
    assert isinstance(objective.rollout, Rollout)
    simulated = objective.rollout(student, given, rng, last).x0["video"]
    noise = rng.fold("start").normal_like(given.x0)
    sampled = renoise(student, noise, linear(4, AV(1.0)), Conditions(), rng=rng.fold("sampler"))["video"]
    exits = {int(objective.rollout.exits(rng.fold("step", step))[0]) for step in range(40)}
    return float(agreeing["dmd/video"].detach()) == 0 and torch.equal(simulated, sampled) and len(exits) == 4


def test_what_training_forgives_an_identity_tells() -> None:
    assert is_right(ALONE)
    assert [name for name, objective in UNSEEN.items() if is_right(objective)] == []


@pytest.mark.trial
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_four_calls_make_the_ring(seed: int) -> None:
    trial = TRIALS["anchored"]
    found = measure(trial, seed)
    assert found.passes(trial.gates), found


@pytest.mark.trial
def test_without_an_anchor_this_seed_makes_it_too() -> None:
    trial = TRIALS["dmd"]
    found = measure(trial, 1)
    assert found.passes(trial.gates), found


@pytest.mark.trial
@pytest.mark.parametrize("name", list(DEFECTS))
def test_every_defect_misses_its_gate(name: str) -> None:
    wrong = DEFECTS[name].wrong
    found = measure(wrong, 1)
    assert found.caught(wrong.gates), found


@pytest.mark.trial
def test_joint_scores_find_the_pairs() -> None:
    """From the product of the marginals; both modalities stay where they were."""
    found = couple(Coupling(), 1)
    assert found.agreement >= 0.7, found


@pytest.mark.trial
def test_marginal_scores_leave_them_unfound() -> None:
    found = couple(Coupling(apart=True), 1)
    assert found.agreement <= 0.2, found


@pytest.mark.trial
def test_without_its_weight_the_sound_gets_worse() -> None:
    right, without = (couple(Coupling(weights=weights, paired=True), 1) for weights in ({}, {"dmd/audio": 0.0}))
    assert without.distance["audio"] >= 1.5 * right.distance["audio"], (right, without)
