from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from soundstage.core import (
    APG,
    AV,
    Conditions,
    ConfigError,
    Guided,
    Isolated,
    ModalityError,
    ShapeError,
    cross_modal,
    heun,
    linear,
    skip_layer,
)
from soundstage.testing.analytic import Gaussian

At = Callable[[float], AV[Tensor]]
Denoise = Callable[..., AV[Tensor]]


@pytest.fixture
def negative(text: Conditions) -> Conditions:
    return Conditions(text=AV(**{name: -z[:1, :3] for name, z in text.text.items()}))


def both(modalities: tuple[str, ...], video: float, audio: float) -> AV[float]:
    return AV(video, audio).only(*modalities)


def test_scale_one_is_the_conditional_call(
    toy: Denoise,
    counted: Callable[..., Any],
    x: AV[Tensor],
    text: Conditions,
    negative: Conditions,
    at: At,
) -> None:
    net = counted(toy)
    out = Guided(net, negative, AV(1.0, 1.0), projection=APG())(x, at(0.5), text)
    plain = toy(x, at(0.5), text)
    assert net.batches == [4], "one call of batch B"
    assert all(torch.equal(out[name], plain[name]) for name in x.modalities)


def test_one_batched_call_and_a_scale_per_modality(
    toy: Denoise,
    counted: Callable[..., Any],
    x: AV[Tensor],
    text: Conditions,
    negative: Conditions,
    at: At,
    modalities: tuple[str, ...],
) -> None:
    net = counted(toy)
    scale = both(modalities, 4.0, 2.5)
    out = Guided(net, negative, AV(4.0, 2.5))(x, at(0.5), text)
    assert net.batches == [8]
    strong = toy(x, at(0.5), text)
    told = Conditions(text=negative.text.map(lambda z: torch.cat([z, torch.zeros(1, 2, 3)], 1).expand(4, 5, 3)))
    weak = toy(x, at(0.5), told)
    for name in modalities:
        torch.testing.assert_close(out[name], weak[name] + scale[name] * (strong[name] - weak[name]))


def test_a_scale_of_one_leaves_its_modality_alone(
    toy: Denoise, x: AV[Tensor], text: Conditions, negative: Conditions, at: At
) -> None:
    scale = AV(1.0, 3.0)
    guided, plain = Guided(toy, negative, scale)(x, at(0.5), text), toy(x, at(0.5), text)
    if "video" in x:
        torch.testing.assert_close(guided["video"], plain["video"], rtol=0, atol=1e-15)
    if "audio" in x:
        assert (guided["audio"] - plain["audio"]).abs().min() > 1e-3


def test_guided_gaussians_move_the_mean(
    gaussian: Gaussian, whitened: Callable[[int], AV[Tensor]], modalities: tuple[str, ...]
) -> None:
    """Two Gaussians of one covariance: guidance samples the mean m_neg + s (m_pos - m_neg), exactly."""

    def told(x_t: AV[Tensor], t: AV[Tensor], cond: Conditions, *, r: AV[Tensor] | None = None) -> AV[Tensor]:
        assert r is None and cond.text is not None
        shifts = cond.text.map(lambda z: z.mean((1, 2)))
        return gaussian(x_t - (1.0 - t) * shifts, t, cond) - shifts

    noise = whitened(32).only(*modalities)
    pos = Conditions(text=noise.map(lambda z: z.new_full((32, 1, 1), 1.0)))
    neg = Conditions(text=noise.map(lambda z: z.new_full((1, 1, 1), -0.5)))
    out = heun(Guided(told, neg, AV(3.0, 3.0)), noise, linear(40, noise.map(lambda _: 1.0)), pos)
    for name in modalities:
        expected = gaussian.mean[name] - 0.5 + 3.0 * 1.5
        torch.testing.assert_close(out[name].mean(0), expected, atol=2e-2, rtol=0)


def test_interval(
    toy: Denoise,
    counted: Callable[..., Any],
    x: AV[Tensor],
    text: Conditions,
    negative: Conditions,
    at: At,
) -> None:
    net = counted(toy)
    guided = Guided(net, negative, AV(4.0, 4.0), interval=(0.2, 0.6))
    always = Guided(toy, negative, AV(4.0, 4.0))
    for t, inside in ((0.1, False), (0.2, True), (0.6, True), (0.7, False)):
        expected = (always if inside else toy)(x, at(t), text)
        out = guided(x, at(t), text)
        assert all(torch.equal(out[name], expected[name]) for name in x.modalities)
    assert net.batches == [4, 8, 8, 4], "outside the interval the second half is not computed"


