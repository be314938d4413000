"""Two autoencoders as one `Codec`."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from soundstage.core.av import AV
from soundstage.core.denoiser import StreamGeometry


class StreamCodec(Protocol):
    """One modality's autoencoder with its latent statistics."""

    mean: Tensor
    std: Tensor

    def encode(self, media: Tensor) -> Tensor: ...

    def decode(self, latents: Tensor) -> Tensor: ...


class PairCodec(nn.Module):
    """A Codec made of one autoencoder per modality (modules with `encode`, `decode` and `config.geometry`)."""

    def __init__(self, codecs: AV[nn.Module]) -> None:
        super().__init__()
        self.streams = nn.ModuleDict(codecs.as_dict())
        self.geometry: AV[StreamGeometry] = codecs.map(lambda codec: codec.config.geometry)  # type: ignore[union-attr]

    @torch.no_grad()
    def encode(self, media: AV[Tensor]) -> AV[Tensor]:
        """Media to latents of unit variance."""
        return AV(**{name: self.streams[name].encode(x) for name, x in media.items()})  # type: ignore[operator]

    @torch.no_grad()
    def decode(self, latents: AV[Tensor]) -> AV[Tensor]:
        """Latents to media; sound in whole latent steps, to be cut by the clock."""
        return AV(**{name: self.streams[name].decode(x) for name, x in latents.items()})  # type: ignore[operator]


@torch.no_grad()
def fit_statistics(codec: StreamCodec, media: list[Tensor]) -> None:
    """Set `mean` and `std` per channel so that the latents of these batches have zero mean and unit variance."""
    codec.mean.zero_()
    codec.std.fill_(1.0)
    latents = torch.cat([codec.encode(batch).transpose(0, 1).flatten(1) for batch in media], dim=1)
    codec.mean.copy_(latents.mean(1))
    codec.std.copy_(latents.std(1))
