from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from soundstage.core.av import AV, spread
from soundstage.core.conditions import Conditions
from soundstage.core.errors import ConfigError
from soundstage.core.rng import Rng
from soundstage.core.times import Joint, Uniform
from soundstage.objectives.base import Batch
from soundstage.objectives.flow_matching import FlowMatching
from soundstage.objectives.tasks import TASKS
from soundstage.testing.tiny import GaussianLatents, ToyConfig

MEAN, STD = 0.7, 0.5
UNIFORM = Joint(AV(Uniform(), Uniform()))
PRESETS = ["t2av", "t2v", "t2a", "i2av", "a2v", "v2a", "extension", "inpainting_time", "inpainting_space"]


def batch(size: int = 8, cond: Conditions | None = None) -> Batch:
    drawn = GaussianLatents(shape=AV((2, 4, 3, 3), (3, 8)), mean=MEAN, std=STD).batch(0, size)
    return Batch(drawn.x0, cond or Conditions(), drawn.ids)


@dataclass(frozen=True)
class Exact:
    """E[noise - x0 | x_t] for x0 ~ N(MEAN, STD^2): with m = (1-t) MEAN and s^2 = (1-t)^2 STD^2 + t^2,

    v = -MEAN + (t - (1 - t) STD^2) / s^2 (x_t - m).
    """

    def __call__(
        self,
        x_t: AV[Tensor],
        t: AV[Tensor],
        cond: Conditions,  # noqa: ARG002
        *,
        r: AV[Tensor] | None = None,  # noqa: ARG002
    ) -> AV[Tensor]:
        def one(x: Tensor, level: Tensor) -> Tensor:
            s = spread(level, x)
            return -MEAN + (s - (1 - s) * STD**2) / ((1 - s) ** 2 * STD**2 + s**2) * (x - (1 - s) * MEAN)

        return x_t.map(one, t)


@dataclass
class Spy:
    """Records what the network is shown and answers zero."""

    x_t: AV[Tensor] | None = None
    t: AV[Tensor] | None = None
    cond: Conditions | None = None

    def __call__(
        self,
        x_t: AV[Tensor],
        t: AV[Tensor],
        cond: Conditions,
        *,
        r: AV[Tensor] | None = None,  # noqa: ARG002
    ) -> AV[Tensor]:
        self.x_t, self.t, self.cond = x_t, t, cond
        return x_t * 0.0


def seen(task: str, size: int = 64, **changes: float) -> tuple[Spy, Batch, dict[str, Tensor]]:
    spy, data = Spy(), batch(size)
    objective = FlowMatching(times=UNIFORM, tasks={task: 1.0}, **changes)  # type: ignore[arg-type]
    return spy, data, objective.loss("student", {"student": spy}, data, Rng.of(3, size))


def test_the_exact_velocity_has_the_irreducible_loss() -> None:
    """Var(noise - x0 | x_t) = STD^2 / ((1 - t)^2 STD^2 + t^2), whose mean over uniform t is STD pi / 2."""
    terms = FlowMatching(times=UNIFORM).loss("student", {"student": Exact()}, batch(4000), Rng.of(0, 4000))
    expected = STD * math.pi / 2
    for name in ("video", "audio"):
        assert float(terms[f"flow/{name}"]) == pytest.approx(expected, rel=0.03)
        parts = [term for key, term in terms.items() if key.startswith(f"flow/{name}/")]
        assert len(parts) == 4
        assert sum(float(part[1]) for part in parts) == 4000
        assert sum(float(part[0]) for part in parts) / 4000 == pytest.approx(float(terms[f"flow/{name}"]), rel=1e-5)


def test_the_reports_follow_the_noise_level() -> None:
    terms = FlowMatching(times=UNIFORM, bins=2).loss("student", {"student": Exact()}, batch(4000), Rng.of(0, 4000))
    bins = (terms["flow/video/t0.00-0.50"], terms["flow/video/t0.50-1.00"])
    low, high = (float(total / count) for total, count in bins)
    # a^2 / ((1 - t)^2 a^2 + t^2) integrates to a arctan(t / (a (1 - t)))
    assert low == pytest.approx(2 * STD * math.atan(1 / STD), rel=0.04)
    assert high == pytest.approx(2 * STD * (math.pi / 2 - math.atan(1 / STD)), rel=0.04)


def test_modalities_have_their_own_noise_levels() -> None:
    spy, _, _ = seen("t2av")
    assert spy.t is not None
    assert spy.t["video"].shape == spy.t["audio"].shape == (64,)
    assert abs(float(torch.corrcoef(torch.stack(list(spy.t.values())))[0, 1])) < 0.3


