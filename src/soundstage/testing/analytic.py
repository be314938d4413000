"""Closed-form denoisers: data whose velocity field, and for one Gaussian whose flow, are known exactly.

They see the modalities together (D numbers, video first, each flattened), so correlated modalities, a modality given
at t = 0, steps known in part, and a modality alone all have exact answers. Use float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from soundstage.core.av import AV, spread
from soundstage.core.conditions import Conditions
from soundstage.core.errors import ConfigError
from soundstage.core.rng import Rng


@dataclass(frozen=True, eq=False)
class Mixture:
    """Denoiser of x0 ~ sum_k weights_k N(means_k, covs_k).

    means: per modality (K, C, F, H, W) or (K, C, A). covs: (K, D, D) over all modalities, positive definite.
    weights: (K,), summing to 1. Any t in [0, 1] per modality, (B,) or (B, F); a modality left out is marginalised.
    """

    means: AV[Tensor]
    covs: Tensor
    weights: Tensor

    def __call__(
        self,
        x_t: AV[Tensor],
        t: AV[Tensor],
        cond: Conditions,  # noqa: ARG002
        *,
        r: AV[Tensor] | None = None,
    ) -> AV[Tensor]:
        """Exact velocity E[noise - x0 | x_t]; r must be None, since a mixture's flow map has no closed form."""
        if r is not None:
            raise ConfigError("Mixture: has no closed-form flow map, r must be None; use Gaussian")
        means, covs = _flat(self.means.only(*x_t.modalities)), _marginal(self.covs, self.means, x_t.modalities)
        x, level = _flat(x_t)[:, None], _flat(x_t.map(_full, t))[:, None]
        signal = 1 - level
        centred = x - signal * means
        noisy_cov = signal[..., :, None] * covs * signal[..., None, :] + torch.diag_embed(level.square())
        root = torch.linalg.cholesky(noisy_cov)
        whitened = torch.linalg.solve_triangular(root, centred[..., None], upper=False)
        y = torch.linalg.solve_triangular(root.mT, whitened, upper=True)[..., 0]
        x0 = means + (covs @ (signal * y)[..., None])[..., 0]
        log_density = -0.5 * whitened.square().sum((-2, -1)) - root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        share = (self.weights.log() + log_density).softmax(dim=-1)
        return _unflat((share[..., None] * (level * y - x0)).sum(1), x_t)

    def sample(self, rng: Rng) -> AV[Tensor]:
        """One x0 per seed."""
        pick = rng.fold("component").uniform(dtype=self.weights.dtype)[:, None]
        k = (pick > self.weights.cumsum(0)[:-1]).sum(1)
        noise = rng.fold("x0").normal(self.covs.shape[-1], dtype=self.covs.dtype)
        flat = _flat(self.means)[k] + (torch.linalg.cholesky(self.covs)[k] @ noise[..., None])[..., 0]
        return _unflat(flat, self.means)


@dataclass(frozen=True, eq=False)
class Gaussian:
    """Denoiser of x0 ~ N(mean, cov), with its exact flow.

    mean: per modality (C, F, H, W) or (C, A). cov: (D, D) over all modalities, positive definite.
    """

    mean: AV[Tensor]
    cov: Tensor

    @property
    def mixture(self) -> Mixture:
        """The same data as a mixture of one."""
        return Mixture(self.mean.map(lambda m: m[None]), self.cov[None], self.cov.new_ones(1))

    def __call__(self, x_t: AV[Tensor], t: AV[Tensor], cond: Conditions, *, r: AV[Tensor] | None = None) -> AV[Tensor]:
        """Exact velocity; with r the exact mean velocity from t to r < t, where flow() holds."""
        if r is None:
            return self.mixture(x_t, t, cond)
        return (x_t - self.flow(x_t, t, r)) / (t - r)

    def sample(self, rng: Rng) -> AV[Tensor]:
        """One x0 per seed."""
        return self.mixture.sample(rng)

    def flow(self, x_t: AV[Tensor], t: AV[Tensor], s: AV[Tensor]) -> AV[Tensor]:
        """Where the exact ODE takes x_t from t to s, both (B,) and the same for all modalities.

        In the eigenbasis of cov every coordinate scales by std(s) / std(t), std(t)^2 = (1 - t)^2 eigenvalue + t^2.
        Raises ConfigError when the modalities have different times: then there is no closed form.
        """
        means = self.mean.map(lambda m: m[None])
        mean, cov = _flat(means.only(*x_t.modalities)), _marginal(self.cov[None], means, x_t.modalities)[0]
        t_B, s_B = (_shared(times)[:, None].to(cov.dtype) for times in (t, s))
        eigenvalues, basis = torch.linalg.eigh(cov)
        ratio = ((1 - s_B).square() * eigenvalues + s_B.square()) / ((1 - t_B).square() * eigenvalues + t_B.square())
        centred = (_flat(x_t) - (1 - t_B) * mean) @ basis
        return _unflat((1 - s_B) * mean + (ratio.sqrt() * centred) @ basis.T, x_t)


def _marginal(covs: Tensor, means: AV[Tensor], modalities: tuple[str, ...]) -> Tensor:
    """Rows and columns of covs (K, D, D) that belong to the modalities."""
    keep = torch.cat([torch.full((mean[0].numel(),), name in modalities) for name, mean in means.items()])
    return covs[:, keep][:, :, keep]


def _flat(x: AV[Tensor]) -> Tensor:
    """(B, D), video first."""
    return torch.cat([z.flatten(1) for z in x.values()], dim=1)


def _unflat(flat: Tensor, like: AV[Tensor]) -> AV[Tensor]:
    parts = flat.split([z[0].numel() for z in like.values()], dim=1)
    shapes = zip(like.items(), parts, strict=True)
    return AV(**{name: part.reshape(-1, *z.shape[1:]) for (name, z), part in shapes})


def _full(x: Tensor, t: Tensor) -> Tensor:
    return spread(t, x).to(x.dtype).expand_as(x)


def _shared(times: AV[Tensor]) -> Tensor:
    first, *rest = times.values()
    if first.ndim != 1 or any(not torch.equal(first, other) for other in rest):
        raise ConfigError("Gaussian.flow: t and s must be (B,) and the same for all modalities")
    return first
