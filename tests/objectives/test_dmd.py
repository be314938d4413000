"""Distribution matching: what its gradient is, exactly, and what it leaves alone."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from soundstage.core import AV, Conditions, ConfigError, Rng, Uniform
from soundstage.core.flow import noised, velocity
from soundstage.core.times import Joint
from soundstage.objectives.base import Batch
from soundstage.objectives.dmd import DMD, Guidance, Scores, score_gradient, surrogate
from soundstage.objectives.gan import GAN
from soundstage.objectives.regression import Regression, Solved
from soundstage.objectives.rollout import Given, Rollout, Simulated
from soundstage.testing.tiny import GaussianLatents, ToyConfig
from soundstage.testing.toy import Blobs, QuickRng, ring

SHAPE = AV((2, 4, 2, 2), (3, 6))
PLAIN = Guidance(AV(1.0, 1.0))
LEVELS = Joint(AV(Uniform(0.02, 0.98), Uniform(0.02, 0.98)), shared=True)


def toy(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return ToyConfig().build()


def networks() -> dict[str, Any]:
    roles = ("student", "teacher", "fake_score")
    return {role: toy(seed).requires_grad_(role == "student") for seed, role in enumerate(roles)}


def batch(size: int = 6, start: int = 0) -> Batch:
    drawn = GaussianLatents(shape=SHAPE).batch(0, start + size)
    return Batch(drawn.x0.map(lambda x: x[start:]), Conditions(), drawn.ids[start:])


def all_of(x0: AV[Tensor], cond: Conditions | None = None) -> Given:
    """Everything of x0 is generated."""
    return Given(x0, x0.map(lambda x: torch.ones(len(x), x.shape[2])), cond or Conditions())


def scores_of(fake: Any, real: Any, x: AV[Tensor], rng: Rng) -> Scores:  # noqa: ANN401
    return DMD(guidance=PLAIN, times=LEVELS).scores({"teacher": real, "fake_score": fake}, x, all_of(x), rng)


def gradients(terms: dict[str, Tensor], module: nn.Module, names: str = "dmd") -> list[Tensor]:
    chosen = [term for name, term in terms.items() if term.ndim == 0 and name.startswith(names)]
    found = torch.autograd.grad(torch.stack(chosen).sum(), list(module.parameters()), allow_unused=True)
    return [torch.zeros(()) if g is None else g for g in found]


# The gradient


def double(blobs: Blobs) -> Blobs:
    return Blobs(blobs.means.map(Tensor.double), blobs.std)


def drawn(blobs: Blobs, size: int, seed: int = 0) -> AV[Tensor]:
    return double(blobs).sample(QuickRng.of(seed, size))


def log_density(blobs: Blobs, x_t: Tensor, t: Tensor) -> Tensor:
    """(B,) log p_t of noised blobs, up to a constant; x_t (B, C, 1, 1, 1)."""
    level = t[:, None, None]
    variance = (1 - level).square() * blobs.std**2 + level.square()
    centred = x_t.flatten(1)[:, None] - (1 - level) * blobs.means["video"].flatten(1)
    return torch.logsumexp((-centred.square() / (2 * variance) - variance.log() / 2).sum(2), dim=1)


def score(blobs: Blobs, x_t: AV[Tensor], t: AV[Tensor]) -> Tensor:
    x = x_t["video"].detach().requires_grad_(True)
    return torch.autograd.grad(log_density(blobs, x, t["video"]).sum(), x)[0]


def test_the_exact_velocity_is_that_of_the_score() -> None:
    """v = -(x + t score) / (1 - t), the score by differentiating log p_t."""
    blobs, t = double(ring()), AV(torch.linspace(0.02, 0.98, 64, dtype=torch.float64))
    x_t = noised(drawn(ring(), 64), QuickRng.of(1, 64).normal_like(drawn(ring(), 64)), t)
    level = t["video"].reshape(-1, 1, 1, 1, 1)
    expected = -(x_t["video"] + level * score(blobs, x_t, t)) / (1 - level)
    torch.testing.assert_close(blobs(x_t, t, Conditions())["video"], expected, rtol=1e-10, atol=1e-10)


def test_the_difference_of_predictions_is_that_of_the_scores() -> None:
    """x0_fake - x0_real = t^2 / (1 - t) (score_fake - score_real)."""
    real, fake = double(ring()), double(ring(5, 1.5, 0.3))
    scores = scores_of(fake, real, drawn(ring(), 256), QuickRng.of(2, 256))
    level = scores.t["video"].double().reshape(-1, 1, 1, 1, 1)
    difference = score(fake, scores.x_t, scores.t.to(torch.float64)) - score(
        real, scores.x_t, scores.t.to(torch.float64)
    )
    expected = level.square() / (1 - level) * difference
    torch.testing.assert_close(scores.gap["video"], expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close((scores.fake - scores.real)["video"], scores.gap["video"], rtol=1e-12, atol=1e-12)


def test_the_derivative_of_the_surrogate_is_the_difference_of_the_predictions() -> None:
    x = drawn(ring(), 32)
    scores = scores_of(double(ring(5, 1.5)), double(ring()), x, QuickRng.of(2, 32))
    moved = x.map(lambda z: z.requires_grad_(True))
    (slope,) = torch.autograd.grad(surrogate(moved, scores.gap)["video"].sum(), [moved["video"]])
    torch.testing.assert_close(slope, (scores.fake - scores.real)["video"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(surrogate(moved, scores.gap)["video"], scores.gap["video"].square() / 2)
    # also where x is so large that x - g would lose all of g
    far = AV(torch.full((1, 2, 1, 1, 1), 3e8, requires_grad=True))
    small = AV(torch.full((1, 2, 1, 1, 1), 0.7))
    assert torch.equal(torch.autograd.grad(surrogate(far, small)["video"].sum(), [far["video"]])[0], small["video"])


def test_it_is_the_slope_of_the_divergence() -> None:
    """For samples shifted by mu, by finite difference: d KL(q_t or p_t) / d mu = (1 - t) E[score_fake - score_real]."""
    count, mu, step = 40_000, torch.tensor([0.3, -0.2], dtype=torch.float64), 1e-3
    real = double(ring(4))
    base = drawn(ring(4), count)
    noise = QuickRng.of(3, count).normal_like(base)
    for level in (0.2, 0.5):
        t = AV(torch.full((count,), level, dtype=torch.float64))
        fake = Blobs(AV(real.means["video"] + mu[:, None, None, None]), real.std)
        x_t = noised(base + mu[:, None, None, None], noise, t)
        gap = t * (real(x_t, t, Conditions()) - fake(x_t, t, Conditions()))
        mine = ((1 - level) ** 2 / level**2 * gap["video"]).flatten(1).mean(0)

        def divergence(by: Tensor, x_t: AV[Tensor] = x_t, t: AV[Tensor] = t, level: float = level) -> Tensor:
            """Up to the entropy of q_t, which a shift leaves alone."""
            return -log_density(real, x_t["video"] + (1 - level) * by[:, None, None, None], t["video"]).mean()

        axes = step * torch.eye(2, dtype=torch.float64)
        expected = torch.stack([(divergence(a) - divergence(-a)) / (2 * step) for a in axes])
        assert float((mine - expected).norm() / expected.norm()) < 0.1, level


@pytest.mark.parametrize("task", ["t2av", "i2av", "a2v", "t2v"])
def test_where_the_scores_agree_nothing_moves(task: str) -> None:
    nets = networks()
    nets["fake_score"] = nets["teacher"]
    terms = DMD(guidance=PLAIN, tasks={task: 1.0}).loss("student", nets, batch(), Rng.of(0, 6))
    assert all(float(term.detach()) == 0 for name, term in terms.items() if term.ndim == 0)
    assert not any(g.any() for g in gradients(terms, nets["student"]))


def test_samples_go_where_the_teachers_are() -> None:
    """A sample beside the data: minus the gradient leads back, for nearly all and exactly so in the mean."""
    shift = torch.tensor([0.25, 0.0])[:, None, None, None]
    real = Blobs(AV(torch.zeros(1, 2, 1, 1, 1)), 1.0)
    fake = Blobs(AV(real.means["video"] + shift), 1.0)
    x = fake.sample(QuickRng.of(0, 4096))
    g = score_gradient(x, scores_of(fake, real, x, QuickRng.of(1, 4096)), all_of(x), 1e-2)["video"].flatten(1)
    assert float((g[:, 0] > 0).float().mean()) > 0.9
    mean = g.mean(0)
    assert float(mean[1].abs()) < 1e-3 * float(mean[0])


# The normaliser


Gradient = Callable[[AV[Tensor], Scores, Given, float], AV[Tensor]]


def made(fake: float = 1.0, off: float = 0.5) -> tuple[AV[Tensor], Scores]:
    """Six samples at t = 1/2, the teacher's predictions `off` away, the fake score's `fake` further."""
    x = batch().x0
    t = x.map(lambda _: torch.full((6,), 0.5))
    return x, Scores(x, t, x.map(lambda z: torch.full_like(z, 2 * (off - fake))), x.map(lambda z: z * 0 + 2 * off))


def far(x: AV[Tensor], scores: Scores) -> tuple[AV[Tensor], Scores]:
    """The video of the first sample a hundred times too far away."""
    video = x["video"].clone()
    video[0] += 100.0
    return x.replace(video=video), scores


def ignores_other_samples(gradient: Gradient) -> bool:
    usual, odd = (gradient(x, scores, all_of(x), 1e-3) for x, scores in (made(), far(*made())))
    return torch.equal(usual["video"][1:], odd["video"][1:]) and not torch.equal(usual["video"][0], odd["video"][0])


def ignores_the_other_modality(gradient: Gradient) -> bool:
    usual, odd = (gradient(x, scores, all_of(x), 1e-3) for x, scores in (made(), far(*made())))
    return torch.equal(usual["audio"], odd["audio"])


def has_no_scale(gradient: Gradient) -> bool:
    """Scores a hundred times as far from the samples and from each other pull no harder."""
    near, wide = (gradient(x, scores, all_of(x), 1e-3) for x, scores in (made(), made(100.0, 50.0)))
    return all(torch.allclose(wide[name], near[name], rtol=1e-4) for name in wide.modalities)


def is_bounded(gradient: Gradient) -> bool:
    """Also where the samples are the teacher's predictions; by |fake - real| / floor."""
    x, scores = made(off=0.0)
    g = gradient(x, scores, all_of(x), 2.0**-10)
    within = all(bool((g[n].abs() <= 2.0**10 * scores.gap[n].abs()).all()) for n in g.modalities)
    return within and all(bool(value.isfinite().all()) for value in surrogate(x, g).values())


