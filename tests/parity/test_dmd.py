"""Distribution matching against recorded losses and gradients, without and with a clean first frame (`dmd_ti2v_*`)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from soundstage.core import AV, Conditions, Rng, Uniform, noised, shift, spread, to_x0
from soundstage.objectives.base import Batch
from soundstage.objectives.dmd import DMD, Clamped, Guidance, score_gradient, score_times, surrogate
from soundstage.objectives.rollout import Given, Simulated, warped

STEM = "dmd"
SHIFT = 5.0


def latents(x: Tensor) -> Tensor:
    """Recorded (B, F, C, H, W) as (B, C, F, H, W), and back."""
    return x.transpose(1, 2)


def table() -> Tensor:
    """The noise levels the reference knows, descending."""
    return shift(torch.linspace(1, 0, 1001, dtype=torch.float64)[:-1], SHIFT)


class Stub(nn.Module):
    """The recorded linear network as a Denoiser; it is told the recorded timestep of the level it is asked at."""

    def __init__(self, numbers: Mapping[str, float], w: Tensor, told: tuple[Tensor, Tensor], clean_frame: bool) -> None:
        super().__init__()
        self.a, self.b, self.k = (nn.Parameter(torch.tensor(float(numbers[key]))) for key in ("a", "b", "k"))
        self.w, self.clean_frame = latents(w), clean_frame
        self.levels, self.timesteps = told
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(self, x_t: AV[Tensor], t: AV[Tensor], cond: Conditions, *, r: AV[Tensor] | None = None) -> AV[Tensor]:
        assert r is None and cond.text is not None
        x, level = x_t["video"], t["video"]
        nearest = self.timesteps[(level[..., None] - self.levels).abs().argmin(-1)]
        token = torch.where(level > 0, nearest.trunc() if self.clean_frame else nearest, 0.0).to(x.dtype)
        v = self.a * x + self.b * spread(token / 1000, x) + self.k * cond.text["video"].mean() * self.w
        self.seen.append((x, token, v))
        return AV(video=v)


@dataclass(frozen=True)
class Recorded(Rng):
    """Recorded numbers in place of drawn ones, by the last name of the path."""

    draws: Mapping[str, Tensor] = field(default_factory=dict)

    def normal_like(self, x: AV[Tensor]) -> AV[Tensor]:
        return x.map(lambda _: self.draws[str(self.path[-1])])


@dataclass(frozen=True)
class Fixed:
    """The recorded sample in place of a rollout, and the recorded levels in place of a law."""

    sample: Tensor
    level: Tensor
    steps: int = 1

    def __call__(self, student: object, given: Given, rng: Rng) -> Simulated:  # noqa: ARG002
        x, t = AV(video=self.sample), AV(video=self.level)
        return Simulated(x, x, t, torch.zeros(len(self.sample), dtype=torch.int64))

    def times(self, rng: Rng, x: AV[Tensor]) -> AV[Tensor]:  # noqa: ARG002
        return AV(video=self.level)


class Case:
    """One timestep draw of one file."""

    def __init__(self, vector: Any, draw: int) -> None:  # noqa: ANN401
        get: Callable[[str], Tensor] = vector.tensors.__getitem__
        self.vector, self.draw = vector, draw
        self.clean = vector.tensors.get("in.image_latent")
        self.timestep = get(f"gen{draw}.t")[:, 0].double()
        self.level = table()[(1000 * table() - self.timestep[:, None]).abs().argmin(1)]
        self.x = latents(get("in.x")).clone().requires_grad_(True)
        told = (self.level, self.timestep)
        self.teacher, self.fake = (
            Stub(vector.info[role], get(f"in.w_{role}"), told, self.clean is not None) for role in ("real", "fake")
        )
        # one number for the whole batch in the stub's formula: the two predictions of guidance need calls of their own
        text, negative = (Conditions(text=AV(video=get(f"in.{name}"))) for name in ("cond", "uncond"))
        self.uncond = negative
        guidance = Guidance(AV(1 + self.weight), lambda _: negative, together=False)
        fixed = Fixed(self.x, self.level.float())
        task = {"t2v": 1.0} if self.clean is None else {"i2av": 1.0}
        self.dmd = DMD(fixed, guidance, fixed.times, task)  # type: ignore[arg-type]
        x0 = self.x.detach() if self.clean is None else self._with_frame(self.x.detach())
        frames = x0.shape[2]
        generate = torch.ones(len(x0), frames, dtype=torch.bool)
        self.everything = Given(AV(video=x0), AV(video=generate), text)
        if self.clean is not None:
            generate = torch.arange(frames) > 0
        self.given = Given(AV(video=x0), AV(video=generate.expand(len(x0), -1)), text)
        draws = {"noise": latents(get("in.noise"))}
        self.rng = Recorded(tuple(range(len(x0))), draws=draws)
        self.critic_rng = Recorded(tuple(range(len(x0))), draws={"noise": latents(get("in.critic_noise"))})

    @property
    def nets(self) -> dict[str, Any]:
        return {"student": None, "teacher": self.teacher, "fake_score": self.fake}

    @property
    def weight(self) -> float:
        """w of cond + w (cond - uncond), from the json."""
        told = self.vector.info["guidance"]
        return float(told if isinstance(told, int | float) else told.split("cond + ")[1].split("*")[0])

    def _with_frame(self, x: Tensor) -> Tensor:
        assert self.clean is not None
        return torch.cat([latents(self.clean), x[:, :, 1:]], dim=2)

    def close(self, mine: Tensor, name: str) -> None:
        reference = self.vector.tensors[f"{name}"]
        torch.testing.assert_close(
            mine.detach().to(reference.dtype), reference, **self.vector.tolerance, msg=lambda m: f"{name}: {m}"
        )


@pytest.fixture(params=[0, 1])
def case(vector: Any, request: pytest.FixtureRequest) -> Case:  # noqa: ANN401
    return Case(vector, request.param)


def test_the_law_of_the_levels(case: Case) -> None:
    """Uniform, shifted, clamped, as the reference draws them from a raw integer; both modalities share the draw."""
    law = score_times().laws["video"]
    assert isinstance(law, Clamped) and law.law.law == Uniform()  # type: ignore[attr-defined]
    raw = case.vector.tensors[f"gen{case.draw}.raw_t"].double() / 1000
    frames = case.vector.tensors[f"gen{case.draw}.t"].shape[1]
    case.close(1000 * law(raw)[:, None].expand(-1, frames), f"gen{case.draw}.t")
    assert score_times().shared
    if "table.sigmas" in case.vector.tensors:
        case.close(table(), "table.sigmas")
        case.close(1000 * table(), "table.timesteps")
        case.close(case.level, f"gen{case.draw}.sigma")
    listed = "table.warped_step_list_1000_750_500_250"
    if listed in case.vector.tensors:
        case.close(1000 * torch.tensor(warped(4)["video"]), listed)


def test_the_scores(case: Case) -> None:
    name = f"gen{case.draw}"
    scores = case.dmd.scores(case.nets, AV(video=case.x), case.given, case.rng)
    case.close(latents(scores.fake["video"]), f"{name}.fake_x0")
    noisy = noised(AV(video=case.x), case.rng.fold("noise").normal_like(AV(video=case.x)), AV(video=case.level.float()))
    predictions = {"cond": case.given.cond, "uncond": case.uncond}
    for told, cond in predictions.items():
        v = case.given.around(case.teacher)(noisy, AV(video=case.level.float()), cond)
        x0 = to_x0(noisy, v, AV(video=case.level.float()))
        case.close(latents(x0["video"]), f"{name}.real_x0_{told}")
    if case.clean is None:
        case.close(latents(noisy["video"]), f"{name}.noisy")
        case.close(latents(scores.real["video"]), f"{name}.real_x0_guided")
        return
    for network in (case.fake, case.teacher):
        for x, token, _ in network.seen:
            case.close(latents(x), f"{name}.network_input")
            case.close(per_token(token, case.vector.tensors[f"{name}.t_tokens"]), f"{name}.t_tokens")


def per_token(timesteps: Tensor, like: Tensor) -> Tensor:
    """(B, F) timesteps spread over the tokens of each frame."""
    return timesteps.repeat_interleave(like.shape[1] // timesteps.shape[1], dim=1)


def test_the_students_loss_and_gradient(case: Case) -> None:
    """The reference's means run over the whole clip, a clean frame included, so it is told that all is generated."""
    name, x = f"gen{case.draw}", AV(video=case.x)
    scores = case.dmd.scores(case.nets, x.map(Tensor.detach), case.given, case.rng)
    gradient = score_gradient(x.map(Tensor.detach), scores, case.everything, case.dmd.floor)
    loss = case.everything.terms("dmd", surrogate(x, gradient))["dmd/video"]
    loss.backward()
    assert case.x.grad is not None
    case.close(loss, f"{name}.loss")
    case.close(latents(case.x.grad), f"{name}.grad_x")
    torch.testing.assert_close(case.x.grad, gradient["video"].detach() / case.x.numel(), **case.vector.tolerance)
    if f"{name}.kl_grad" in case.vector.tensors:
        case.close(latents(gradient["video"]), f"{name}.kl_grad")
        case.close(gradient["video"].abs().mean(), f"{name}.grad_mean_abs")


