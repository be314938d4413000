"""The measuring stick itself: closed forms against quadrature, derivatives and Monte Carlo."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from soundstage.core import AV, Conditions, ConfigError, Rng, noised, velocity
from soundstage.testing.analytic import Gaussian, Mixture


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_velocity_is_the_derivative_of_the_flow(
    gaussian: Gaussian, x: AV[Tensor], at: Callable[[float], AV[Tensor]]
) -> None:
    def path(s: Tensor) -> dict[str, Tensor]:
        return gaussian.flow(x, at(0.8), x.map(lambda _: s)).as_dict()

    s = torch.full((4,), 0.35, dtype=torch.float64)
    there, slope = torch.func.jvp(path, (s,), (torch.ones_like(s),))
    v = gaussian(AV.from_dict(there), at(0.35), Conditions())
    for name in x.modalities:
        torch.testing.assert_close(slope[name], v[name])


def test_mean_velocity_takes_one_step_along_the_flow(
    gaussian: Gaussian, x: AV[Tensor], at: Callable[[float], AV[Tensor]]
) -> None:
    u = gaussian(x, at(0.9), Conditions(), r=at(0.2))
    for name, end in gaussian.flow(x, at(0.9), at(0.2)).items():
        torch.testing.assert_close(x[name] - 0.7 * u[name], end)
    with pytest.raises(ConfigError, match="the same for all modalities"):
        gaussian.flow(x, x.map(lambda z: torch.zeros(4, z.shape[2])), at(0.2))


def test_mixture_velocity_in_one_dimension_by_quadrature() -> None:
    weights = torch.tensor([0.2, 0.8], dtype=torch.float64)
    means = torch.tensor([-1.5, 0.7], dtype=torch.float64)
    stds = torch.tensor([0.3, 0.5], dtype=torch.float64)
    mixture = Mixture(AV(audio=means.reshape(2, 1, 1)), stds.square().reshape(2, 1, 1), weights)
    x0 = torch.linspace(-6, 6, 40_001, dtype=torch.float64)
    density = (weights / stds * torch.exp(-0.5 * ((x0[:, None] - means) / stds) ** 2)).sum(1)
    for t, x_t in ((0.9, 0.4), (0.5, -0.3), (0.2, 0.1)):
        noise = (x_t - (1 - t) * x0) / t
        posterior = density * torch.exp(-0.5 * noise.square())
        expected = ((noise - x0) * posterior).sum() / posterior.sum()
        level = AV(audio=torch.tensor([t], dtype=torch.float64))
        v = mixture(AV(audio=torch.full((1, 1, 1), x_t, dtype=torch.float64)), level, Conditions())
        assert v["audio"].item() == pytest.approx(expected.item(), rel=1e-6)


def test_velocity_minimises_the_flow_matching_loss(mixture: Mixture, modalities: tuple[str, ...]) -> None:
    """E[v_true | x_t] has the property that its error is uncorrelated with any function of x_t."""
    n = 8_000
    rng = Rng.of(0, n)
    x0 = mixture.sample(rng)
    noise = rng.normal_like(x0)
    t = AV(torch.full((n,), 0.4, dtype=torch.float64), torch.full((n,), 0.7, dtype=torch.float64))
    x0, noise, t = (value.only(*modalities) for value in (x0, noise, t))
    x_t = noised(x0, noise, t)
    error = mixture(x_t, t, Conditions()) - velocity(x0, noise)
    for name, residual in error.items():
        spread = residual.std() / n**0.5
        assert (residual.mean(0).abs() < 5 * spread).all()
        assert ((residual * torch.tanh(x_t[name])).mean(0).abs() < 5 * spread).all()


def test_a_mixture_of_equal_parts_is_the_gaussian(
    gaussian: Gaussian, x: AV[Tensor], at: Callable[[float], AV[Tensor]]
) -> None:
    twice = Mixture(
        gaussian.mean.map(lambda m: torch.stack([m, m])),
        torch.stack([gaussian.cov, gaussian.cov]),
        torch.tensor([0.4, 0.6], dtype=torch.float64),
    )
    for name, v in gaussian(x, at(0.5), Conditions()).items():
        torch.testing.assert_close(twice(x, at(0.5), Conditions())[name], v)
    with pytest.raises(ConfigError, match="flow map"):
        twice(x, at(0.5), Conditions(), r=at(0.1))


def test_samples_have_the_moments(gaussian: Gaussian, flat: Callable[[AV[Tensor]], Tensor]) -> None:
    z = flat(gaussian.sample(Rng.of(1, 20_000)))
    torch.testing.assert_close(z.T.cov(), gaussian.cov, atol=0.05, rtol=0)
    torch.testing.assert_close(z.mean(0), flat(gaussian.mean.map(lambda m: m[None]))[0], atol=0.04, rtol=0)