def over_the_batch(x: AV[Tensor], scores: Scores, given: Given, floor: float) -> AV[Tensor]:  # noqa: ARG001
    """One mean over all samples of a modality."""
    return scores.gap / (x - scores.real).map(lambda d: d.abs().mean().clamp_min(floor))


def over_both(x: AV[Tensor], scores: Scores, given: Given, floor: float) -> AV[Tensor]:
    """One mean over both modalities of a sample."""
    mean = torch.stack(list(given.means((x - scores.real).map(torch.abs)).values())).mean(0).clamp_min(floor)
    return scores.gap / x.map(lambda _: mean)


def by_nothing(x: AV[Tensor], scores: Scores, given: Given, floor: float) -> AV[Tensor]:  # noqa: ARG001
    return scores.gap


def without_a_floor(x: AV[Tensor], scores: Scores, given: Given, floor: float) -> AV[Tensor]:  # noqa: ARG001
    """Division by 0, hidden: 3.4e38, and an infinite loss."""
    return (scores.gap / given.means((x - scores.real).map(torch.abs))).map(torch.nan_to_num)


PROPERTIES = (ignores_other_samples, ignores_the_other_modality, has_no_scale, is_bounded)


@pytest.mark.parametrize("holds", PROPERTIES)
def test_the_normaliser(holds: Callable[[Gradient], bool]) -> None:
    assert holds(score_gradient)


