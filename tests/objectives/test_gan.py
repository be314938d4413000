"""Adversarial terms: what they are, whom they move, and what R1 estimates."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from soundstage.core import AV, Conditions, ConfigError, Rng, Uniform
from soundstage.core.flow import noised
from soundstage.core.times import Joint, Listed
from soundstage.models.discriminators import DiscriminatorConfig
from soundstage.models.text.bytes import ByteTextConfig
from soundstage.models.unified_dit import UnifiedDiTConfig
from soundstage.objectives.base import Batch
from soundstage.objectives.dmd import DMD, Guidance
from soundstage.objectives.gan import GAN, approximate_r1, non_saturating, told_apart
from soundstage.objectives.rollout import Given
from soundstage.testing.toy import Heads, JointMLPConfig, QuickRng, rings

NAMES = ("video", "audio")
PLAIN = Guidance(AV(1.0, 1.0))


def networks(features: str = "teacher") -> dict[str, Any]:
    torch.manual_seed(0)
    shape = AV((2, 1, 1, 1), (2, 1))
    nets: dict[str, Any] = {n: JointMLPConfig(shape, width=32).build() for n in ("student", "teacher", "fake_score")}
    nets["discriminator"] = Heads(NAMES, width=32)
    nets["teacher"].requires_grad_(False)
    if features == "teacher":
        nets["fake_score"].requires_grad_(False)
    return nets


def batch(size: int = 64) -> Batch:
    return rings().batch(0, size)


def all_of(x0: AV[Tensor], cond: Conditions | None = None) -> Given:
    return Given(x0, x0.map(lambda x: torch.ones(len(x), x.shape[2])), cond or Conditions())


def test_the_losses() -> None:
    real, fake = torch.tensor([[2.0, -1.0]]), torch.tensor([[0.0, 3.0]])

    def softplus(x: float) -> float:
        return math.log1p(math.exp(x))

    assert float(non_saturating(fake)) == pytest.approx((softplus(0) + softplus(-3)) / 2)
    expected = (softplus(0) + softplus(-2) + softplus(3) + softplus(1)) / 2
    assert float(told_apart(real, fake)) == pytest.approx(expected)
    assert float(approximate_r1(real, real + 0.2, 0.1)) == pytest.approx(4.0, rel=1e-5)


def r1_of(gan: GAN, nets: dict[str, Any], here: Batch, rng: Rng) -> AV[float]:
    terms = gan.discriminator(nets, here.x0, all_of(here.x0), rng)
    return AV(**{name: float(terms[f"r1/{name}"].detach()) for name in NAMES})


@pytest.mark.parametrize("alpha", [0.1, 0.01, 0.001])
def test_the_penalty_is_the_squared_gradient_at_the_noised_data(alpha: float) -> None:
    """Against autograd, over the same samples; noise on clean data told a noisy level is off by far."""
    nets, here, rng = networks(), batch(16384), QuickRng.of(5, 16384)
    gan = GAN(("blocks.1",), times=Joint(AV(Uniform(0.3, 0.7), Uniform(0.3, 0.7)), shared=True), alpha=alpha)
    given = all_of(here.x0)
    t = gan.times(rng, here.x0)
    x_t = noised(here.x0, rng.fold("real").normal_like(here.x0), t).map(lambda x: x.requires_grad_(True))
    logits = gan.logits(nets, x_t, t, given)
    moved = here.x0 + alpha * rng.fold("r1").normal_like(here.x0)
    mismatched = gan.logits(nets, moved, t, given)
    for name, mine in r1_of(gan, nets, here, rng).items():
        slopes = torch.autograd.grad(logits[name].sum(), list(x_t.values()), retain_graph=True)
        exact = float(torch.stack([slope.flatten(1).square().sum(1) for slope in slopes]).sum(0).mean())
        assert mine == pytest.approx(exact, rel=0.05)
        wrong = float(approximate_r1(logits[name], mismatched[name], alpha).mean().detach())
        assert wrong > 10 * exact or alpha == 0.1


def test_no_penalty_without_a_size() -> None:
    terms = GAN(("blocks.0",)).discriminator(networks(), batch().x0, all_of(batch().x0), Rng.of(0, 64))
    assert sorted(terms) == ["discriminator/audio", "discriminator/video"]


def touched(nets: dict[str, Any], terms: dict[str, Tensor]) -> set[str]:
    torch.stack([term for term in terms.values() if term.ndim == 0 and term.requires_grad]).sum().backward()
    return {role for role, net in nets.items() if any(p.grad is not None and p.grad.any() for p in net.parameters())}


@pytest.mark.parametrize("features", ["teacher", "fake_score"])
def test_each_role_moves_whom_it_should(features: str) -> None:
    """With the fake score's features it learns the judgement itself; the engine freezes all but the role's network."""
    objective = DMD(guidance=PLAIN, gan=GAN(("blocks.0", "blocks.1"), features, alpha=0.1))  # type: ignore[arg-type]
    for role in ("student", "fake_score", "discriminator"):
        nets = networks()
        nets["discriminator"] = Heads(NAMES, 2, 32)
        for name, net in nets.items():
            net.requires_grad_(name == role)
        terms = objective.loss(role, nets, batch(), Rng.of(0, 64))
        named = {name.split("/")[0] for name, term in terms.items() if term.ndim == 0}
        expected = {"student": {"dmd", "gan"}, "fake_score": {"fake_score"}, "discriminator": {"discriminator", "r1"}}
        if features == "fake_score":
            expected["fake_score"].add("discriminator")
        assert named == expected[role]
        assert touched(nets, terms) == {role}


def test_the_student_is_moved_through_the_features() -> None:
    """By the chain rule from the heads to the sample; the network is held still."""
    nets, here, gan = networks(), batch(), GAN(("blocks.0",))
    x = here.x0.map(lambda z: z.clone().requires_grad_(True))
    torch.stack(list(gan.student(nets, x, all_of(here.x0), Rng.of(0, 64)).values())).sum().backward()
    assert all(z.grad is not None and z.grad.flatten(1).any(1).all() for z in x.values())


def test_a_level_is_shared_by_fake_and_real() -> None:
    """Heads that only see the level cannot tell them apart."""
    nets, here = networks(), batch()

    class Level(nn.Module):
        def forward(self, features: dict[str, Tensor], weights: AV[Tensor]) -> AV[Tensor]:
            return weights.map(lambda w: features["enter"][: len(w), :1])

    with torch.no_grad():
        nets["teacher"].enter.weight[:, :4] = 0
    nets["discriminator"] = Level()
    terms = GAN(("enter",)).discriminator(nets, here.x0 * 3.0, all_of(here.x0), Rng.of(0, 64))
    gan = GAN(("enter",), times=Joint(AV(Listed((0.5,)), Listed((0.5,)))))
    fixed = gan.discriminator(nets, here.x0 * 3.0, all_of(here.x0), Rng.of(0, 64))
    logit = nets["teacher"].enter(torch.cat([torch.zeros(1, 4), nets["teacher"]._waves(torch.full((1, 2), 0.5))], 1))
    expected = float((F.softplus(logit) + F.softplus(-logit))[0, 0].detach())
    assert float(fixed["discriminator/video"].detach()) == pytest.approx(expected, rel=1e-5)
    assert float(terms["discriminator/video"].detach()) > 2 * math.log(2)


# On the features of a real backbone


def dit() -> tuple[UnifiedDiTConfig, dict[str, Any]]:
    torch.manual_seed(0)
    text = ByteTextConfig(width=16, depth=1, num_heads=2)
    config = UnifiedDiTConfig(width=32, depth=3, num_heads=2, rank=8, text=text, text_inner=16)
    nets: dict[str, Any] = {role: config.build() for role in ("student", "teacher", "fake_score")}
    for net in nets.values():
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    nets["discriminator"] = DiscriminatorConfig(("blocks.0", "blocks.2"), AV(32, 32), hidden=8).build()
    return config, nets


def clips(config: UnifiedDiTConfig, size: int = 2) -> AV[Tensor]:
    """Two latent rows and columns of patches, three frames, six audio steps."""
    video, audio = config.shape["video"], config.shape["audio"]
    return Rng.of(0, size).normal_like(AV(torch.zeros(size, video[0], 3, 4, 4), torch.zeros(size, audio[0], 6)))


@pytest.mark.parametrize("names", [NAMES, ("video",), ("audio",)], ids="+".join)
def test_heads_on_a_transformer(names: tuple[str, ...]) -> None:
    config, nets = dit()
    here = Batch(clips(config).only(*names), Conditions(), ("a", "b"))
    tasks = {"t2av": 1.0}
    objective = DMD(guidance=PLAIN, tasks=tasks, gan=GAN(("blocks.0", "blocks.2"), alpha=0.1))
    for role in ("student", "discriminator"):
        for name, net in nets.items():
            net.requires_grad_(name == role)
        terms = objective.loss(role, nets, here, Rng.of(0, 2))
        kind = "gan" if role == "student" else "discriminator"
        assert {name for name in terms if name.startswith(f"{kind}/")} == {f"{kind}/{name}" for name in names}
        loss = torch.stack([terms[f"{kind}/{name}"] for name in names]).sum()
        found = torch.autograd.grad(loss, list(nets[role].parameters()), allow_unused=True)
        assert any(g is not None and g.any() for g in found)


def masked(config: UnifiedDiTConfig) -> Given:
    """The upper half of the picture is the region; sound has none."""
    x0 = clips(config)
    mask = torch.zeros(2, 1, 3, 4, 4)
    mask[:, :, :, :2] = 1
    return all_of(x0, Conditions(mask=AV(video=mask)))


def test_regions_are_judged_apart() -> None:
    """Two logits per tap for the video, inside and outside of the mask; each moves its own half of the picture more."""
    config, nets = dit()
    given = masked(config)
    x = given.x0.map(lambda z: z.clone().requires_grad_(True))
    t = x.map(lambda _: torch.full((2,), 0.5))
    whole = GAN(("blocks.0", "blocks.2")).logits(nets, x, t, given)
    apart = GAN(("blocks.0", "blocks.2"), regions=True).logits(nets, x, t, given)
    assert {name: tuple(v.shape) for name, v in whole.items()} == {"video": (2, 2), "audio": (2, 2)}
    assert {name: tuple(v.shape) for name, v in apart.items()} == {"video": (2, 4), "audio": (2, 2)}
    torch.testing.assert_close(apart["video"].unflatten(1, (2, 2)).mean(2), whole["video"])
    for name in NAMES:
        torch.testing.assert_close(apart["audio"], whole["audio"], msg=name)


def test_only_what_is_generated_is_judged() -> None:
    """A given first frame has no weight, and samples with the whole modality given no part in the mean."""
    config, nets = dit()
    x0 = clips(config)
    mask = AV((torch.arange(3) > 0).expand(2, -1), torch.tensor([[True] * 6, [False] * 6]))
    given = Given(x0, mask, Conditions())
    weights = GAN(("blocks.0",))._weights(given)
    assert weights["video"].shape == (2, 1, 3, 4, 4) and not weights["video"][:, :, 0].any()
    assert weights["video"][:, :, 1:].all()
    terms = GAN(("blocks.0", "blocks.2")).student(nets, x0, given, Rng.of(0, 2))
    first = Given(x0.map(lambda x: x[:1]), mask.map(lambda m: m[:1]), Conditions())
    alone = GAN(("blocks.0", "blocks.2")).student(nets, first.x0, first, Rng.of(0, 1))
    torch.testing.assert_close(terms["gan/audio"], alone["gan/audio"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"taps": ()}, "GAN.taps: name at least one block"),
        ({"taps": ("blocks.0",), "features": "student"}, "GAN.features: 'student' is not one of teacher, fake_score"),
        ({"taps": ("blocks.0",), "alpha": -1.0}, "GAN.alpha: -1.0 is below 0"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GAN(**settings)
