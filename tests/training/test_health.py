"""Rules that stop a run: each on numbers it must and must not stop at, and on a student that loses its modes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from soundstage.core.av import AV
from soundstage.core.conditions import Conditions
from soundstage.core.errors import ConfigError, ShapeError
from soundstage.core.rng import Rng
from soundstage.core.sampling import renoise
from soundstage.objectives.consistency import Consistency
from soundstage.objectives.dmd import DMD, Guidance, score_times
from soundstage.objectives.flow_map import Grid
from soundstage.objectives.flow_matching import FlowMatching
from soundstage.objectives.rollout import Rollout
from soundstage.testing.toy import JointMLPConfig, QuickRng, fit, imbalance, ring
from soundstage.training.config import Optim, Role, TrainConfig
from soundstage.training.engine import RunError, train
from soundstage.training.health import DRAWS, Health
from soundstage.training.metrics import read
from soundstage.training.overrides import override
from soundstage.training.state import Validation
from soundstage.training.vitals import Vitals, coverage, diversity, look

RING, EVEN = ring(), score_times(AV(1.0, 1.0))
ROLLOUT = Rollout(AV((1.0, 0.75, 0.5, 0.25)))


def history(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"step": 10 * (i + 1), **row} for i, row in enumerate(rows)]


def series(name: str, *values: float | None) -> list[dict[str, Any]]:
    return history({name: value} for value in values)


# The rules


def test_nothing_logged_stops_nothing() -> None:
    assert Health()([]) is None
    assert Health()(history([{"loss": 1e9}, {"validate/f1": 0.0}])) is None


def test_a_fake_score_that_lost_the_student() -> None:
    def gap(fake: float) -> str | None:
        return Health()(history([{"error/fake/audio": fake, "error/teacher/audio": 0.1}] * 5))

    assert gap(0.29) is None
    reason = gap(0.31)
    assert reason is not None
    assert reason.startswith("step 50: the fake score is 3.1 times as far from the student's audio as the teacher is")
    assert "(health.critic=3); the last checkpoint is kept. Raise objective.ratio" in reason
    assert reason.endswith("or set health.critic=none to go on as it is")
    # one bad entry among five is no reason
    rows = [{"error/fake/audio": 0.1, "error/teacher/audio": 0.1}] * 4
    assert Health()(history([*rows, {"error/fake/audio": 0.9, "error/teacher/audio": 0.1}])) is None


def test_a_gradient_out_of_proportion() -> None:
    calm = [1.0, 2.0, 1.0] * 10
    assert Health()(series("grad_norm/dmd/video", *calm, *[99.0] * 5)) is None
    reason = Health()(series("grad_norm/dmd/video", *calm, *[150.0] * 5))
    assert reason is not None and "grad_norm/dmd/video is 150, 150 times its median" in reason
    # too few to know what is usual; switched off; not finite
    assert Health()(series("grad_norm/student", *[1.0] * 14, *[1e6] * 5)) is None
    assert Health(gradient=None)(series("grad_norm/student", *calm, *[1e6] * 5)) is None
    assert Health()(series("grad_norm/student", *calm, None, float("inf"), float("nan"))) is None


def test_an_exit_that_is_never_drawn() -> None:
    def drawn(exits: int, draw: Callable[[int], int]) -> str | None:
        rows = ({f"exit/{k}": float(draw(i) == k) for k in range(exits)} for i in range(DRAWS * exits))
        return Health()(history(rows))

    assert drawn(4, lambda i: i % 4) is None
    assert drawn(4, lambda i: int(torch.randint(4, (), generator=torch.Generator().manual_seed(i)))) is None
    reason = drawn(4, lambda i: i % 3)
    assert reason is not None and "exit/3 has a share of 0 of the last 80 entries, where 1/4 is equal" in reason
    assert drawn(1, lambda _: 0) is None
    assert Health()(history([{"exit/0": 1.0, "exit/1": 0.0}] * (2 * DRAWS - 1))) is None


@pytest.mark.parametrize(("name", "bound", "unit"), [("brightness", 0.15, ""), ("loudness", 10.0, " dB")])
def test_drift_from_the_first_validation_or_the_teacher(name: str, bound: float, unit: str) -> None:
    far, key = 0.5 + 1.1 * bound, f"validate/{name}"
    assert Health()(series(key, 0.5, 0.5 + 0.9 * bound, 0.5 - 0.9 * bound)) is None
    assert Health()(series(key, 0.5, far, 0.5, far)) is None
    reason = Health()(series(key, 0.5, far, far))
    assert reason is not None
    assert f"the {name} of the samples is {far:.3g}{unit}, that of the first validation's 0.5{unit}" in reason
    assert Health(after=20)(series(key, 0.5, far, far)) is None
    teacher = {"validate/teacher/" + name: far}
    assert Health()(history([{key: far, **teacher}] * 3)) is None
    reason = Health()(history([{key: 0.5, **teacher}] * 2))
    assert reason is not None and "that of the teacher's" in reason


def test_less_variety_than_the_teacher() -> None:
    def rows(*values: float) -> list[dict[str, Any]]:
        return history({"validate/diversity/video": v, "validate/teacher/diversity/video": 2.0} for v in values)

    assert Health()(rows(1.1, 1.1, 0.9)) is None
    reason = Health()(rows(1.1, 0.9, 0.9))
    assert reason is not None and "differs by 0.9, the teacher's by 2 (health.diversity=0.5)" in reason
    assert Health(patience=3)(rows(1.1, 0.9, 0.9)) is None
    assert Health()(series("validate/diversity/video", 0.0, 0.0, 0.0)) is None
    reason = Health(coverage=0.8)(series("validate/coverage/audio", 0.9, 0.7, 0.7))
    assert reason is not None and "0.7 of the teacher's audio samples have a student's near" in reason


def test_sound_that_no_longer_fits_the_picture() -> None:
    def rows(*values: float) -> list[dict[str, Any]]:
        return history({"validate/sync": value, "validate/teacher/sync": 0.8} for value in values)

    assert Health()(rows(0.5, 0.3, 0.5)) is None
    reason = Health()(rows(0.5, 0.3, 0.3))
    assert reason is not None and "sync of the samples is 0.3, the teacher's 0.8 (health.sync=0.5)" in reason
    assert Health(sync=None)(rows(0.5, 0.3, 0.3)) is None
    assert Health()(series("validate/sync", 0.0, 0.0, 0.0)) is None  # nothing to hold it against


def test_bounds_are_settings(make: Callable[..., TrainConfig]) -> None:
    config = override(make(), ["health.critic=2", "health.loudness=none", "health.patience=4"])
    assert config.health == Health(critic=2.0, loudness=None, patience=4)
    with pytest.raises(ConfigError, match="must be at least 1"):
        Health(window=0)


# Vital signs


def test_brightness_saturation_and_loudness() -> None:
    green = torch.tensor([-1.0, 1.0, -1.0])[None, :, None, None, None].expand(2, 3, 2, 4, 4)
    tone = torch.sin(torch.arange(1600) * 0.1 * torch.pi)[None, None].expand(2, 1, -1)
    found = look(AV(green, 0.1 * tone))
    assert found == pytest.approx({"brightness": 0.7152, "saturation": 1.0, "loudness": -23.01}, abs=1e-2)
    assert look(AV(audio=torch.zeros(1, 1, 100))) == {"loudness": pytest.approx(-80.0)}


def test_diversity_is_within_a_prompt() -> None:
    x = torch.tensor([0.0, 1.0, 10.0, 13.0])[:, None].expand(4, 3)
    assert diversity(x, seeds=2) == pytest.approx(2.0)
    assert diversity(torch.ones(4, 3)) == 0.0
    with pytest.raises(ShapeError, match="not prompts of 3 seeds each"):
        diversity(x, seeds=3)


def test_a_lost_mode_takes_its_share_of_the_coverage() -> None:
    true, made = (RING.sample(QuickRng.of(seed, 512)) for seed in (0, 1))
    assert coverage(true["video"], made["video"]) > 0.93
    left = RING.nearest(made)["video"] >= 2
    part = float((RING.nearest(true)["video"] >= 2).double().mean())
    assert coverage(true["video"], made["video"][left]) == pytest.approx(part, abs=0.06)
    with pytest.raises(ShapeError, match="no 5-th neighbour"):
        coverage(true["video"][:5], made["video"])


# Runs


class Exact(nn.Module):
    """The ring's closed-form teacher, as a network."""

    def forward(self, *args: Any, **kwargs: Any) -> AV[Tensor]:  # noqa: ANN401
        return RING(*args, **kwargs)