def test_interval_is_per_sample_and_per_step(
    toy: Denoise, x: AV[Tensor], text: Conditions, negative: Conditions
) -> None:
    guided = Guided(toy, negative, AV(4.0, 4.0), interval=(0.2, 0.6))
    mixed = x.map(lambda z: torch.tensor([0.1, 0.4, 0.5, 0.9], dtype=z.dtype))
    out = guided(x, mixed, text)
    plain, always = toy(x, mixed, text), Guided(toy, negative, AV(4.0, 4.0))(x, mixed, text)
    for name in x.modalities:
        assert torch.equal(out[name][[0, 3]], plain[name][[0, 3]])
        assert torch.equal(out[name][[1, 2]], always[name][[1, 2]])
    per_step = x.map(lambda z: torch.full((4, z.shape[2]), 0.4, dtype=z.dtype).index_fill(1, torch.tensor([0]), 0.0))
    out, plain, always = (f(x, per_step, text) for f in (guided, toy, Guided(toy, negative, AV(4.0, 4.0))))
    for name in x.modalities:
        assert torch.equal(out[name][:, :, 0], plain[name][:, :, 0])
        assert torch.equal(out[name][:, :, 1:], always[name][:, :, 1:])


def test_the_negative_takes_over_what_it_does_not_say(
    toy: Denoise,
    counted: Callable[..., Any],
    x: AV[Tensor],
    text: Conditions,
    at: At,
    modalities: tuple[str, ...],
) -> None:
    net = counted(toy)
    positions = x.map(lambda z: torch.rand(4, z.shape[2], dtype=torch.float64))
    reference = torch.rand(4, 2, 3)
    cond = Conditions(text=text.text, positions=positions, reference=reference, control=x)
    Guided(net, Conditions(reference=torch.zeros(1, 2, 3)), AV(2.0, 2.0))(x, at(0.5), cond)
    _, _, seen = net.last
    name = modalities[0]
    assert torch.equal(seen.positions[name], positions[name].repeat(2, 1))
    assert torch.equal(seen.control[name][4:], x[name])
    assert torch.equal(seen.reference, torch.cat([reference, torch.zeros(4, 2, 3)])), "said: no reference"
    assert not seen.text_mask[name][4:].any() and seen.text_mask[name][:4].all(), "no text in the negative"


def test_skip_layer_and_a_weak_negative(
    toy: Denoise, x: AV[Tensor], text: Conditions, negative: Conditions, at: At
) -> None:
    def skipped(x_t: AV[Tensor], t: AV[Tensor], cond: Conditions, *, r: AV[Tensor] | None = None) -> AV[Tensor]:
        return toy(x_t, t, cond, r=r).map(torch.sin)

    strong, weak = toy(x, at(0.5), text), skipped(x, at(0.5), text)
    out = skip_layer(toy, skipped, AV(2.0, 2.0))(x, at(0.5), text)
    ovi = Guided(toy, negative, AV(4.0, 3.0), weak=skipped)(x, at(0.5), text)
    told = Conditions(text=negative.text.map(lambda z: z.expand(4, 3, 3)))
    weak_negative = skipped(x, at(0.5), told)
    scale = AV(4.0, 3.0)
    for name in x.modalities:
        torch.testing.assert_close(out[name], strong[name] + (strong[name] - weak[name]))
        torch.testing.assert_close(ovi[name], weak_negative[name] + scale[name] * (strong[name] - weak_negative[name]))


def test_cross_modal(
    toy: Denoise,
    counted: Callable[..., Any],
    x: AV[Tensor],
    text: Conditions,
    at: At,
    modalities: tuple[str, ...],
) -> None:
    net = counted(toy)
    out = cross_modal(net, AV(3.0, 2.0))(x, at(0.5), text)
    assert net.modalities == [modalities, *((name,) for name in modalities)]
    strong = toy(x, at(0.5), text)
    scale = AV(3.0, 2.0)
    for name in modalities:
        alone = toy(x.only(name), at(0.5).only(name), text.only(name))
        expected = alone[name] + scale[name] * (strong[name] - alone[name])
        torch.testing.assert_close(out[name], expected)


def test_cross_modal_does_nothing_where_the_modalities_are_independent(
    gaussian: Gaussian, x: AV[Tensor], at: At, modalities: tuple[str, ...]
) -> None:
    first = gaussian.mean["video"].numel()
    cov = gaussian.cov.clone()
    cov[:first, first:] = 0
    cov[first:, :first] = 0
    for data, changed in ((Gaussian(gaussian.mean, cov), False), (gaussian, len(modalities) == 2)):
        plain, guided = (f(x, at(0.6), Conditions()) for f in (data, cross_modal(data, AV(3.0, 3.0))))
        for name in modalities:
            assert ((guided[name] - plain[name]).abs().max() > 1e-2) == changed


def test_wrappers_nest(toy: Denoise, x: AV[Tensor], text: Conditions, negative: Conditions, at: At) -> None:
    """Guided(Guided(d, text, s), None, m, weak=w): v = c + m (s - 1) (c - n) + (m - 1) (c - w)."""
    strong = toy(x, at(0.5), text)
    weak = Isolated(toy)(x, at(0.5), text)
    text_guided = Guided(toy, negative, AV(4.0, 4.0))
    delta = text_guided(x, at(0.5), text) - strong
    out = Guided(text_guided, None, AV(2.0, 2.0), weak=Isolated(toy))(x, at(0.5), text)
    for name in x.modalities:
        torch.testing.assert_close(out[name], strong[name] + 2 * delta[name] + (strong[name] - weak[name]))


