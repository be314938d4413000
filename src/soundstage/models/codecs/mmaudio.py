"""MMAudio's 16 kHz sound codec: log-mel, a mel autoencoder and the BigVGAN vocoder (arXiv:2412.15322).

The autoencoder is diffusers' class without its front end, which takes natural logarithms where the 16 kHz weights were
trained on log10; mel and vocoder are ours. Latents are the posterior's mean, without scaling, at 31.25 steps a second.
Shape letters: B batch, N samples, M mel frames, A latent steps, C latent channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from soundstage.core.denoiser import StreamGeometry
from soundstage.core.errors import ConfigError, ShapeError, WeightsError
from soundstage.core.extras import optional
from soundstage.media.waves import MMAUDIO_16K as MEL_16K
from soundstage.media.waves import MelConfig, hann, mel_basis
from soundstage.models.codecs.bigvgan import BIGVGAN_16K, BigVGANConfig
from soundstage.models.weights import KeyMap, Source

FRAMES = 2  # mel frames per latent step


@dataclass(frozen=True)
class MMAudioConfig:
    """channels: of the latents. width: of the autoencoder's first level; the level i is multipliers[i] times as wide.

    layers: residual blocks of an encoder level (a decoder level has one more). chunk: latent steps that the vocoder
    turns into sound at a time, None = all; any chunk gives the same sound.
    """

    channels: int = 20
    width: int = 384
    multipliers: tuple[int, ...] = (1, 2, 4)
    layers: int = 2
    mel: MelConfig = MEL_16K
    vocoder: BigVGANConfig = BIGVGAN_16K
    chunk: int | None = 320

    def __post_init__(self) -> None:
        if self.vocoder.hop != self.mel.hop or self.vocoder.bands != self.mel.num_mels:
            raise ConfigError(
                f"vocoder: {self.vocoder.bands} bands, {self.vocoder.hop} samples a frame (the product of its rates) "
                f"do not fit a mel of {self.mel.num_mels} bands, {self.mel.hop} samples; give both the same"
            )
        if len(self.multipliers) < 2:
            raise ConfigError("multipliers: give two levels or more; time is halved between the first two")

    @property
    def geometry(self) -> StreamGeometry:
        """Samples to latents."""
        return StreamGeometry(Fraction(self.mel.sample_rate), FRAMES * self.mel.hop, self.channels)

    def build(self) -> MMAudio:
        """The module, randomly initialised; raises MissingExtra without diffusers."""
        return MMAudio(self)

    @classmethod
    def of(
        cls, vae_shapes: Mapping[str, tuple[int, ...]], vocoder_shapes: Mapping[str, tuple[int, ...]]
    ) -> MMAudioConfig:
        """The widths of published files (v1-16.pth, best_netG.pt); raises WeightsError for another model."""
        shapes = {name.removeprefix(SAVED): shape for name, shape in vae_shapes.items()}
        try:
            width, bands, _ = shapes["encoder.conv_in.weight"]
            levels, layers = (
                next(i for i in range(len(shapes) + 1) if pattern.format(i) not in shapes)
                for pattern in ("encoder.down.{}.block.0.conv1.weight", "encoder.down.0.block.{}.conv1.weight")
            )
            widths = [shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels)]
            channels = shapes["decoder.conv_in.weight"][1]
            mel = replace(MEL_16K, num_mels=shapes["data_mean"][1])
            if mel.num_mels != bands or any(x % width for x in widths):
                raise ValueError(f"widths {widths}, {bands} bands")
        except (KeyError, ValueError, IndexError) as error:
            raise WeightsError(f"not the weights of MMAudio's mel autoencoder ({error}); give v1-16.pth") from None
        vocoder = BigVGANConfig.of(vocoder_shapes)
        try:
            return cls(channels, width, tuple(x // width for x in widths), layers, mel, vocoder)
        except ConfigError as error:
            raise WeightsError(f"these files do not belong together: {error}") from None


MMAUDIO_16K = MMAudioConfig()
"""The codec of Ovi: 171,657,218 parameters in `vae`, 112,199,473 in `vocoder`."""


class MMAudio(nn.Module):
    """encode (B, 1, N) in [-1, 1] -> (B, C, A), A = ceil(N / 512); decode -> (B, 1, 512 A) within [-1, 1].

    Set `chunk` to change how many latent steps the vocoder takes at a time.
    """

    def __init__(self, config: MMAudioConfig) -> None:
        super().__init__()
        self.config = config
        self.chunk = config.chunk
        self.vae = _autoencoder(config)
        self.vocoder = config.vocoder.build()

    def encode(self, wave: Tensor) -> Tensor:
        """Sound to latents; an incomplete last step is filled up with silence, so it counts as StreamGeometry counts.

        MMAudio itself drops that step: cut the wave to a multiple of 512 samples to have its number of latents.
        """
        if wave.ndim != 3 or wave.shape[1] != 1 or not wave.shape[2]:
            raise ShapeError(f"sound of shape {tuple(wave.shape)} does not fit the codec; give (batch, 1, samples)")
        mel = self.mel(F.pad(wave.float(), (0, -wave.shape[2] % self.config.geometry.stride)))
        return self.vae.encode(mel.to(self._dtype)).chunk(2, dim=1)[0].float()  # type: ignore[operator]

    def decode(self, latents: Tensor) -> Tensor:
        """Latents to sound, whole steps."""
        return torch.cat(list(self.decode_stream(latents)), dim=2)

    def decode_stream(self, latents: Tensor) -> Iterator[Tensor]:
        """The sound of `decode` in pieces of `chunk` latent steps.

        The autoencoder attends to all steps and runs whole (6 kB a step and layer); the vocoder takes far more, sees
        `config.vocoder.halo` mel frames to either side and runs piece by piece.
        """
        if latents.ndim != 3 or latents.shape[1] != self.config.channels or not latents.shape[2]:
            wanted = f"(batch, {self.config.channels}, steps)"
            raise ShapeError(f"latents of shape {tuple(latents.shape)} do not fit the codec; give {wanted}")
        mel = self.vae.decode(latents.to(self._dtype))  # type: ignore[operator]
        for piece in self.vocoder.stream(mel, None if self.chunk is None else self.chunk * FRAMES):
            yield piece.float()

    def mel(self, wave: Tensor) -> Tensor:
        """(B, 1, N) -> log10 mel (B, bands, N // hop) in float32 whatever the type of the module or of autocast.

        Equals media.waves.mel_spectrogram. Its window and triangles are made here and not buffers: so they survive a
        module built on the meta device and one moved to bfloat16.
        """
        config, device = self.config.mel, wave.device
        if wave.shape[-1] <= config.pad:
            raise ShapeError(f"mel: {wave.shape[-1]} samples are too few; give more than {config.pad}")
        window = torch.from_numpy(hann(config.n_fft)).to(device)
        basis = torch.from_numpy(mel_basis(config)).to(device)
        plain = torch.amp.is_autocast_available(device.type)
        with torch.autocast(device.type, enabled=False) if plain else nullcontext():
            x = F.pad(wave.float().clamp(-1, 1), (config.pad, config.pad), mode="reflect")[:, 0]
            spectrum = torch.stft(x, config.n_fft, config.hop, window=window, center=False, return_complex=True)
            magnitude = (spectrum.real.square() + spectrum.imag.square() + config.eps).sqrt()
            return (basis @ magnitude).clamp_min(config.floor).log10()

    @property
    def _dtype(self) -> torch.dtype:
        return self.vocoder.conv_pre.weight.dtype


def _autoencoder(config: MMAudioConfig) -> nn.Module:
    """diffusers' magnitude-preserving autoencoder of mel spectrograms, `encode` and `decode`."""
    mel = config.mel
    whole = optional("diffusers", "models", "MMAudioVAE").MMAudioVAE(
        mel.num_mels,
        config.channels,
        config.width,
        config.multipliers,
        config.layers,
        mel.sample_rate,
        mel.n_fft,
        mel.hop,
    )
    return whole.vae


SAVED = "vae."  # before the names of a folder that diffusers' MMAudioVAE saved


def normalise(weight: Tensor) -> Tensor:
    """A magnitude-preserving convolution's weight (out, in, k): rows of unit norm (arXiv:2312.02696, eq. 66 and 67).

    Not idempotent: the published file stores what was trained, of any norm, and is normalised once, here.
    """
    rows = weight.flatten(1)
    return weight / (rows.norm(dim=1) + 1e-4 * rows.shape[1] ** 0.5).view(-1, 1, 1)


def _keys(names: Sequence[str]) -> dict[str, Source]:
    return {
        name.removeprefix(SAVED): Source((name,), normalise if name.endswith(".weight") and raw else None)
        for name in names
        for raw in (not name.startswith(SAVED),)
    }


MMAUDIO_VAE_KEYS: KeyMap = _keys
"""v1-16.pth (57 names) to `MMAudio.vae`: every convolution is normalised, gains and statistics are not.

Also a folder that diffusers' MMAudioVAE saved, normalised before; its front end's names are MMAUDIO_VAE_OPTIONAL.
"""
MMAUDIO_VAE_OPTIONAL = (r"mel_converter\..*",)
"""For load_weights(optional=...): what diffusers saves besides the autoencoder."""
