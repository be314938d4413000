"""Every term of fidelity on clips whose value is known, and their gradient reaching the student."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from soundstage.core.av import AV
from soundstage.core.batch import Batch
from soundstage.core.conditions import Conditions
from soundstage.core.errors import ConfigError
from soundstage.core.rng import Rng
from soundstage.objectives.base import Sum
from soundstage.objectives.dmd import DMD
from soundstage.objectives.fidelity import (
    Background,
    Fidelity,
    Identity,
    Likeness,
    Noised,
    OwnSample,
    Perceptual,
    Predicted,
    Temporal,
    warped_error,
)
from soundstage.objectives.flow_matching import FlowMatching
from soundstage.objectives.reconstruction import MultiResolutionSTFT, absolute
from soundstage.objectives.regression import Regression, Solved
from soundstage.objectives.rollout import Given
from soundstage.testing.tiny import GaussianLatents, ToyConfig
from soundstage.testing.toy import Blobs


@dataclass(frozen=True)
class Shows:
    """A source of clips that are already there."""

    made: AV[Tensor]
    aim: AV[Tensor]

    def __call__(self, role: str, nets: Any, batch: Batch, given: Given, rng: Rng) -> tuple[AV[Tensor], AV[Tensor]]:  # noqa: ANN401, ARG002
        return self.made, self.aim


def judged(term: Any, made: Tensor, aim: Tensor, **cond: Any) -> float:  # noqa: ANN401
    """The value of a term of the picture for clips (B, C, F, H, W)."""
    batch = Batch(AV(aim), Conditions(**cond), ("",) * len(aim))
    losses = Fidelity((term,), source=Shows(AV(made), AV(aim)), tasks={"t2v": 1.0}).loss(
        "student", {}, batch, Rng.of(0, len(aim))
    )
    (value,) = losses.values()
    assert list(losses) == [f"{term.name}/video"]
    return float(value)


def pattern(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_perceptual_is_the_distance_of_normalised_features() -> None:
    made, aim = torch.zeros(1, 3, 2, 4, 4), torch.zeros(1, 3, 2, 4, 4)
    made[:, 0], aim[:, 1] = 0.5, 0.9
    # orthogonal unit vectors: squared distance 2, in each of two layers
    assert judged(Perceptual(lambda x: [x, 3 * x]), made, aim) == pytest.approx(4.0)
    assert judged(Perceptual(lambda x: x), made, aim) == pytest.approx(2.0)
    assert judged(Perceptual(lambda x: x), 0.1 * aim, aim) == pytest.approx(0.0, abs=1e-6)


def test_perceptual_reads_as_many_frames_as_asked() -> None:
    seen: list[int] = []

    def features(x: Tensor) -> Tensor:
        seen.append(len(x))
        return x

    judged(Perceptual(features, frames=2), pattern(3, 3, 5, 2, 2), pattern(3, 3, 5, 2, 2))
    assert seen == [6, 6]


def rolled(frames: int, size: int = 12) -> Tensor:
    """A pattern that goes one pixel right and two down per frame, (1, 3, F, H, W)."""
    first = pattern(1, 3, size, size)
    return torch.stack([first.roll((2 * f, f), (2, 3)) for f in range(frames)], dim=2)


def going(frames: Tensor, then: Tensor) -> Tensor:
    """One right and two down, the other way round for the way back."""
    forward = float((frames.roll((2, 1), (2, 3)) - then).abs().mean()) < 1e-6
    return torch.tensor([1.0, 2.0] if forward else [-1.0, -2.0])[None, :, None, None].expand(len(frames), 2, 12, 12)


def still(frames: Tensor, then: Tensor) -> Tensor:  # noqa: ARG001
    return torch.zeros(len(frames), 2, *frames.shape[2:])


def test_motion_costs_nothing_and_flicker_does() -> None:
    clip = rolled(3)
    assert float(warped_error(clip, clip, going)) == pytest.approx(0.0, abs=1e-5)
    assert float(warped_error(clip, clip, still)) > 0.3
    flicker = clip + torch.tensor([0.0, 0.2, 0.0])[None, None, :, None, None]
    assert judged(Temporal(going), flicker, clip) == pytest.approx(0.2, abs=1e-5)
    # the flow is wrong, yet a perfect clip costs nothing
    assert judged(Temporal(still), clip, clip) == 0.0
    assert judged(Temporal(still, of="made"), clip * 0, clip) == 0.0


def test_what_the_flow_cannot_return_to_is_hidden() -> None:
    def lost(frames: Tensor, then: Tensor) -> Tensor:  # noqa: ARG001
        return torch.full((len(frames), 2, *frames.shape[2:]), 2.0)

    # there and back are 4 pixels apart on both axes: nothing is seen
    assert float(warped_error(rolled(2), rolled(2), lost)) == 0.0


def test_background_counts_outside_the_grown_mask() -> None:
    aim = pattern(2, 3, 4, 8, 8)
    made = aim.clone()
    made[..., 2:5, 2:5] += 1.0
    mask = torch.zeros(2, 1, 4, 8, 8)
    mask[..., 3, 3] = 1
    assert judged(Background(margin=1), made, aim, mask=AV(mask)) == pytest.approx(0.0)
    # eight of the 63 pixels outside
    assert judged(Background(margin=0), made, aim, mask=AV(mask)) == pytest.approx(8 / 63)
    control = {"control": AV(aim + 0.25), "mask": AV(mask)}
    assert judged(Background("control", margin=1), aim, made, **control) == pytest.approx(0.25)
    with pytest.raises(ConfigError, match="no mask"):
        judged(Background(), made, aim)


def test_a_step_of_the_mask_covers_its_frames() -> None:
    def at(frame: int, *, causal: bool) -> float:
        aim = torch.zeros(1, 3, 9, 4, 4)
        made = aim.clone()
        made[:, :, frame] = 1.0
        mask = torch.tensor([[0.0, 1.0, 0.0]])
        batch = Batch(AV(aim), Conditions(mask=AV(mask)), ("",))
        source = Shows(AV(made), AV(aim))
        objective = Fidelity((Background(margin=0),), source=source, tasks={"t2v": 1.0}, causal_first=causal)
        return float(objective.loss("student", {}, batch, Rng.of(0, 1))["background/video"])

    # frame 0; frames 1 to 4; frames 5 to 8
    assert [at(f, causal=True) > 0 for f in range(9)] == [f not in (1, 2, 3, 4) for f in range(9)]
    assert [at(f, causal=False) > 0 for f in range(9)] == [f not in (3, 4, 5) for f in range(9)]


def mean_colour(x: Tensor) -> Tensor:
    return x.mean((2, 3))


def test_identity_looks_at_the_product_alone() -> None:
    mask = torch.zeros(1, 1, 2, 8, 8)
    mask[:, :, 0, 2:6, 2:6] = 1  # the second frame does not show it
    red, blue = torch.zeros(1, 3, 2, 8, 8), torch.zeros(1, 3, 2, 8, 8)
    red[:, 0], blue[:, 2] = -0.8, -0.8
    inside = mask.expand_as(red) > 0
    # the same product before other backgrounds
    made = torch.where(inside, red, blue)
    term = Identity(mean_colour, size=4, pad=0.0)
    assert judged(term, made, red, mask=AV(mask)) == pytest.approx(0.0, abs=1e-6)
    assert judged(term, blue, red, mask=AV(mask)) == pytest.approx(1.0, abs=1e-5)
    given = Identity(mean_colour, lambda _: red[:, :, 0], size=4, pad=0.0)
    assert judged(given, red, blue, mask=AV(mask)) == pytest.approx(0.0, abs=1e-6)
    # without a mask the frames are the product
    assert judged(Identity(mean_colour, size=4, pad=0.0), made, made) == pytest.approx(0.0, abs=1e-6)


def test_identity_cuts_a_white_square_around_the_product() -> None:
    frames = pattern(1, 3, 1, 10, 16)
    mask = torch.zeros(1, 1, 1, 10, 16)
    mask[..., 3:7, 4:6] = 1
    seen: list[Tensor] = []

    def embed(x: Tensor) -> Tensor:
        seen.append(x)
        return x.flatten(1)

    judged(Identity(embed, size=4, pad=0.0), frames, frames, mask=AV(mask))
    cut = seen[0]
    assert cut.shape == (1, 3, 4, 4)
    assert torch.allclose(cut[..., 1:3], frames[:, :, 0, 3:7, 4:6], atol=1e-5)
    assert torch.allclose(cut[..., [0, 3]], torch.ones(1, 3, 4, 2), atol=1e-5)


class Double(nn.Module):
    """A decoder: each cell of the latents twice as wide."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.5), requires_grad=False)

    def forward(self, latents: AV[Tensor]) -> AV[Tensor]:
        return latents.map(lambda x: self.gain * x.repeat_interleave(2, dim=-1))