def test_apg(toy: Denoise, x: AV[Tensor], text: Conditions, negative: Conditions, at: At) -> None:
    plain, strong = Guided(toy, negative, AV(3.0, 3.0))(x, at(0.4), text), toy(x, at(0.4), text)
    same = Guided(toy, negative, AV(3.0, 3.0), projection=APG(eta=1.0))(x, at(0.4), text)
    orthogonal = Guided(toy, negative, AV(3.0, 3.0), projection=APG())(x, at(0.4), text)
    limited = Guided(toy, negative, AV(3.0, 3.0), projection=APG(eta=1.0, limit=0.01))(x, at(0.4), text)
    for name in x.modalities:
        torch.testing.assert_close(same[name], plain[name])
        x0 = (x[name] - 0.4 * strong[name]).flatten(1)
        difference = (-0.4 * (orthogonal[name] - strong[name])).flatten(1)
        torch.testing.assert_close((x0 * difference).sum(1), torch.zeros(4, dtype=x0.dtype), atol=1e-12, rtol=0)
        rms = (0.4 * (limited[name] - strong[name]) / 2).flatten(1).square().mean(1).sqrt()
        assert (rms <= 0.01 + 1e-12).all() and rms.max() > 0.005
        cosine = torch.cosine_similarity(
            (limited[name] - strong[name]).flatten(1), (plain[name] - strong[name]).flatten(1)
        )
        torch.testing.assert_close(cosine, torch.ones(4, dtype=x0.dtype))


def test_apg_with_clean_steps_is_finite(
    toy: Denoise, x: AV[Tensor], text: Conditions, negative: Conditions, at: At
) -> None:
    per_step = x.map(lambda z: torch.full((4, z.shape[2]), 0.4, dtype=z.dtype).index_fill(1, torch.tensor([0]), 0.0))
    guided = Guided(toy, negative, AV(3.0, 3.0), projection=APG(limit=1.0))
    for t in (per_step, at(0.0), at(1.0)):
        assert all(z.isfinite().all() for z in guided(x, t, text).values())


def test_errors(toy: Denoise, x: AV[Tensor], text: Conditions, at: At, modalities: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="negative"):
        Guided(toy, None, AV(2.0, 2.0))
    with pytest.raises(ConfigError, match="interval"):
        Guided(toy, Conditions(), AV(2.0, 2.0), interval=(0.6, 0.2))
    with pytest.raises(ShapeError, match=r"batch 3 fits neither 1 nor the 4"):
        Guided(toy, text.map(lambda z: z[:3]), AV(2.0, 2.0))(x, at(0.5), text)
    if "audio" in modalities:
        with pytest.raises(ModalityError, match="no 'audio' here"):
            Guided(toy, Conditions(), AV(video=2.0))(x, at(0.5), text)


def test_apart_equals_together_and_costs_two_calls() -> None:
    """Two calls of one sample each in place of one of two, with the same answer."""
    sizes: list[int] = []

    def denoiser(x_t: AV, t: AV, cond: Conditions, *, r: AV | None = None) -> AV:  # noqa: ARG001
        sizes.append(x_t.batch)
        return x_t.map(lambda x, words: x * words.mean((1, 2)).reshape(-1, 1, 1, 1, 1), cond.text)

    x, t = AV(video=torch.randn(1, 2, 3, 4, 4)), AV(video=torch.ones(1))
    told = [Conditions(text=AV(video=torch.full((1, 3, 2), value))) for value in (2.0, 0.5)]
    made = [Guided(denoiser, told[1], AV(3.0, 3.0), together=how)(x, t, told[0]) for how in (True, False)]
    torch.testing.assert_close(made[0]["video"], made[1]["video"])
    assert sizes == [2, 1, 1]


def test_joined_conditions_are_the_same_tensors_at_every_step() -> None:
    seen: list[torch.Tensor] = []

    def denoiser(x_t: AV, t: AV, cond: Conditions, *, r: AV | None = None) -> AV:  # noqa: ARG001
        seen.append(cond.text["video"])
        return x_t

    x, t = AV(video=torch.randn(1, 2, 3, 4, 4)), AV(video=torch.ones(1))
    cond, negative = (Conditions(text=AV(video=torch.randn(1, 3, 2))) for _ in range(2))
    guided = Guided(denoiser, negative, AV(3.0, 3.0))
    with torch.no_grad():
        guided(x, t, cond), guided(x, t, cond), guided(x, t, Conditions(text=cond.text))
    assert seen[0] is seen[1]
    assert seen[2] is not seen[0]
    torch.testing.assert_close(seen[2], seen[0])