@pytest.mark.parametrize(
    ("wrong", "broken"),
    [
        (over_the_batch, ignores_other_samples),
        (over_both, ignores_the_other_modality),
        (by_nothing, has_no_scale),
        (without_a_floor, is_bounded),
    ],
)
def test_wrong_normalisers_are_told(wrong: Gradient, broken: Callable[[Gradient], bool]) -> None:
    assert not broken(wrong)


def test_its_size_does_not_depend_on_how_much_is_given() -> None:
    x = AV(torch.randn(3, 2, 4, 2, 2))
    t = AV(torch.full((3,), 0.5))
    scores = Scores(x, t, AV(torch.ones_like(x["video"])), AV(torch.full_like(x["video"], 3.0)))
    later = Given(x, AV((torch.arange(4) > 0).expand(3, -1)), Conditions())
    g = score_gradient(x, scores, later, 1e-3)
    expected = scores.gap["video"] / (x - scores.real)["video"][:, :, 1:].abs().mean((1, 2, 3, 4), keepdim=True)
    torch.testing.assert_close(g["video"], expected)


# What is left alone


@pytest.mark.parametrize(("task", "frozen", "moving"), [("a2v", "audio", "video"), ("v2a", "video", "audio")])
def test_a_given_modality_has_no_loss_and_moves_nothing(task: str, frozen: str, moving: str) -> None:
    nets = networks()
    for role, name in (("student", "dmd"), ("fake_score", "fake_score")):
        nets[role].requires_grad_(True)
        terms = DMD(guidance=PLAIN, tasks={task: 1.0}).loss(role, nets, batch(), Rng.of(0, 6))
        assert float(terms[f"{name}/{frozen}"].detach()) == 0 and float(terms[f"{name}/{moving}"].detach()) > 0
        found = dict(zip(dict(nets[role].named_parameters()), gradients(terms, nets[role], name), strict=True))
        assert not found[f"outputs.{frozen}.weight"].any() and found[f"outputs.{moving}.weight"].any()


