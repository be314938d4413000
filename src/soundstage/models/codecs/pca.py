"""A linear codec: principal components of patches, fitted in a second. For tests and as the floor of the learned ones.

Shape letters: B batch, F frames, H, W pixels, C components, L patches, P numbers in a patch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from soundstage.core.av import AV
from soundstage.core.denoiser import StreamGeometry


class PCACodec:
    """A Codec of unit-variance principal components per patch: t x s x s pixels, or `stride` samples of sound."""

    def __init__(self, geometry: AV[StreamGeometry]) -> None:
        self.geometry = geometry
        self._mean: dict[str, Tensor] = {}
        self._basis: dict[str, Tensor] = {}
        self._std: dict[str, Tensor] = {}

    def fit(self, media: Sequence[AV[Tensor]]) -> PCACodec:
        """Set mean, components and variances from batches of media; returns itself."""
        for name, geometry in self.geometry.items():
            patches = torch.cat([_patches(batch[name], geometry).flatten(0, -2) for batch in media]).double()
            mean = patches.mean(0)
            _, singular, rows = torch.linalg.svd(patches - mean, full_matrices=False)
            basis, std = rows[: geometry.channels], singular[: geometry.channels] / (len(patches) - 1) ** 0.5
            self._mean[name], self._basis[name] = mean.float(), basis.float()
            self._std[name] = std.clamp_min(1e-4 * std[0]).float()
        return self

    def encode(self, media: AV[Tensor]) -> AV[Tensor]:
        """Media to components, video (B, C, F', H', W'), audio (B, C, A)."""

        def project(name: str, x: Tensor) -> Tensor:
            patches = _patches(x, self.geometry[name])
            return ((patches - self._mean[name]) @ self._basis[name].T / self._std[name]).movedim(-1, 1)

        return AV(**{name: project(name, x) for name, x in media.items()})

    def decode(self, latents: AV[Tensor]) -> AV[Tensor]:
        """Components to media in [-1, 1]."""

        def paint(name: str, z: Tensor) -> Tensor:
            patches = (z.movedim(1, -1) * self._std[name]) @ self._basis[name] + self._mean[name]
            return _media(patches, self.geometry[name]).clamp(-1, 1)

        return AV(**{name: paint(name, z) for name, z in latents.items()})


def _patches(x: Tensor, geometry: StreamGeometry) -> Tensor:
    """(B, 3, F, H, W) -> (B, F', H', W', P); (B, 1, N) -> (B, A, P), the end filled with silence."""
    t, s = geometry.stride, geometry.spatial_stride
    if x.ndim == 3:
        padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % t))
        return padded.unflatten(2, (-1, t)).transpose(1, 2).flatten(2)
    if geometry.causal_first:
        x = torch.cat([x[:, :, :1].expand(-1, -1, t - 1, -1, -1), x], dim=2)
    x = x.unflatten(4, (-1, s)).unflatten(3, (-1, s)).unflatten(2, (-1, t))
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)


def _media(patches: Tensor, geometry: StreamGeometry) -> Tensor:
    t, s = geometry.stride, geometry.spatial_stride
    if patches.ndim == 3:
        return patches.unflatten(2, (-1, t)).transpose(1, 2).flatten(2)
    x = patches.unflatten(4, (3, t, s, s)).permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(6).flatten(4, 5).flatten(2, 3)
    return x[:, :, t - 1 :] if geometry.causal_first else x
