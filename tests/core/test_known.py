from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from soundstage.core import AV, SAMPLERS, Conditions, Guided, Known, Rng, ShapeError, held, linear, shifted, spread
from soundstage.testing.analytic import Gaussian

At = Callable[[float], AV[Tensor]]
Denoise = Callable[..., AV[Tensor]]


@pytest.fixture
def latents(x: AV[Tensor]) -> AV[Tensor]:
    return x.map(torch.cos)


def first_step_kept(x: AV[Tensor]) -> AV[Tensor]:
    """Per-step masks: the first latent step is given, the rest generated."""
    return x.map(lambda z: torch.ones(z.shape[0], z.shape[2]).index_fill(1, torch.tensor([0]), 0.0))


@pytest.mark.parametrize("full", [False, True], ids=["per step", "per cell"])
def test_an_empty_mask_is_the_identity(
    toy: Denoise,
    counted: Callable[..., Any],
    x: AV[Tensor],
    latents: AV[Tensor],
    text: Conditions,
    at: At,
    full: bool,
) -> None:
    net = counted(toy)
    mask = x.map(lambda z: torch.ones_like(z) if full else torch.ones(z.shape[0], z.shape[2]))
    known = Known(net, latents, mask)
    out, plain = known(x, at(0.5), text, r=at(0.2)), toy(x, at(0.5), text)
    assert all(torch.equal(out[name], plain[name]) for name in x.modalities)
    assert net.last[1]["video" if "video" in x else "audio"].shape == (4,)
    assert all(torch.equal(a, b) for a, b in zip(known.keep(x).values(), x.values(), strict=True))
    times = shifted(4, x.map(lambda _: 5.0))
    for sampler in SAMPLERS.values():
        a, b = (sampler(d, x, times, text, rng=Rng.of(0, 4)) for d in (known, toy))
        assert all(torch.equal(a[name], b[name]) for name in x.modalities)


def test_kept_steps_enter_clean_at_zero(
    toy: Denoise,
    counted: Callable[..., Any],
    x: AV[Tensor],
    latents: AV[Tensor],
    text: Conditions,
    at: At,
) -> None:
    net = counted(toy)
    seen_r: list[AV[Tensor]] = []

    def with_r(x_t: AV[Tensor], t: AV[Tensor], cond: Conditions, *, r: AV[Tensor] | None = None) -> AV[Tensor]:
        seen_r.append(r)
        return net(x_t, t, cond, r=r)

    out = Known(with_r, latents, first_step_kept(x))(x, at(0.5), text, r=at(0.25))
    entered, t, _ = net.last
    free = toy(entered, t, text)
    for name in x.modalities:
        assert torch.equal(entered[name][:, :, 0], latents[name][:, :, 0])
        assert torch.equal(entered[name][:, :, 1:], x[name][:, :, 1:])
        for level, value in ((t[name], 0.5), (seen_r[0][name], 0.25)):
            assert level.shape == (4, x[name].shape[2]) and level.dtype == torch.float64
            assert (level[:, 0] == 0).all() and (level[:, 1:] == value).all()
        torch.testing.assert_close(out[name][:, :, 0], (x[name] - latents[name])[:, :, 0] / 0.5)
        assert torch.equal(out[name][:, :, 1:], free[name][:, :, 1:])


@pytest.mark.parametrize("name", [*SAMPLERS])
def test_every_sampler_ends_on_the_known_part(
    toy: Denoise, x: AV[Tensor], latents: AV[Tensor], text: Conditions, name: str
) -> None:
    known = Known(toy, latents, first_step_kept(x))
    out = SAMPLERS[name](known, x, shifted(5, x.map(lambda _: 5.0)), text, rng=Rng.of(0, 4))
    exact = known.keep(out)
    for key in x.modalities:
        torch.testing.assert_close(out[key][:, :, 0], latents[key][:, :, 0], atol=1e-12, rtol=0)
        assert torch.equal(exact[key][:, :, 0], latents[key][:, :, 0])
        assert torch.equal(exact[key][:, :, 1:], out[key][:, :, 1:])


@pytest.mark.parametrize("modalities", [("video", "audio"), ("video",)], indirect=True)
@pytest.mark.parametrize("name", ["euler", "heun", "unipc", "dpmpp_2m"])
def test_kept_cells_enter_at_the_level_of_their_step(
    toy: Denoise,
    counted: Callable[..., Any],
    x: AV[Tensor],
    latents: AV[Tensor],
    text: Conditions,
    name: str,
) -> None:
    """Inpainting: at every step the network sees (1 - t) known + t noise at single kept cells."""
    mask = torch.ones(4, 1, 3, 1, 2)
    mask[..., 1] = 0
    mask[:, :, 2] = 0
    net = counted(toy)
    known = Known(net, latents.only("video"), AV(video=mask))
    seen: list[tuple[Tensor, Tensor]] = []

    def watched(x_t: AV[Tensor], t: AV[Tensor], cond: Conditions, *, r: AV[Tensor] | None = None) -> AV[Tensor]:
        out = known(x_t, t, cond, r=r)
        entered, level, _ = net.last
        seen.append((entered["video"], level["video"]))
        return out

    out = SAMPLERS[name](watched, x, shifted(5, x.map(lambda _: 3.0)), text)
    goal = latents["video"]
    for entered, level in seen:
        assert (level[:, 2] == 0).all() and torch.equal(entered[:, :, 2], goal[:, :, 2]), "kept whole: clean"
        t = level[0, 0]
        assert (level[:, :2] == t).all()
        expected = (1 - t) * goal + t * x["video"]
        torch.testing.assert_close(entered[:, :, :2, :, 1], expected[:, :, :2, :, 1])
    torch.testing.assert_close(out["video"][..., 1], goal[..., 1], atol=1e-12, rtol=0)
    assert (out["video"][:, :, :2, :, 0] - goal[:, :, :2, :, 0]).abs().min() > 1e-6


