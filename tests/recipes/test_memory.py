"""What --dry-run says a run takes, against what small runs were seen to take, in live bytes of tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from soundstage.core.av import AV
from soundstage.models import twin
from soundstage.models.wan import WanConfig
from soundstage.objectives.dmd import DMD, Guidance
from soundstage.objectives.flow_matching import FlowMatching
from soundstage.objectives.mean_flow import MeanFlow
from soundstage.objectives.rollout import Rollout
from soundstage.objectives.self_forcing import SelfForcing
from soundstage.recipes import ovi
from soundstage.recipes.published import shared
from soundstage.testing.tiny import GaussianLatents
from soundstage.training.config import Optim, Role, TrainConfig
from soundstage.training.engine import train
from soundstage.training.memory import LiveBytes, count_calls, flops_per_step
from soundstage.training.parallel import Parallel
from soundstage.training.plan import plan

LATENTS = AV(video=(4, 4, 16, 16), audio=(4, 40))


@dataclass(frozen=True)
class Small:
    """Ovi at 96 wide."""

    depth: int = 4

    def build(self) -> nn.Module:
        tower = WanConfig(96, 256, 2, self.depth, 4, 4, (1, 2, 2), text_width=32, text_length=16)
        return twin.TwinConfig(tower, replace(tower, patch=(1,))).build()

    def describe(self) -> dict[str, Any]:
        return {"latents": LATENTS.as_dict(), "flops": 1000}


def run(tmp_path: Path, **changes: Any) -> TrainConfig:  # noqa: ANN401
    moving = Optim(lr=1e-4)
    config = TrainConfig(
        "small",
        Small(),
        DMD(guidance=Guidance(AV(4.0, 3.0))),
        GaussianLatents(LATENTS),
        steps=2,
        batch_size=2,
        roles={"teacher": Role(Small()), "fake_score": Role(Small(), moving)},
        optim=moving,
        save_every=100,
        out=str(tmp_path / "run"),
    )
    return replace(config, **changes)


@pytest.mark.parametrize(
    ("changes", "on_one_base"),
    [
        ({"parallel": Parallel(checkpointing=True)}, False),
        pytest.param({"parallel": Parallel(checkpointing=True), "accumulate": 2}, False, marks=pytest.mark.slow),
        pytest.param({}, False, marks=pytest.mark.slow),
        ({"parallel": Parallel(checkpointing=True)}, True),
    ],
    ids=["checkpointed", "accumulated", "all kept", "shared base"],
)
def test_the_predicted_peak_is_within_15_per_cent_of_the_measured_one(
    changes: dict[str, Any], on_one_base: bool, tmp_path: Path
) -> None:
    config = run(tmp_path, **changes)
    config = shared(config, 8, 4) if on_one_base else config
    (predicted,) = plan(config, devices=(1,))["memory"]
    with LiveBytes() as live:
        train(config, device="cpu", tensorboard=False)
    assert predicted["total"] == pytest.approx(live.peak, rel=0.15)


def test_live_bytes_counts_what_is_alive() -> None:
    with LiveBytes() as live:
        kept = torch.zeros(1000)
        assert (live.now, live.peak) == (4000, 4000)
        view = kept[:10].reshape(2, 5)
        _ = torch.zeros(500, dtype=torch.float64)
        assert live.peak == 8000
        del _
        assert live.now == 4000
        live.reset()
        assert live.peak == 4000
        del kept
        assert live.now == 4000, "the view holds it"
        del view
        assert live.now == 0


def test_calls_are_those_of_the_method(tmp_path: Path) -> None:
    config = run(tmp_path, objective=DMD(guidance=Guidance(AV(4.0, 3.0)), ratio=2))
    found = count_calls(config, ("video", "audio"))
    # the student moves at every second step: one call with a gradient then, the fake score's at every step
    assert found["student"].learning == 0.5
    assert found["fake_score"].learning == 1.0
    assert found["teacher"].plain == 2 * 0.5
    assert found["fake_score"].plain == 0.5
    assert found["teacher"].largest == 2
    # 1.5 rollouts a step: to the exit of 0 to 3 calls before, and the call itself where there is no gradient
    assert found["student"].plain == pytest.approx(1.5 * 1.5 + 1.0, rel=0.15)
    chunks = count_calls(replace(config, objective=replace(config.objective, rollout=SelfForcing())), ("video",), 4)
    # and each chunk but the last of 4 is remembered by a call of its own
    assert chunks["student"].plain == pytest.approx(1.5 * (1.5 + 0.75) + 1.0, rel=0.15)
    assert (chunks["student"].learning, chunks["teacher"].plain) == (0.5, 2 * 0.5)
    once = count_calls(replace(config, objective=DMD(Rollout(AV((1.0,), (1.0,))), ratio=1)), ("video",))
    assert (once["student"].plain, once["student"].learning) == (1.0, 1.0)
    plain = replace(config, objective=FlowMatching(), roles={})
    assert flops_per_step(plain, count_calls(plain, ("video",)), {"student": 10.0}) == 3 * 10.0 * config.batch_size
    jvp = count_calls(replace(config, objective=MeanFlow()), ("video",))
    assert (jvp["student"].learning, jvp["teacher"].plain) == (1.0, 1.0)


def test_more_devices_hold_less_each(tmp_path: Path) -> None:
    config = run(tmp_path, batch_size=16, parallel=Parallel(checkpointing=True), precision="bf16")
    rows = plan(config)["memory"]
    assert [(row["devices"], row["accumulate"]) for row in rows] == [(8, 2), (16, 1), (64, 1)]
    for name in ("weights", "optimizer", "average"):
        held = [row[name] for row in rows]
        assert held[0] / held[2] == pytest.approx(8, rel=0.01), name
    assert rows[0]["gathered"] == rows[1]["gathered"] == rows[2]["gathered"]
    few = plan(replace(config, parallel=Parallel(shard=8, checkpointing=True)), devices=(8, 64))["memory"]
    assert few[0]["weights"] == few[1]["weights"]


@pytest.mark.slow
def test_the_dry_run_of_ovi_tells_what_the_states_alone_must_be() -> None:
    found = plan(ovi.dmd4("absent"))
    numbers = 11_660_753_108
    assert found["roles"]["student"]["parameters"] == numbers
    for row in found["memory"]:
        # 4 of weights and 8 of moments twice, 2 of the teacher, 4 of the average
        states = row["weights"] + row["optimizer"] + row["average"]
        assert states == pytest.approx(30 * numbers / row["devices"], rel=1e-3)
    one = plan(ovi.dmd4_shared("absent"))
    adapters = sum(one["roles"][role]["parameters"] for role in ("student", "fake_score"))
    assert adapters < 0.05 * numbers
    assert found["model"]["flops"] == pytest.approx(238e12, rel=0.01)