def test_a_modality_that_the_task_leaves_out_has_no_term() -> None:
    terms = DMD(guidance=PLAIN, tasks={"t2v": 1.0}).loss("student", networks(), batch(), Rng.of(0, 6))
    assert not [name for name in terms if "audio" in name]
    assert "dmd/video" in terms


def test_a_clean_first_frame_counts_nowhere() -> None:
    """Its value reaches the terms only as what the networks see, which here is each frame by itself."""
    nets, here = networks(), batch()
    other = here.x0["video"].clone()
    other[:, :, 0] += 5.0
    changed = Batch(here.x0.replace(video=other), here.cond, here.ids)
    objective = DMD(guidance=PLAIN, tasks={"i2av": 1.0})
    for role in ("student", "fake_score"):
        a, b = (objective.loss(role, nets, each, Rng.of(0, 6)) for each in (here, changed))
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_no_data_is_used() -> None:
    """Without a task that gives something, latents tell no more than their shape."""
    nets, here = networks(), batch()
    other = Batch(here.x0.map(torch.zeros_like), here.cond, here.ids)
    for role in ("student", "fake_score"):
        a, b = (DMD(guidance=PLAIN).loss(role, nets, each, Rng.of(0, 6)) for each in (here, other))
        assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("role", ["student", "fake_score"])