@pytest.mark.parametrize("name", ["heun", "unipc", "dpmpp_2m"])
def test_the_rest_follows_the_conditional(
    gaussian: Gaussian,
    whitened: Callable[[int], AV[Tensor]],
    flat: Callable[[AV[Tensor]], Tensor],
    modalities: tuple[str, ...],
    name: str,
) -> None:
    """Steps given in a correlated Gaussian: the others are sampled from p(others | given), in closed form."""
    noise = whitened(64).only(*modalities)
    value = gaussian.sample(Rng.of(0, 1)).only(*modalities)
    mask = first_step_kept(noise)
    known = Known(gaussian, value.map(lambda z: z.expand(64, *z.shape[1:])), mask)
    out = flat(known.keep(SAMPLERS[name](known, noise, linear(60, noise.map(lambda _: 1.0)), Conditions())))
    kept = flat(noise.map(lambda z, m: (spread(m, z) == 0).expand_as(z), mask))[0]
    whole = flat(gaussian.mean.map(lambda m: m[None]).only(*modalities))[0]
    sizes = {key: m.numel() for key, m in gaussian.mean.items()}
    here = torch.cat([torch.full((size,), key in modalities) for key, size in sizes.items()])
    cov = gaussian.cov[here][:, here]
    a, b = ~kept, kept
    gain = cov[a][:, b] @ torch.linalg.inv(cov[b][:, b])
    mean = whole[a] + gain @ (flat(value)[0, b] - whole[b])
    torch.testing.assert_close(out[:, a].mean(0), mean, atol=1e-2, rtol=0)
    torch.testing.assert_close(out[:, a].T.cov(correction=0), cov[a][:, a] - gain @ cov[b][:, a], atol=2e-2, rtol=0)
    assert torch.equal(out[:, b], flat(value)[0, b].expand(64, -1))


def test_time_per_step_equals_time_per_sample(toy: Denoise, gaussian: Gaussian, x: AV[Tensor], at: At) -> None:
    per_step = x.map(lambda z: torch.full((4, z.shape[2]), 0.3, dtype=z.dtype))
    for denoiser in (toy, gaussian):
        a, b = denoiser(x, at(0.3), Conditions()), denoiser(x, per_step, Conditions())
        assert all(torch.equal(a[name], b[name]) for name in x.modalities)


def test_only_one_modality_known(
    toy: Denoise, counted: Callable[..., Any], x: AV[Tensor], text: Conditions, at: At
) -> None:
    net = counted(toy)
    known = Known(net, AV(video=torch.zeros(4, 2, 3, 1, 2)), AV(video=torch.zeros(4, 3)))
    out = known(x, at(0.5), text)
    _, t, _ = net.last
    if "audio" in x:
        assert t["audio"].shape == (4,)
    if "video" in x:
        assert (t["video"] == 0).all() and t["video"].shape == (4, 3)
        torch.testing.assert_close(out["video"], 2 * x["video"].double())


def test_zero_time_is_finite(toy: Denoise, x: AV[Tensor], latents: AV[Tensor], text: Conditions, at: At) -> None:
    out = Known(toy, latents, first_step_kept(x))(x, at(0.0), text)
    for name in x.modalities:
        assert out[name].isfinite().all() and (out[name][:, :, 0] == 0).all()


def test_around_guidance_and_a_held_modality(
    toy: Denoise, x: AV[Tensor], latents: AV[Tensor], text: Conditions
) -> None:
    guided = Guided(toy, Conditions(), AV(3.0, 2.0))
    known = Known(guided, latents, first_step_kept(x))
    times = linear(3, x.map(lambda _: 1.0))
    if len(x.modalities) == 2:
        times = held(times, "audio", 0.0)
    out = known.keep(SAMPLERS["unipc"](known, x, times, text))
    assert all(z.isfinite().all() for z in out.values())
    if len(x.modalities) == 2:
        assert torch.equal(out["audio"][:, :, 1:], x["audio"][:, :, 1:])
    with pytest.raises(ShapeError, match="wrap Known around guidance"):
        inside = Guided(Known(toy, latents, first_step_kept(x)), Conditions(), AV(3.0, 2.0))
        inside(x, x.map(lambda _: torch.ones(4)), text)


def test_masks_must_fit(toy: Denoise, x: AV[Tensor], latents: AV[Tensor]) -> None:
    with pytest.raises(ShapeError, match=r"Known\.mask: \(4, 9\) fits neither the latent steps"):
        Known(toy, latents, x.map(lambda _: torch.ones(4, 9)))
    bools = first_step_kept(x).map(lambda m: m.bool())
    assert Known(toy, latents, bools).partly == x.modalities
