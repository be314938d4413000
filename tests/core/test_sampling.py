"""Samplers on closed-form data: order of convergence, moments of the samples, conditionals, held modalities."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from soundstage.core import (
    AV,
    SAMPLERS,
    Conditions,
    ConfigError,
    ModalityError,
    Rng,
    explicit,
    held,
    linear,
    renoise,
    shifted,
    to_x0,
)
from soundstage.testing.analytic import Gaussian, Mixture

Flat = Callable[[AV[Tensor]], Tensor]
At = Callable[[float], AV[Tensor]]
DETERMINISTIC = ["euler", "heun", "unipc", "dpmpp_2m"]
SECOND_ORDER = ["heun", "unipc", "dpmpp_2m"]


def slope(errors: dict[int, float]) -> float:
    """Order of convergence: minus the slope of log error over log steps, by least squares."""
    points = torch.tensor([(math.log(n), math.log(e)) for n, e in errors.items()], dtype=torch.float64)
    a, b = (points - points.mean(0)).T
    return -float((a * b).sum() / a.square().sum())


def error(out: AV[Tensor], exact: AV[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(out.values(), exact.values(), strict=True))


def grid(x: AV[Tensor], start: float, end: float, steps: int) -> AV[Tensor]:
    levels = torch.linspace(start, end, steps + 1, dtype=torch.float64).tolist()
    return explicit(x.map(lambda _: levels))


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_order_on_the_gaussian(gaussian: Gaussian, x: AV[Tensor], at: At, name: str) -> None:
    exact = gaussian.flow(x, at(0.9), at(0.1))
    errors = {n: error(SAMPLERS[name](gaussian, x, grid(x, 0.9, 0.1, n), Conditions()), exact) for n in (64, 128, 256)}
    assert slope(errors) == pytest.approx(1.0 if name == "euler" else 2.0, abs=0.15), errors


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_order_on_the_whole_path(gaussian: Gaussian, x: AV[Tensor], at: At, name: str) -> None:
    """From t = 1 to 0 in equal steps, where lambda is infinite at both ends: log factors cost a little of the slope."""
    exact = gaussian.flow(x, at(1.0), at(0.0))
    ones = x.map(lambda _: 1.0)
    errors = {n: error(SAMPLERS[name](gaussian, x, linear(n, ones), Conditions()), exact) for n in (64, 128, 256)}
    low, high = (0.9, 1.1) if name == "euler" else (1.7, 2.2)
    assert low < slope(errors) < high, errors


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_order_on_the_mixture(mixture: Mixture, x: AV[Tensor], name: str) -> None:
    """No closed form for the end point: the reference is the fourth-order Runge-Kutta rule with many steps."""
    exact = runge_kutta(mixture, x, 0.9, 0.2, 100)
    errors = {n: error(SAMPLERS[name](mixture, x, grid(x, 0.9, 0.2, n), Conditions()), exact) for n in (128, 256, 384)}
    assert slope(errors) == pytest.approx(1.0 if name == "euler" else 2.0, abs=0.25), errors


def runge_kutta(denoiser: Mixture, x: AV[Tensor], start: float, end: float, steps: int) -> AV[Tensor]:
    h = (end - start) / steps

    def v(z: AV[Tensor], t: float) -> AV[Tensor]:
        level = z.map(lambda a: torch.full((len(a),), t, dtype=a.dtype))
        return denoiser(z, level, Conditions())

    for i in range(steps):
        t = start + i * h
        k1 = v(x, t)
        k2 = v(x + h / 2 * k1, t + h / 2)
        k3 = v(x + h / 2 * k2, t + h / 2)
        k4 = v(x + h * k3, t + h)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_mean_and_covariance(
    gaussian: Gaussian, whitened: Callable[[int], AV[Tensor]], flat: Flat, modalities: tuple[str, ...], name: str
) -> None:
    """The flow of a Gaussian is affine: noise with exact moments gives samples with exact moments."""
    noise = whitened(64).only(*modalities)
    steps = 400 if name == "euler" else 60
    x = flat(SAMPLERS[name](gaussian, noise, linear(steps, noise.map(lambda _: 1.0)), Conditions()))
    mean, cov = moments(gaussian, modalities, flat)
    torch.testing.assert_close(x.mean(0), mean, atol=1e-2, rtol=0)
    torch.testing.assert_close(x.T.cov(correction=0), cov, atol=2e-2, rtol=0)


def moments(gaussian: Gaussian, modalities: tuple[str, ...], flat: Flat) -> tuple[Tensor, Tensor]:
    sizes = {name: mean.numel() for name, mean in gaussian.mean.items()}
    keep = torch.cat([torch.full((size,), name in modalities) for name, size in sizes.items()])
    return flat(gaussian.mean.map(lambda m: m[None]))[0, keep], gaussian.cov[keep][:, keep]


@pytest.mark.parametrize("name", SECOND_ORDER)
@pytest.mark.parametrize("given", ["video", "audio"])
def test_a_modality_held_clean_conditions_the_other(
    gaussian: Gaussian, whitened: Callable[[int], AV[Tensor]], given: str, name: str
) -> None:
    """Audio-to-video and back: the samples follow the exact conditional N(m + C S^-1 (g - m_g), ...)."""
    made = "audio" if given == "video" else "video"
    noise = whitened(64)
    value = gaussian.sample(Rng.of(0, 1))[given].expand_as(noise[given])
    times = held(linear(60, AV(**{made: 1.0})), given, 0.0)
    out = SAMPLERS[name](gaussian, noise.replace(**{given: value}), times, Conditions())
    assert torch.equal(out[given], value)
    first = gaussian.mean["video"].numel()
    rows = {"video": slice(0, first), "audio": slice(first, None)}
    a, b = rows[made], rows[given]
    gain = gaussian.cov[a, b] @ torch.linalg.inv(gaussian.cov[b, b])
    mean = gaussian.mean[made].flatten() + gain @ (value[0] - gaussian.mean[given]).flatten()
    z = out[made].flatten(1)
    torch.testing.assert_close(z.mean(0), mean, atol=1e-2, rtol=0)
    torch.testing.assert_close(z.T.cov(correction=0), gaussian.cov[a, a] - gain @ gaussian.cov[b, a], atol=2e-2, rtol=0)


@pytest.mark.parametrize("name", [*SAMPLERS])
def test_an_exact_x0_is_reached_in_any_grid(x: AV[Tensor], name: str) -> None:
    """A student that always names the same x0: every sampler ends there, from t = 1, with a pause, in one step."""
    goal = x.map(torch.sin)

    def student(x_t: AV[Tensor], t: AV[Tensor], cond: Conditions, *, r: AV[Tensor] | None = None) -> AV[Tensor]:
        assert cond.batch is None and r is None
        return (x_t - goal) / t

    for levels in ([1.0, 0.0], [1.0, 0.7, 0.7, 0.7, 0.2, 0.0], [0.8, 0.8, 0.4, 0.1, 0.0], [1.0, 0.9, 0.3]):
        end = SAMPLERS[name](student, x, explicit(x.map(lambda _, v=levels: v)), Conditions(), rng=Rng.of(0, 4))
        for key, z in end.items():
            assert z.isfinite().all()
            if levels[-1] == 0:
                torch.testing.assert_close(z, goal[key], atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", [*SAMPLERS])
def test_modalities_with_different_grids(gaussian: Gaussian, whitened: Callable[[int], AV[Tensor]], name: str) -> None:
    """One modality early at 0, one held at a level: no NaN, the held one untouched, and the order of arrival free."""
    noise = whitened(32)
    times = explicit(AV([1.0, 0.5, 0.0, 0.0, 0.0], [1.0, 0.8, 0.5, 0.1, 0.0]))
    out = SAMPLERS[name](gaussian, noise, times, Conditions(), rng=Rng.of(0, 32))
    assert all(z.isfinite().all() for z in out.values())
    times = held(linear(4, AV(video=1.0)), "audio", 0.3)
    out = SAMPLERS[name](gaussian, noise, times, Conditions(), rng=Rng.of(0, 32))
    assert torch.equal(out["audio"], noise["audio"])
    assert out["video"].isfinite().all()


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_independent_modalities_are_sampled_as_alone(
    gaussian: Gaussian, whitened: Callable[[int], AV[Tensor]], name: str
) -> None:
    """Without correlation a joint run with a grid per modality equals one run per modality."""
    first = gaussian.mean["video"].numel()
    cov = gaussian.cov.clone()
    cov[:first, first:] = 0
    cov[first:, :first] = 0
    data = Gaussian(gaussian.mean, cov)
    noise, times = whitened(32), shifted(8, AV(5.0, 2.0))
    joint = SAMPLERS[name](data, noise, times, Conditions())
    for key in ("video", "audio"):
        alone = SAMPLERS[name](data, noise.only(key), times.only(key), Conditions())
        torch.testing.assert_close(joint[key], alone[key])


def test_renoise_with_a_perfect_student_samples_the_data(
    gaussian: Gaussian, flat: Flat, modalities: tuple[str, ...]
) -> None:
    """With the exact flow map to 0 as the student every step is a fresh sample of the data."""
    n = 4096
    rng = Rng.of(0, n)
    noise = rng.normal_like(gaussian.mean.map(lambda m: m.expand(n, *m.shape))).only(*modalities)

    def student(x_t: AV[Tensor], t: AV[Tensor], cond: Conditions, *, r: AV[Tensor] | None = None) -> AV[Tensor]:
        assert r is None
        return gaussian(x_t, t, cond, r=t * 0.0)

    times = explicit(noise.map(lambda _: [1.0, 0.9375, 0.8333, 0.625, 0.0]))
    x = flat(renoise(student, noise, times, Conditions(), rng=rng))
    mean, cov = moments(gaussian, modalities, flat)
    torch.testing.assert_close(x.mean(0), mean, atol=0.08, rtol=0)
    torch.testing.assert_close(x.T.cov(), cov, atol=0.15, rtol=0)


def test_renoise_rule(toy: Callable[..., AV[Tensor]], x: AV[Tensor], text: Conditions, at: At) -> None:
    """x = (1 - t') x0 + t' noise with the noise of (rng, step, modality), alone or in a batch."""
    rng = Rng.of(3, 4)
    times = explicit(x.map(lambda _: [1.0, 0.5, 0.0]))
    x0 = to_x0(x, toy(x, at(1.0), text), at(1.0))
    x_t = 0.5 * x0 + 0.5 * rng.fold("renoise", 0).normal_like(x)
    expected = to_x0(x_t, toy(x_t, at(0.5), text), at(0.5))
    out = renoise(toy, x, times, text, rng=rng)
    third = renoise(toy, x.map(lambda z: z[2:3]), times, text.map(lambda z: z[2:3]), rng=Rng.of(3, 1, start=2))
    for name in x.modalities:
        torch.testing.assert_close(out[name], expected[name])
        torch.testing.assert_close(third[name][0], out[name][2])
    with pytest.raises(ConfigError, match="needs rng"):
        renoise(toy, x, times, text)
    renoise(toy, x, linear(1, x.map(lambda _: 1.0)), text)


@pytest.mark.parametrize("name", [*SAMPLERS])
def test_steps_are_reported_and_gradients_flow(
    toy: Callable[..., AV[Tensor]], x: AV[Tensor], text: Conditions, name: str
) -> None:
    seen: list[tuple[int, AV[Tensor], AV[Tensor]]] = []
    leaf = x.map(lambda z: z.clone().requires_grad_())
    times = shifted(3, x.map(lambda _: 2.0))
    out = SAMPLERS[name](toy, leaf, times, text, rng=Rng.of(0, 4), on_step=lambda *step: seen.append(step))
    assert [i for i, _, _ in seen] == [0, 1, 2]
    for key in x.modalities:
        assert torch.equal(seen[-1][1][key], out[key])
        torch.testing.assert_close(seen[-1][2][key], out[key])
    sum(z.square().sum() for z in out.values()).backward()
    assert all(z.grad is not None and z.grad.abs().sum() > 0 for z in leaf.values())


@pytest.mark.parametrize("name", [*SAMPLERS])
def test_types_are_kept(toy: torch.nn.Module, x: AV[Tensor], text: Conditions, name: str) -> None:
    times = linear(3, x.map(lambda _: 1.0))
    single = toy.float()
    out = SAMPLERS[name](single, x.to(torch.float32), times, text.to(torch.float32), rng=Rng.of(0, 4))
    assert all(z.dtype == torch.float32 for z in out.values())


def test_grids_must_fit(gaussian: Gaussian, whitened: Callable[[int], AV[Tensor]]) -> None:
    x = whitened(32)
    with pytest.raises(ModalityError, match="modalities differ"):
        SAMPLERS["euler"](gaussian, x, linear(2, AV(video=1.0)), Conditions())
    with pytest.raises(ConfigError, match="descend"):
        SAMPLERS["euler"](gaussian, x, linear(2).map(lambda g: g.flip(0)), Conditions())