def test_each_role_moves_itself_alone(role: str) -> None:
    nets = {name: net.requires_grad_(True) for name, net in networks().items()}
    terms = DMD(guidance=PLAIN).loss(role, nets, batch(), Rng.of(0, 6))
    sum(term for term in terms.values() if term.ndim == 0).backward()  # type: ignore[union-attr]
    touched = {name for name, net in nets.items() if any(p.grad is not None for p in net.parameters())}
    assert touched == {role}


# Guidance


class Told(nn.Module):
    """v = the mean of the text of each modality, everywhere."""

    def forward(self, x_t: AV[Tensor], t: AV[Tensor], cond: Conditions, *, r: AV[Tensor] | None = None) -> AV[Tensor]:
        assert r is None and t.modalities == x_t.modalities and cond.text is not None
        return x_t.map(lambda x, text: text.mean((1, 2)).reshape(-1, *(1,) * (x.ndim - 1)).expand_as(x), cond.text)


@pytest.mark.parametrize("together", [True, False])
def test_each_modality_has_its_own_negative_and_scale(together: bool) -> None:
    """v + (scale - 1) (v - v_negative): 5 + 3 (5 - 1) for video, 7 + 2 (7 - 3) for audio; none for the fake score."""

    def text(video: float, audio: float, size: int) -> Conditions:
        return Conditions(text=AV(torch.full((size, 2, 4), video), torch.full((size, 2, 4), audio)))

    guidance = Guidance(AV(4.0, 3.0), lambda _: text(1.0, 3.0, 1), together=together)
    x0 = batch().x0
    scores = DMD(guidance=guidance).scores(
        {"teacher": Told(), "fake_score": Told()}, x0, all_of(x0, text(5.0, 7.0, 6)), Rng.of(0, 6)
    )
    for name, real, fake in (("video", 17.0, 5.0), ("audio", 15.0, 7.0)):
        assert torch.equal(scores.v_real[name], torch.full_like(x0[name], real))
        assert torch.equal(scores.v_fake[name], torch.full_like(x0[name], fake))


# The fake score


@dataclass(frozen=True)
class Made:
    """A recorded sample in place of a rollout."""

    x0: AV[Tensor]
    steps: int = 1

    def __call__(self, student: object, given: Given, rng: Rng) -> Simulated:  # noqa: ARG002
        t = self.x0.map(lambda x: torch.ones(len(x)))
        return Simulated(self.x0, self.x0, t, torch.zeros(len(rng), dtype=torch.int64))


@pytest.mark.parametrize("target", ["flow", "x0"])
def test_the_fake_score_learns_the_students_samples(target: str) -> None:
    """Flow matching on them, at levels and noise of its own; as x0 the error is t times as large."""
    x, rng, nets = batch().x0, Rng.of(0, 6), networks()
    objective = DMD(Made(x), PLAIN, LEVELS, target=target)  # type: ignore[arg-type]
    terms = objective.loss("fake_score", nets, batch(), rng)
    t, noise = LEVELS(rng.fold("score"), x), rng.fold("score", "noise").normal_like(x)
    error = nets["fake_score"](noised(x, noise, t), t, Conditions()) - velocity(x, noise)
    if target == "x0":
        error = t * error
    for name, e in error.items():
        torch.testing.assert_close(terms[f"fake_score/{name}"], e.square().mean())


# Turns, parts, reports


@pytest.mark.parametrize("gan", [None, GAN(("blocks.0",))])
def test_two_time_scales_and_a_warm_up(gan: GAN | None) -> None:
    others = ("fake_score",) if gan is None else ("fake_score", "discriminator")
    turns = [DMD(ratio=5, warmup=7, gan=gan).turn(step) for step in range(30)]
    assert [step for step, roles in enumerate(turns) if "student" in roles] == [7, 12, 17, 22, 27]
    assert all(roles in (others, ("student", *others)) for roles in turns)
    assert all(DMD(ratio=1).turn(step)[0] == "student" for step in range(5))


