"""A small mel autoencoder with a vocoder: 16 kHz sound, mel frames of 16 ms, latent steps of 64 ms.

The mel spectrogram is the one of MMAudio at 16 kHz (media.waves.MMAUDIO_16K); the vocoder predicts magnitude and phase
for an inverse STFT (Vocos, arXiv:2306.00814).
Shape letters: B batch, N samples, M mel frames, A latent steps, C latent channels, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from soundstage.core.av import AV
from soundstage.core.denoiser import StreamGeometry
from soundstage.media.waves import MMAUDIO_16K, hann, mel_basis

HOP = 256
FFT = 1024
BANDS = 80
FRAMES = 4  # mel frames per latent step
PAD = (FFT - HOP) // 2
CENTRE, HALF_RANGE = -2.5, 2.5  # log10 mel of the world spans -5 .. 1


@dataclass(frozen=True)
class AudioCodecConfig:
    """Widths and depths of the mel encoder, the mel decoder and the vocoder; noise as in VideoCodecConfig."""

    channels: int = 32
    encoder_width: int = 128
    encoder_depth: int = 2
    decoder_width: int = 128
    decoder_depth: int = 2
    vocoder_width: int = 128
    vocoder_depth: int = 3
    noise: float = 0.1

    @property
    def geometry(self) -> StreamGeometry:
        """Samples to latents."""
        return StreamGeometry(Fraction(16000), HOP * FRAMES, self.channels)

    def build(self) -> AudioCodec:
        """The module, randomly initialised."""
        return AudioCodec(self)


class Mix1d(nn.Module):
    """Residual block over time: depthwise convolution, then an MLP over channels (ConvNeXt, arXiv:2201.03545)."""

    def __init__(self, width: int, kernel: int, expansion: int = 2) -> None:
        super().__init__()
        self.near = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width)
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, expansion * width), nn.GELU(), nn.Linear(expansion * width, width))
        nn.init.zeros_(self.mlp[2].weight)  # type: ignore[arg-type]

    def forward(self, x_BDL: Tensor) -> Tensor:
        """(B, D, L) -> the same."""
        return x_BDL + self.mlp(self.norm(self.near(x_BDL).transpose(1, 2))).transpose(1, 2)


class AudioCodec(nn.Module):
    """encode (B, 1, N) in [-1, 1] -> (B, C, A), A = ceil(N / 1024); decode -> (B, 1, 1024 A)."""

    mean: Tensor
    std: Tensor
    basis: Tensor
    window: Tensor

    def __init__(self, config: AudioCodecConfig) -> None:
        super().__init__()
        self.config = config
        self.merge = nn.Linear(BANDS * FRAMES, config.encoder_width)
        self.encoder = nn.ModuleList(Mix1d(config.encoder_width, 3) for _ in range(config.encoder_depth))
        self.to_latent = nn.Linear(config.encoder_width, config.channels)
        self.from_latent = nn.Linear(config.channels, config.decoder_width)
        self.decoder = nn.ModuleList(Mix1d(config.decoder_width, 3) for _ in range(config.decoder_depth))
        self.unmerge = nn.Linear(config.decoder_width, BANDS * FRAMES)
        self.hear = nn.Conv1d(BANDS, config.vocoder_width, 5, padding=2)
        self.vocoder = nn.ModuleList(Mix1d(config.vocoder_width, 7, 3) for _ in range(config.vocoder_depth))
        self.speak = nn.Linear(config.vocoder_width, FFT + 2)
        self.register_buffer("mean", torch.zeros(config.channels))
        self.register_buffer("std", torch.ones(config.channels))
        self.register_buffer("basis", torch.from_numpy(mel_basis(MMAUDIO_16K)).float(), persistent=False)
        self.register_buffer("window", torch.from_numpy(hann(FFT)).float(), persistent=False)

    def forward(self, media: AV[Tensor]) -> dict[str, tuple[AV[Tensor], AV[Tensor]]]:
        """Pairs (made, true) for the reconstruction objective."""
        wave = _whole(media["audio"])
        mel = self.mel(wave)
        raw = self._encode(mel)
        made = self._decode(raw + self.config.noise * torch.randn_like(raw) if self.training else raw)
        return {"mel": (AV(audio=made), AV(audio=mel)), "wave": (AV(audio=self.vocode(made)), AV(audio=wave))}

    def encode(self, wave: Tensor) -> Tensor:
        """Sound to latents; the last step is filled up with silence."""
        raw = self._encode(self.mel(_whole(wave)))
        return (raw - self.mean[:, None]) / self.std[:, None]

    def decode(self, latents: Tensor) -> Tensor:
        """Latents to sound in [-1, 1], whole steps."""
        return self.vocode(self._decode(latents * self.std[:, None] + self.mean[:, None])).clamp(-1, 1)

    def mel(self, wave: Tensor) -> Tensor:
        """(B, 1, 256 M) -> scaled log10 mel (B, 80, M); numbers of media.waves.mel_spectrogram, shifted and scaled."""
        x = F.pad(wave.float().clamp(-1, 1), (PAD, PAD), mode="reflect")[:, 0]
        spectrum = torch.stft(x, FFT, HOP, window=self.window, center=False, return_complex=True)
        magnitude = (spectrum.real.square() + spectrum.imag.square() + 1e-9).sqrt()
        return ((self.basis @ magnitude).clamp_min(1e-5).log10() - CENTRE) / HALF_RANGE

    def vocode(self, mel: Tensor) -> Tensor:
        """Scaled mel (B, 80, M) -> sound (B, 1, 256 M)."""
        spoken = self.speak(_through(self.vocoder, self.hear(mel)).transpose(1, 2)).float().transpose(1, 2)
        log_magnitude, phase = spoken.chunk(2, dim=1)
        magnitude = log_magnitude.clamp_max(6.0).exp()
        frames = torch.fft.irfft(torch.complex(magnitude * phase.cos(), magnitude * phase.sin()), FFT, dim=1)
        length = (mel.shape[-1] - 1) * HOP + FFT
        window = self.window[:, None]
        summed = F.fold(frames * window, (1, length), (1, FFT), stride=(1, HOP))[:, 0, 0]
        weight = F.fold((window**2).expand(1, -1, mel.shape[-1]), (1, length), (1, FFT), stride=(1, HOP))[:, 0, 0]
        return (summed / weight.clamp_min(1e-3))[:, None, PAD : PAD + mel.shape[-1] * HOP]

    def _encode(self, mel: Tensor) -> Tensor:
        x = mel.unflatten(2, (-1, FRAMES)).permute(0, 2, 1, 3).flatten(2)
        x = self.to_latent(_through(self.encoder, self.merge(x).transpose(1, 2)).transpose(1, 2)).float()
        return F.rms_norm(x, x.shape[-1:]).transpose(1, 2)

    def _decode(self, raw: Tensor) -> Tensor:
        x = _through(self.decoder, self.from_latent(raw.transpose(1, 2)).transpose(1, 2)).transpose(1, 2)
        return self.unmerge(x).unflatten(2, (BANDS, FRAMES)).permute(0, 2, 1, 3).flatten(2).float()


def _whole(wave: Tensor) -> Tensor:
    """Fill the last latent step with silence."""
    return F.pad(wave, (0, -wave.shape[-1] % (HOP * FRAMES)))


def _through(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    for block in blocks:
        x = block(x)
    return x
