"""Wrong losses of the consistency family must miss their gates by far; the table of them is what it says."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from soundstage.core import AV
from soundstage.core.sampling import euler
from soundstage.testing.defects_flow import DEFECTS, TRIALS, TRUTH, Measured, distance, floor, measure, score
from soundstage.testing.flow_maps import GaussianMap
from soundstage.testing.toy import QuickRng


def test_every_trial_has_defects_and_every_defect_its_trial() -> None:
    assert {name.partition(":")[0] for name in DEFECTS} == set(TRIALS)
    assert len(DEFECTS) >= 20
    for name, defect in DEFECTS.items():
        assert defect.trial == name.partition(":")[0]
        right = TRIALS[defect.trial]
        assert defect.objective is not right.objective
        assert (defect.wrong.gates, defect.wrong.steps, defect.wrong.optims) == (right.gates, right.steps, right.optims)


def test_the_distance_tells_samples_of_the_ring_from_others() -> None:
    """A sample of the ring itself is at the floor; fewer steps of the exact teacher are further and further away."""
    assert floor() < 0.05
    steps = [score(TRUTH, euler, calls) for calls in (4, 2, 1)]
    assert steps[0] == pytest.approx(0.103, abs=0.02)
    assert all(a < b / 1.5 for a, b in pairwise(steps))
    assert distance(AV(torch.zeros_like(TRUTH.sample(QuickRng.of(0, 4000))["video"]))) > 1.3
    assert score(GaussianMap(std=float("nan")), euler, 1) == float("inf")


def test_gates_and_a_quarter_above_them() -> None:
    gates = {1: 0.1, 4: 0.2}
    assert Measured({1: 0.05, 4: 0.1}, 0.0).passes(gates)
    between = Measured({1: 0.12, 4: 0.1}, 0.0)
    assert not between.passes(gates) and not between.caught(gates)
    assert Measured({1: 0.05, 4: float("inf")}, 0.0).caught(gates)


@pytest.mark.trial
@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_is_caught(name: str) -> None:
    wrong = DEFECTS[name].wrong
    measured = measure(wrong)
    assert measured.caught(wrong.gates), measured