@pytest.mark.parametrize("role", ["student", "fake_score"])
def test_micro_batches_add_up_to_the_batch(role: str) -> None:
    """The same exit, and numbers by sample: halves give the mean of their terms and gradients."""
    nets = networks()
    nets[role].requires_grad_(True)
    objective = DMD(guidance=PLAIN, tasks={"i2av": 1.0})
    rngs = (Rng.of(4, 6), Rng.of(4, 3), Rng.of(4, 3, start=3))
    whole, *halves = (
        objective.loss(role, nets, part, rng.fold("step", 9, role))
        for part, rng in zip((batch(), batch(3), batch(3, 3)), rngs, strict=True)
    )
    name = "dmd" if role == "student" else "fake_score"
    all_, one, two = (gradients(terms, nets[role], name) for terms in (whole, *halves))
    for a, b, c in zip(all_, one, two, strict=True):
        torch.testing.assert_close(a, (b + c) / 2, rtol=1e-5, atol=1e-6)
    if role == "student":
        exits = [[float(terms[f"exit/{k}"][0] / terms[f"exit/{k}"][1]) for k in range(4)] for terms in (whole, *halves)]
        assert exits[0] == exits[1] == exits[2] and sorted(exits[0]) == [0, 0, 0, 1]


def test_reports_say_how_far_the_scores_are_apart() -> None:
    nets = networks()
    objective = DMD(Rollout(each=True), PLAIN)
    terms = objective.loss("student", nets, batch(), Rng.of(0, 6))
    read = {name: term.tolist() for name, term in terms.items() if term.ndim == 1}
    reports = {name: total / count for name, (total, count) in read.items() if count}
    assert sum(reports[f"exit/{k}"] for k in range(4)) == pytest.approx(1)
    by_exit = sum(read[f"dmd/video/exit{k}"][0] for k in range(4)) / 6
    assert by_exit == pytest.approx(float(terms["dmd/video"].detach()))
    with torch.no_grad():
        sample = objective.rollout(nets["student"], all_of(batch().x0), Rng.of(0, 6).fold("rollout"))
        scores = objective.scores(nets, sample.x0, all_of(sample.x0), Rng.of(0, 6).fold("score"))
    expected = {"gap": scores.gap, "error/fake": sample.x0 - scores.fake, "error/teacher": sample.x0 - scores.real}
    for name, value in expected.items():
        assert reports[f"{name}/audio"] == pytest.approx(float(value["audio"].abs().mean()), rel=1e-5)


# Anchors


def test_anchors_add_their_terms() -> None:
    nets, rng = networks(), Rng.of(0, 6)
    anchor = Regression(Solved(substeps=2))
    alone, anchored = (DMD(guidance=PLAIN, anchors=a).loss("student", nets, batch(), rng) for a in ((), (anchor,)))
    extra = anchor.loss("student", nets, batch(), rng.fold("anchor", 0))
    assert anchored.keys() == alone.keys() | extra.keys()
    assert all(torch.equal(anchored[name], value) for name, value in {**alone, **extra}.items())
    fake = DMD(guidance=PLAIN, anchors=(anchor,)).loss("fake_score", nets, batch(), rng)
    assert not [name for name in fake if "regression" in name]
    with pytest.raises(ConfigError, match=r"two objectives name a term 'regression/audio'"):
        DMD(guidance=PLAIN, anchors=(anchor, anchor)).loss("student", nets, batch(), rng)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": "v"}, "DMD.target: 'v' is not one of flow, x0"),
        ({"floor": 0.0}, "DMD.floor: 0.0 must be above 0"),
        ({"ratio": 0}, "ratio 0 must be at least 1"),
        ({"warmup": -1}, "warmup -1 at least 0"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DMD(**settings)