@dataclass(frozen=True)
class ExactConfig:
    def build(self) -> Exact:
        return Exact()


def sampled(validation: Validation) -> AV[Tensor]:
    rng = Rng.of(1, 128)
    start = rng.fold("start").normal_like(RING.sample(rng))
    return renoise(validation.student, start, ROLLOUT.grid, Conditions(), rng=rng)


VITALS = Vitals(sampled, lambda _: RING.sample(Rng.of(2, 128)), neighbours=16)


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Weights of a student that knows the ring a little."""
    torch.manual_seed(0)
    objective, optim = FlowMatching(EVEN, drop_text=0.0, given_noise=0.0, bins=0), Optim(lr=5e-3, weight_decay=0.0)
    net = fit(objective, {"student": JointMLPConfig().build()}, {"student": optim}, RING, 200, batch=128)
    file = tmp_path_factory.mktemp("start") / "student.safetensors"
    save_file(net.state_dict(), file)
    return str(file)


def distilling(started: str, lr: float, **changes: Any) -> TrainConfig:  # noqa: ANN401
    """DMD of the ring, the fake score at 1e-3."""
    optim = Optim(lr=lr, betas=(0.0, 0.999), weight_decay=0.0, clip=None)
    critic = Role(JointMLPConfig(), replace(optim, lr=changes.pop("critic", 1e-3)), started)
    settings: dict[str, Any] = {"ratio": 1, "floor": 1e-2} | changes.pop("dmd", {})
    config = TrainConfig(
        "ring",
        JointMLPConfig(),
        DMD(ROLLOUT, Guidance(AV(1.0, 1.0)), EVEN, **settings),
        RING,
        steps=60,
        batch_size=64,
        optim=optim,
        roles={"teacher": Role(ExactConfig()), "fake_score": critic},
        init=started,
        ema=None,
        log_every=5,
        save_every=10,
        validate=VITALS,
        validate_every=10,
        health=Health(brightness=None, saturation=None),  # the ring is no picture
    )
    return replace(config, **changes)


def run(config: TrainConfig, out: Path) -> Any:  # noqa: ANN401
    return train(config, out, device="cpu", tensorboard=False)


def test_a_student_that_drops_modes_is_stopped_and_a_healthy_one_is_not(started: str, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"video of different seeds differs by .* \(health\.diversity=0\.5\)") as stopped:
        run(distilling(started, 2e-2), tmp_path / "hasty")
    at = int(str(stopped.value).split()[1].rstrip(":"))
    assert at <= 50 and at == read(tmp_path / "hasty")[-1]["step"]
    # killed and resumed, and begun anew after it stopped, it ends the same way
    run(distilling(started, 2e-2, steps=10), tmp_path / "cut")
    for _ in range(2):
        with pytest.raises(RunError) as again:
            run(distilling(started, 2e-2), tmp_path / "cut")
        assert str(again.value) == str(stopped.value)
    anchored = {"ratio": 2, "anchors": (Consistency(Grid(32), bins=0),)}
    state = run(distilling(started, 2e-3, critic=4e-3, dmd=anchored, steps=40), tmp_path / "healthy")
    assert state.step == 40
    assert imbalance(sampled(Validation.of(state, distilling(started, 2e-3), tmp_path / "samples")), RING) < 0.25


@pytest.mark.slow
def test_all_processes_of_a_run_stop(make: Callable[..., TrainConfig], tmp_path: Path, together: Any) -> None:  # noqa: ANN401
    health = Health(brightness=0.1, patience=1)
    values = iter([0.5, 0.5, 0.9])
    config = make(steps=6, validate=lambda _: {"brightness": next(values)}, validate_every=2, health=health)
    errors = together(2, lambda _: train(config, tmp_path / "run", device="cpu", tensorboard=False))
    assert [type(error) for error in errors] == [RunError, RunError]
    assert all("step 6: the brightness of the samples is 0.9" in str(error) for error in errors)