@pytest.mark.parametrize(("task", "modality"), [("t2v", "video"), ("t2a", "audio")])
def test_an_absent_modality_is_absent(task: str, modality: str) -> None:
    spy, _, terms = seen(task)
    assert spy.x_t is not None
    assert spy.x_t.modalities == (modality,)
    assert [key for key in terms if key.count("/") == 1] == [f"flow/{modality}"]


@pytest.mark.parametrize(("task", "given", "made"), [("a2v", "audio", "video"), ("v2a", "video", "audio")])
def test_a_given_modality_is_nearly_clean_and_not_learnt(task: str, given: str, made: str) -> None:
    spy, data, terms = seen(task, given_noise=0.2)
    assert spy.t is not None and spy.x_t is not None
    level = spy.t[given]
    assert level.shape == (64,)
    assert 0.15 < float(level.max()) < 0.2
    shown = spy.x_t[given] - spread(1 - level, data.x0[given]) * data.x0[given]
    assert float(shown.flatten(1).std(1).div(level).mean()) == pytest.approx(1.0, rel=0.1)
    assert float(spy.t[made].max()) > 0.9
    assert float(terms[f"flow/{given}"]) == 0.0
    clean, data, _ = seen(task, given_noise=0.0)
    assert clean.x_t is not None
    assert torch.equal(clean.x_t[given], data.x0[given])


@pytest.mark.parametrize(("task", "frozen"), [("a2v", "audio"), ("v2a", "video")])
def test_a_given_modality_gets_no_gradient(task: str, frozen: str) -> None:
    network = ToyConfig().build()
    data = GaussianLatents().batch(0, 8)
    terms = FlowMatching(tasks={task: 1.0}).loss("student", {"student": network}, data, Rng.of(0, 8))
    torch.stack([term for term in terms.values() if term.ndim == 0]).sum().backward()
    moved = {"video": network.outputs["video"].weight.grad, "audio": network.outputs["audio"].weight.grad}
    assert moved[frozen] is not None and not moved[frozen].any()  # type: ignore[union-attr]
    assert all(value.any() for name, value in moved.items() if name != frozen and value is not None)


def test_the_first_frame_is_given_with_its_own_level() -> None:
    spy, data, _ = seen("i2av", given_noise=0.0)
    assert spy.t is not None and spy.x_t is not None
    assert spy.t["video"].shape == (64, 4)
    assert spy.t["audio"].shape == (64,)
    assert not spy.t["video"][:, 0].any()
    assert torch.equal(spy.t["video"][:, 1], spy.t["video"][:, 3])
    assert torch.equal(spy.x_t["video"][:, :, 0], data.x0["video"][:, :, 0])


def test_an_extension_cuts_picture_and_sound_at_the_same_moment() -> None:
    spy, _, _ = seen("extension", given_noise=0.0)
    assert spy.t is not None
    kept = {name: (level == 0).float() for name, level in spy.t.items()}
    for given in kept.values():
        assert torch.equal(given.cummin(1).values, given)
        assert bool((given[:, 0] == 1).all()) and bool((given[:, -1] == 0).all())
    assert float((kept["video"].mean(1) - kept["audio"].mean(1)).abs().max()) <= 1 / 4
    assert len(kept["audio"].sum(1).unique()) > 3


def test_inpainting_in_time_makes_one_interval_in_both() -> None:
    spy, _, _ = seen("inpainting_time", given_noise=0.0)
    assert spy.t is not None
    made = (spy.t["audio"] > 0).int()
    edges = (made.diff(dim=1, prepend=torch.zeros(64, 1), append=torch.zeros(64, 1)) == 1).sum(1)
    assert bool((edges == 1).all())
    centres = [
        ((level > 0) * torch.linspace(0, 1, level.shape[1])).sum(1) / (level > 0).sum(1) for level in spy.t.values()
    ]
    assert float(torch.nanmean((centres[0] - centres[1]).abs())) < 0.15


