"""Sound as arrays: resampling, channels, loudness and mel spectrograms. A wave is (channels, samples) float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np

from soundstage.media.errors import MediaError
from soundstage.media.geometry import half_up

# What each channel is, by channel count, in the order of ffmpeg's default layouts: Left, Right, Centre, Woofer.
ROLES = {1: "C", 2: "LR", 3: "LRC", 4: "LRLR", 5: "LRCLR", 6: "LRCWLR", 7: "LRCWCLR", 8: "LRCWLRLR"}


def resample(wave: np.ndarray, rate: int, new_rate: int) -> np.ndarray:
    """(channels, samples) -> (channels, samples * new_rate / rate to the nearest), band-limited (soxr)."""
    out = resampler(rate, new_rate, wave.shape[0])(wave, True)
    count = half_up(Fraction(wave.shape[1] * new_rate, rate))
    return np.pad(out[:, :count], ((0, 0), (0, max(count - out.shape[1], 0))))


def resampler(rate: int, new_rate: int, channels: int) -> Callable[[np.ndarray, bool], np.ndarray]:
    """A function (chunk, is_last) -> chunk that resamples a stream; what it puts out does not depend on the chunks."""
    if rate == new_rate:
        return lambda chunk, _: chunk
    try:
        import soxr
    except ImportError:
        raise MediaError("soxr is not installed", remedy='pip install "soundstage[media]"') from None
    stream = soxr.ResampleStream(rate, new_rate, channels, dtype="float32", quality="HQ")

    def convert(chunk: np.ndarray, is_last: bool) -> np.ndarray:
        out = stream.resample_chunk(np.ascontiguousarray(chunk.T, dtype=np.float32), last=is_last)
        return out.reshape(-1, channels).T

    return convert


def to_channels(wave: np.ndarray, channels: int) -> np.ndarray:
    """(channels', samples) -> (channels, samples): mono to any count by copying, any count to stereo or mono by mixing.

    Mixing follows ITU-R BS.775 (centre and surrounds at -3 dB, no woofer) with each row scaled to sum to one, so a wave
    within [-1, 1] stays there. Other changes raise MediaError.
    """
    count = len(wave)
    if channels == count:
        return wave
    if count == 1:
        return np.repeat(wave, channels, axis=0)
    if channels not in (1, 2) or count not in ROLES:
        raise MediaError(f"channels: cannot make {channels} of {count}", remedy="ask for 1, 2 or the file's own count")
    half = np.sqrt(0.5)
    left, right = ([_gain(role, side, index, half) for index, role in enumerate(ROLES[count])] for side in "LR")
    matrix = np.array([left, right] if channels == 2 else [np.add(left, right)])
    return ((matrix / matrix.sum(axis=1, keepdims=True)).astype(np.float32)) @ wave


def _gain(role: str, side: str, index: int, half: float) -> float:
    if role == "C":
        return half
    return (1.0 if index < 2 else half) if role == side else 0.0


def loudness(wave: np.ndarray, sample_rate: int) -> float:
    """Integrated loudness in LUFS (EBU R128, ITU-R BS.1770-4); -inf for silence.

    A wave shorter than the 0.4 s block of the standard counts as one block.
    """
    count = wave.shape[1]
    if count == 0:
        return float("-inf")
    power = np.square(_k_weighted(wave.astype(np.float64), sample_rate))
    block, hop = min(count, round(0.4 * sample_rate)), round(0.1 * sample_rate)
    total = np.concatenate([np.zeros((len(wave), 1)), np.cumsum(power, axis=1)], axis=1)
    starts = np.arange(0, count - block + 1, hop)
    mean = (total[:, starts + block] - total[:, starts]) / block
    roles = ROLES.get(len(wave), "L" * len(wave))
    # BS.1770 table 4: surrounds count 1.41 times, the woofer not at all.
    weights = [0.0 if r == "W" else 1.41 if r in "LR" and i > 2 else 1.0 for i, r in enumerate(roles)]
    energy = np.maximum(weights @ mean, 1e-30)
    for threshold in (-70.0, None):
        gate = 10 * np.log10(energy.mean()) - 0.691 - 10 if threshold is None else threshold
        energy = energy[10 * np.log10(energy) - 0.691 > gate]
        if not len(energy):
            return float("-inf")
    return float(10 * np.log10(energy.mean()) - 0.691)


def normalise_loudness(wave: np.ndarray, sample_rate: int, *, target: float = -23.0, peak: float = -1.0) -> np.ndarray:
    """The wave at `target` LUFS, or as loud as its sample peak at `peak` dBFS allows; silence is returned as it is."""
    level = loudness(wave, sample_rate)
    if level == float("-inf"):
        return wave
    gain = min(10 ** ((target - level) / 20), 10 ** (peak / 20) / max(float(np.abs(wave).max()), 1e-9))
    return (wave * gain).astype(np.float32)


def _k_weighted(wave: np.ndarray, rate: int) -> np.ndarray:
    """The two filters of BS.1770 (head shelf, then high pass), applied exactly in the frequency domain.

    Their analogue forms give the published 48 kHz coefficients and the right ones at other rates. The high pass at
    38 Hz has died out to below 1e-9 within the half second of padding.
    """
    size = wave.shape[1] + rate // 2
    size = 1 << (size - 1).bit_length()
    z = np.exp(-2j * np.pi * np.arange(size // 2 + 1) / size)
    k = np.tan(np.pi * 1681.974450955533 / rate)
    q, high = 0.7071752369554196, 10 ** (3.999843853973347 / 20)
    mid = high**0.4996667741545416
    shelf = (high + mid * k / q + k * k, 2 * (k * k - high), high - mid * k / q + k * k)
    response = _biquad(z, shelf, k, q) / (1 + k / q + k * k)
    k, q = np.tan(np.pi * 38.13547087602444 / rate), 0.5003270373238773
    response = response * _biquad(z, (1.0, -2.0, 1.0), k, q)
    return np.fft.irfft(np.fft.rfft(wave, size) * response, size)[:, : wave.shape[1]]


def _biquad(z: np.ndarray, b: tuple[float, float, float], k: float, q: float) -> np.ndarray:
    norm = 1 + k / q + k * k
    return (b[0] + b[1] * z + b[2] * z * z) / (1 + (2 * (k * k - 1) * z + (1 - k / q + k * k) * z * z) / norm)


@dataclass(frozen=True)
class MelConfig:
    """A log-mel spectrogram; the defaults are those of MMAudio's 16 kHz codec and of the vocoder that inverts it.

    pad: samples reflected at either end, so that samples / hop frames come out without centring.
    magnitude = sqrt(re^2 + im^2 + eps); result = log10(max(slaney mel basis @ magnitude, floor)).
    """

    sample_rate: int = 16000
    n_fft: int = 1024
    hop: int = 256
    num_mels: int = 80
    fmin: float = 0.0
    fmax: float = 8000.0
    pad: int = 384
    eps: float = 1e-9
    floor: float = 1e-5


MMAUDIO_16K = MelConfig()


def mel_spectrogram(wave: np.ndarray, config: MelConfig = MMAUDIO_16K) -> np.ndarray:
    """(..., samples) in [-1, 1] at config.sample_rate -> (..., num_mels, samples // hop) float32."""
    if wave.shape[-1] <= config.pad:
        raise MediaError(f"mel: {wave.shape[-1]} samples are too few", remedy=f"give more than {config.pad}")
    edges = [(0, 0)] * (wave.ndim - 1) + [(config.pad, config.pad)]
    padded = np.pad(np.clip(wave, -1, 1).astype(np.float32), edges, mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, config.n_fft, axis=-1)[..., :: config.hop, :]
    spectrum = np.fft.rfft(windows * hann(config.n_fft), axis=-1)
    magnitude = np.sqrt(spectrum.real**2 + spectrum.imag**2 + config.eps)
    mel = np.swapaxes(magnitude @ mel_basis(config).T.astype(magnitude.dtype), -1, -2)
    return np.log10(np.maximum(mel, config.floor)).astype(np.float32)


def hann(size: int) -> np.ndarray:
    """(size,) float32 periodic Hann window."""
    return (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)).astype(np.float32)


@lru_cache(maxsize=8)
def mel_basis(config: MelConfig) -> np.ndarray:
    """(num_mels, n_fft // 2 + 1) float32 triangles of unit area on Slaney's scale (linear, from 1 kHz logarithmic)."""
    edges = _mel_to_hz(np.linspace(_hz_to_mel(config.fmin), _hz_to_mel(config.fmax), config.num_mels + 2))
    bins = np.arange(config.n_fft // 2 + 1) * config.sample_rate / config.n_fft
    rising = (bins - edges[:-2, None]) / np.diff(edges)[:-1, None]
    falling = (edges[2:, None] - bins) / np.diff(edges)[1:, None]
    triangles = np.maximum(0, np.minimum(rising, falling))
    return (triangles * (2 / (edges[2:] - edges[:-2]))[:, None]).astype(np.float32)


# Slaney's scale: 200/3 Hz per mel up to 1 kHz, then 27 mels per factor 6.4.
STEP, LOG_FROM, LOG_STEP = 200 / 3, 1000.0, np.log(6.4) / 27


def _hz_to_mel(hz: float) -> float:
    return hz / STEP if hz < LOG_FROM else LOG_FROM / STEP + float(np.log(hz / LOG_FROM)) / LOG_STEP


def _mel_to_hz(mel: np.ndarray) -> np.ndarray:
    knee = LOG_FROM / STEP
    return np.where(mel < knee, mel * STEP, LOG_FROM * np.exp(LOG_STEP * (np.maximum(mel, knee) - knee)))
