from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from soundstage.objectives.base import Sum, report
from soundstage.objectives.fidelity import Fidelity, Likeness, Noised, Predicted
from soundstage.objectives.flow_matching import FlowMatching
from soundstage.objectives.reconstruction import absolute
from soundstage.training.config import TrainConfig
from soundstage.training.engine import train
from soundstage.training.metrics import read
from soundstage.training.probe import gradients


def test_norms_are_unweighted_and_shares_weighted() -> None:
    a, b = (torch.tensor([1.0, 2.0], requires_grad=True) for _ in range(2))
    terms = {
        "dmd/video": 3 * a.sum() + 4 * b.sum(),
        "gan/video": 10 * a[0],
        "still/audio": torch.tensor(1.0),
        "dmd/video/t0": report(6 * a, torch.tensor([True, False])),
        "dmd/video/t1": report(a, torch.tensor([False, False])),
    }
    found = gradients(terms, [a, b], lambda name: {"gan/video": 0.5}.get(name, 1.0))
    assert found == pytest.approx(
        {
            "grad_norm/dmd/video": 50**0.5,
            "grad_norm/gan/video": 10.0,
            "grad_norm/dmd/video/t0": 6.0,
            "grad_share/dmd/video": 50**0.5 / (50**0.5 + 5),
            "grad_share/gan/video": 5 / (50**0.5 + 5),
        }
    )
    assert a.grad is None and b.grad is None


def test_a_run_logs_the_share_of_each_term(make: Callable[..., TrainConfig], tmp_path: Path) -> None:
    fidelity = Fidelity((Likeness("pixel", absolute, "video"),), source=Predicted(Noised()))
    config = make(
        objective=Sum(FlowMatching(bins=0), (fidelity,)), probe_every=2, steps=3, weights={"pixel/video": 0.0}
    )
    train(config, tmp_path / "a", device="cpu", tensorboard=False)
    first, second, third = read(tmp_path / "a")
    for entry in (first, third):
        shares = {name: value for name, value in entry.items() if name.startswith("grad_share/")}
        assert shares.keys() == {"grad_share/flow/video", "grad_share/flow/audio", "grad_share/pixel/video"}
        assert shares["grad_share/pixel/video"] == 0.0 < entry["grad_norm/pixel/video"]
        assert sum(shares.values()) == pytest.approx(1.0)
    assert not [name for name in second if name.startswith("grad_share/")]