def test_the_masked_loss(case: Case) -> None:
    """The first frame left out of the mean: nothing there, more elsewhere."""
    name, x = f"gen{case.draw}", AV(video=case.x)
    frames = case.x.shape[2]
    scores = case.dmd.scores(case.nets, x.map(Tensor.detach), case.given, case.rng)
    gradient = score_gradient(x.map(Tensor.detach), scores, case.everything, case.dmd.floor)
    later = (torch.arange(frames) > 0).expand(len(case.x), -1)
    loss = Given(case.everything.x0, AV(video=later), Conditions()).terms("dmd", surrogate(x, gradient))["dmd/video"]
    loss.backward()
    assert case.x.grad is not None
    if f"{name}.masked_loss" in case.vector.tensors:
        case.close(loss, f"{name}.masked_loss")
        case.close(latents(case.x.grad), f"{name}.masked_grad_x")
        return
    # at a clean frame both scores say the same: it only dilutes the recorded mean
    case.close(loss * (frames - 1) / frames, f"{name}.loss")
    case.close(latents(case.x.grad) * (frames - 1) / frames, f"{name}.grad_x")


def test_the_objective_as_a_whole(case: Case) -> None:
    """DMD.loss of the student is the recorded loss; a clean frame is left out of the normaliser and of the mean."""
    name, get = f"gen{case.draw}", case.vector.tensors.__getitem__
    batch = Batch(case.given.x0, case.given.cond, ("",) * len(case.x))
    terms = case.dmd.loss("student", case.nets, batch, case.rng)
    terms["dmd/video"].backward()
    assert case.x.grad is not None
    mine = latents(case.x.grad)
    if case.clean is None:
        case.close(terms["dmd/video"], f"{name}.loss")
        case.close(mine, f"{name}.grad_x")
        return
    cond, uncond, fake, x = (
        get(key)[:, 1:] for key in (f"{name}.real_x0_cond", f"{name}.real_x0_uncond", f"{name}.fake_x0", "in.x")
    )
    real = cond + case.weight * (cond - uncond)
    expected = (fake - real) / (x - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    torch.testing.assert_close(mine[:, 1:], expected / expected.numel(), **case.vector.tolerance)
    assert not mine[:, 0].any()


@pytest.mark.parametrize("target", ["flow", "x0"])
def test_the_fake_scores_loss_and_gradient(case: Case, target: str) -> None:
    """The reference's flow loss counts the clean frame with what the network says there, before it is replaced."""
    name = f"critic{case.draw}"
    object.__setattr__(case.dmd, "target", target)
    sample = Simulated(
        AV(video=case.x.detach()), AV(video=case.x), AV(video=case.level), torch.zeros(len(case.x), dtype=torch.int64)
    )
    terms = case.dmd._fake_score(case.nets, case.given, sample, case.critic_rng)
    x, _, v = case.fake.seen[-1]
    level = AV(video=case.level.float())
    noise = case.critic_rng.draws["noise"]
    if case.clean is None:
        loss = terms["fake_score/video"]
        case.close(latents(x), f"{name}.noisy")
    else:
        case.close(latents(x), f"{name}.network_input")
        frames = x.shape[2]
        if target == "x0":
            # nothing is lost at the given frame, but the reference counts it
            loss = terms["fake_score/video"] * (frames - 1) / frames
            replaced = torch.cat([latents(case.clean), case.x.detach()[:, :, 1:]], dim=2)
            loss = loss + (replaced - case.x.detach()).square()[:, :, :1].sum() / x.numel()
        else:
            error = (v - (noise - case.x.detach())).square()
            loss = error[:, :, :1].mean() / frames + terms["fake_score/video"] * (frames - 1) / frames
    case.close(latents(v), f"{name}.pred_flow")
    noisy = noised(AV(video=case.x.detach()), AV(video=noise), level)
    x0 = to_x0(noisy, case.given.around(case.fake)(noisy, level, case.given.cond), level)
    case.close(latents(x0["video"]), f"{name}.pred_x0")
    loss.backward()
    case.close(loss, f"{name}.{target}.loss")
    for key in ("a", "b", "k"):
        gradient = getattr(case.fake, key).grad
        case.close(gradient, f"{name}.{target}.grad_{key}")