def _nets() -> dict[str, Any]:
    torch.manual_seed(0)
    return {name: ToyConfig().build() for name in ("student", "teacher", "fake_score")} | {"decoder": Double()}


TERMS = (
    Perceptual(lambda x: x),
    Temporal(still),
    Likeness("spectral", MultiResolutionSTFT((4, 8))),
    Likeness("pixel", absolute, "video"),
)


@pytest.mark.parametrize("source", [Predicted(Solved(substeps=1)), Predicted(Noised()), OwnSample()])
def test_every_term_reaches_the_student_through_the_decoder(source: Any) -> None:  # noqa: ANN401
    # data that does not flicker, so that all of the student's own counts
    nets, batch = _nets(), GaussianLatents(std=0.0, mean=0.5).batch(0, 2)
    nets["teacher"] = Blobs(GaussianLatents().shape.map(lambda shape: torch.full((1, *shape), 0.5)), std=1e-3)
    objective = Fidelity(TERMS, "decoder", source)
    losses = objective.loss("student", nets, batch, Rng.of(0, 2))
    assert set(losses) == {"perceptual/video", "temporal/video", "spectral/audio", "pixel/video"}
    again = objective.loss("student", nets, batch, Rng.of(0, 2))
    assert all(torch.equal(losses[name], again[name]) for name in losses)
    for name, value in losses.items():
        output = nets["student"].outputs[name.rpartition("/")[2]].weight
        (gradient,) = torch.autograd.grad(value, output, retain_graph=True)
        assert value.ndim == 0 and float(gradient.norm()) > 0, name
    assert nets["decoder"].gain.grad is None