def test_inpainting_in_space_learns_a_box_of_cells() -> None:
    network = Spy()
    rng, data = Rng.of(0, 64), batch(64)
    objective = FlowMatching(times=UNIFORM, tasks={"inpainting_space": 1.0})
    value = float(objective.loss("student", {"student": network}, data, rng)["flow/video"].detach())
    assert network.t is not None and network.x_t is not None
    assert float(network.t["video"].min()) > 0
    mask = TASKS["inpainting_space"].mask(data.x0, rng.fold("tasks", "mask", "inpainting_space"))["video"]
    assert mask.shape == (64, 1, 4, 3, 3)
    cells = mask[:, 0, 0].flatten(1).sum(1)
    assert set(cells.tolist()) == {1, 2, 4}
    target = (rng.fold("noise").normal_like(data.x0) - data.x0)["video"] ** 2
    expected = ((target * mask).flatten(1).sum(1) / (mask.flatten(1).sum(1) * 2)).mean()
    assert value == pytest.approx(float(expected), rel=1e-5)


def test_tasks_mix_within_a_batch_at_their_rates() -> None:
    spy, size = Spy(), 2000
    objective = FlowMatching(times=UNIFORM, tasks={"t2av": 0.5, "i2av": 0.3, "a2v": 0.2}, given_noise=0.0)
    terms = objective.loss("student", {"student": spy}, batch(size), Rng.of(1, size))
    assert spy.t is not None
    assert float((spy.t["video"][:, 0] == 0).float().mean()) == pytest.approx(0.3, abs=0.04)
    assert float((spy.t["audio"] == 0).float().mean()) == pytest.approx(0.2, abs=0.04)
    counts = sum(float(term[1]) for key, term in terms.items() if key.startswith("flow/audio/"))
    assert counts == float((spy.t["audio"] > 0).sum())


def test_absent_modalities_come_at_their_rate_too() -> None:
    objective, data = FlowMatching(tasks={"t2av": 0.5, "t2v": 0.25, "a2v": 0.25}), batch(2)
    absent = 0
    for step in range(200):
        spy = Spy()
        objective.loss("student", {"student": spy}, data, Rng.of(0, 2).fold(step))
        assert spy.x_t is not None
        absent += "audio" not in spy.x_t
    assert absent / 200 == pytest.approx(0.25, abs=0.08)


@pytest.mark.parametrize("modality", ["video", "audio"])
def test_every_task_on_one_modality_alone(modality: str) -> None:
    data = batch(4)
    alone = Batch(data.x0.only(modality), data.cond, data.ids)
    objective = FlowMatching(tasks=dict.fromkeys(PRESETS, 1.0))
    for step in range(10):
        terms = objective.loss("student", {"student": Exact()}, alone, Rng.of(0, 4).fold(step))
        assert {key.split("/")[1] for key in terms} == {modality}


def test_a_task_that_makes_nothing_of_the_data_is_refused() -> None:
    alone = Batch(batch(2).x0.only("audio"), Conditions(), ("a", "b"))
    with pytest.raises(ConfigError, match="'v2av' is not one of"):
        FlowMatching(tasks={"t2v": 1.0, "v2av": 1.0}).loss("student", {"student": Spy()}, alone, Rng.of(0, 2))
    with pytest.raises(ConfigError, match="tasks: none of t2v generates anything of audio"):
        FlowMatching(tasks={"t2v": 1.0}).loss("student", {"student": Spy()}, alone, Rng.of(0, 2))


def test_text_is_dropped_for_some_samples_in_both_modalities() -> None:
    size = 1000
    text = AV(*(torch.ones(size, 5, dtype=torch.int64) for _ in range(2)))
    mask = text.map(lambda x: x.bool())
    spy = Spy()
    objective = FlowMatching(drop_text=0.3)
    objective.loss("student", {"student": spy}, batch(size, Conditions(text=text, text_mask=mask)), Rng.of(0, size))
    assert spy.cond is not None and spy.cond.text is not None and spy.cond.text_mask is not None
    kept = spy.cond.text_mask["video"].any(1)
    assert float(kept.float().mean()) == pytest.approx(0.7, abs=0.05)
    assert torch.equal(kept, spy.cond.text_mask["audio"].any(1))
    assert torch.equal(spy.cond.text["video"].any(1), kept)


def test_a_sample_is_the_same_alone_and_in_a_batch() -> None:
    objective = FlowMatching(tasks={"t2av": 1.0, "i2av": 1.0, "a2v": 1.0, "inpainting_time": 1.0})
    whole, one, data = Spy(), Spy(), batch(6)
    objective.loss("student", {"student": whole}, data, Rng.of(0, 6))
    third = Batch(data.x0.map(lambda x: x[2:3]), data.cond, data.ids[2:3])
    objective.loss("student", {"student": one}, third, Rng.of(0, 1, start=2))
    assert whole.x_t is not None and one.x_t is not None
    for name in ("video", "audio"):
        assert torch.equal(whole.x_t[name][2:3], one.x_t[name])