def test_on_the_teachers_end_the_measure_is_the_regression() -> None:
    """The same pairs, so mean squared error of both is one number."""
    nets, batch = _nets(), GaussianLatents().batch(0, 2)
    pairs = Solved(substeps=1)
    square: Callable[[Tensor, Tensor], Tensor] = lambda made, aim: (made - aim).square().mean()  # noqa: E731
    mine = Fidelity((Likeness("square", square, "video"),), source=Predicted(pairs))
    value = mine.loss("student", nets, batch, Rng.of(0, 2))["square/video"]
    plain = Regression(pairs).loss("student", nets, batch, Rng.of(0, 2))["regression/video"]
    assert float(value.detach()) == pytest.approx(float(plain.detach()), rel=1e-5)


def test_a_sum_is_the_first_with_more_for_its_student() -> None:
    nets, batch, rng = _nets(), GaussianLatents().batch(0, 2), Rng.of(0, 2)
    more = Fidelity(TERMS, source=Predicted(Noised()))
    whole, inside, plain = Sum(DMD(), (more,)), DMD(anchors=(more,)), DMD()
    assert [whole.turn(step) for step in range(6)] == [plain.turn(step) for step in range(6)]
    one, two = (objective.loss("student", nets, batch, rng) for objective in (whole, inside))
    assert {name: v.tolist() for name, v in one.items()} == {name: v.tolist() for name, v in two.items()}
    assert "spectral/audio" in one
    critic = whole.loss("fake_score", nets, batch, rng)
    assert critic.keys() == plain.loss("fake_score", nets, batch, rng).keys()
    with pytest.raises(ConfigError, match="two objectives name a term 'flow/audio'"):
        Sum(FlowMatching(), (FlowMatching(),)).loss("student", nets, batch, rng)


def test_what_is_missing_is_named() -> None:
    nets, batch, rng = _nets(), GaussianLatents().batch(0, 2), Rng.of(0, 2)
    with pytest.raises(ConfigError, match=r"no role 'lpips'; the run has student, .*: add it to roles"):
        Fidelity((Perceptual("lpips"),), source=Predicted(Noised())).loss("student", nets, batch, rng)
    with pytest.raises(ConfigError, match="each with a name of its own"):
        Fidelity((Perceptual("a"), Perceptual("b")))
    with pytest.raises(ConfigError, match=r"Temporal\.of: 'mad' is not one of aim, made"):
        Temporal("raft", of="mad")  # type: ignore[arg-type]


def test_sound_alone_leaves_the_picture_out() -> None:
    batch = GaussianLatents(GaussianLatents().shape.only("audio")).batch(0, 2)
    objective = Fidelity(TERMS, source=Predicted(Noised()), tasks={"t2a": 1.0})
    assert list(objective.loss("student", _nets(), batch, Rng.of(0, 2))) == ["spectral/audio"]
