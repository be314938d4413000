"""Measures of sound while it is decoded: levels every 2 ms, and spectra, noise and stereo every second."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import numpy as np

from soundstage.data.prints import sound_prints
from soundstage.media.sync import audio_onsets, levels
from soundstage.media.waves import hann

__all__ = ["SoundMeter", "bandwidth", "from_levels", "noise_power", "spectrogram"]

BLOCK = 4  # seconds measured together
CONTEXT = 1  # seconds of the block before, for what begins at its end
BANDS = 64  # equal bands up to half the sample rate, in which a cut-off is looked for
LOUD = 0.5  # of full scale
FULL = 0.999  # samples at or above it are clipped where three come in a row
EVEN = 0.7  # evenness of the quietest tenth from which it is a pause
NOTHING = -93.0  # dB full scale in a band: quieter than any microphone
FLOOR = -120.0  # dB full scale; what is stored in a byte begins here


class SoundMeter:
    """Takes a wave in pieces and gives its traces: arrays by name.

    Every 2 ms: "sound" (uint8, half decibels above -120 dB full scale). By the event: "onsets" (seconds). Every 0.1 s:
    "energy" (K-weighted mean square, as loudness is gated), "sounds" (see data.prints). Every second: "peak",
    "clipped" and "loud" (samples at full scale in runs, and from half of it), "dc", "left", "right", "product" (mean
    squares and mean product), "power", "noise" (mean square of the mix and what of it is noise, nan where nothing
    pauses), "voiced" (share), "spectrum" and "usual" (N, 64: loudest and median level per band, coded as "sound").
    """

    def __init__(self, sample_rate: int) -> None:
        self.rate, self.samples, self.channels = sample_rate, 0, 0
        self._held: list[np.ndarray] = []
        self._count = 0
        self._before: np.ndarray | None = None
        self._traces: dict[str, list[np.ndarray]] = {}

    def add(self, wave: np.ndarray) -> None:
        """Take (channels, samples) float32."""
        self.channels = self.channels or len(wave)
        self._held.append(wave)
        self._count += wave.shape[1]
        # One second more than a block is held back, so that the last block is never a mere rest.
        while self._count >= (BLOCK + 1) * self.rate:
            whole = np.concatenate(self._held, axis=1)
            size = BLOCK * self.rate
            self._measure(whole[:, :size])
            self._held, self._count = [whole[:, size:]], whole.shape[1] - size

    def close(self) -> dict[str, np.ndarray]:
        """The traces of everything taken."""
        if self._count:
            self._measure(np.concatenate(self._held, axis=1))
            self._held, self._count = [], 0
        return {name: np.concatenate(parts) for name, parts in self._traces.items()}

    def _measure(self, wave: np.ndarray) -> None:
        rate, begin = self.rate, self.samples
        mono = wave.mean(axis=0)
        lead = np.zeros(0, np.float32) if self._before is None else self._before
        onsets = audio_onsets(np.concatenate([lead, mono])[None], rate) + (begin - len(lead)) / rate
        self._put("onsets", onsets[onsets >= begin / rate - 1e-9].astype(np.float64))
        self._put("sound", to_levels(levels(mono[None], rate) ** 2))
        spectra = [spectrum(channel, rate) for channel in wave]
        energy = sum(_squares(each) @ _k_response(rate) for each in spectra)
        self._put("energy", _tenths(energy, wave.shape[1], rate))
        seconds = max(1, round(wave.shape[1] / rate))
        edges = np.linspace(0, wave.shape[1], seconds + 1).astype(int)
        parts = [wave[:, low:high] for low, high in pairwise(edges)]
        left, right = (np.array([_square(part[side]) for part in parts]) for side in (0, min(1, len(wave) - 1)))
        cross = [float(part[0] @ part[min(1, len(part) - 1)]) / part.shape[1] for part in parts]
        self._put("left", left)
        self._put("right", right)
        self._put("product", np.array(cross))
        self._put("peak", np.array([np.abs(part).max(initial=0) for part in parts]))
        self._put("clipped", np.array([_clipped(part) for part in parts]))
        self._put("loud", np.array([np.count_nonzero(np.abs(part) >= LOUD, axis=1).max() for part in parts]))
        self._put("dc", np.array([np.abs(part.mean(axis=1)).max() for part in parts]))
        power = _squares(spectra[0] if len(spectra) == 1 else sum(spectra) * np.float32(1 / len(spectra)))
        noise = noise_power(power)
        self._put("noise", np.full(seconds, noise.sum() if pauses(power) > EVEN else np.nan))
        self._put("sounds", sound_prints(power, rate, wave.shape[1] / rate))
        cuts = np.linspace(0, len(power), seconds + 1).astype(int)
        rows = [slice(low, max(high, low + 1)) for low, high in pairwise(cuts)]
        voiced = _voiced(power, noise, rate)
        self._put("power", np.array([float(power[part, 1:].sum(axis=1).mean()) for part in rows]))
        self._put("voiced", np.array([voiced[part].mean() for part in rows]))
        self._put("spectrum", np.stack([to_levels(_bands(power[part].max(axis=0))) for part in rows]))
        self._put("usual", np.stack([to_levels(_bands(np.median(power[part], axis=0))) for part in rows]))
        self._before = mono[-CONTEXT * rate :]
        self.samples += wave.shape[1]

    def _put(self, name: str, values: np.ndarray) -> None:
        values = values.astype(np.float32) if values.dtype == np.float64 and name != "onsets" else values
        self._traces.setdefault(name, []).append(values)


def to_levels(power: np.ndarray) -> np.ndarray:
    """Mean squares -> uint8 half decibels above -120 dB full scale."""
    return np.rint(np.clip(2 * (10 * np.log10(np.maximum(power, 1e-12)) - FLOOR), 0, 255)).astype(np.uint8)


def from_levels(levels: np.ndarray) -> np.ndarray:
    """The decibels of `to_levels`."""
    return levels.astype(np.float32) / 2 + FLOOR


def spectrogram(mono: np.ndarray, rate: int) -> np.ndarray:
    """(samples,) -> (T, bins) power in windows of about 43 ms, half overlapped; a row sums to its mean square."""
    return _squares(spectrum(mono, rate))


def spectrum(mono: np.ndarray, rate: int) -> np.ndarray:
    """(samples,) -> (T, bins) complex, whose squares are `spectrogram`."""
    size = _window(rate)
    if len(mono) < size:
        mono = np.pad(mono, (0, size - len(mono)))
    windows = np.lib.stride_tricks.sliding_window_view(mono, size)[:: size // 2]
    window = hann(size)
    return np.fft.rfft(windows * (window * np.float32(np.sqrt(2 / (size * (window**2).sum())))), axis=1)


def _squares(spectra: np.ndarray) -> np.ndarray:
    power = spectra.real**2 + spectra.imag**2
    power[:, [0, -1]] /= 2  # all others stand for two
    return power


def noise_power(power: np.ndarray) -> np.ndarray:
    """(T, bins) of `spectrogram` -> (bins,) what of it is steady noise, in mean squares; the lowest bin is left out.

    In bands, what is left in the quietest tenth of the time (pauses). Where the lowest quarter of a band's bins lies
    3 dB lower still (a tone that never pauses, seen between its harmonics), that. Both are corrected for how low such
    a quantile of smoothed noise lies.
    """
    count, bins = power.shape
    narrow = [1, 3, 6, 12, 24, 48]
    edges = np.array([edge for edge in narrow if edge < bins - 24] + [*range(72, bins - 24, 24), bins])
    spread = np.diff(edges)
    band = np.add.reduceat(power, edges[:-1], axis=1)
    if count >= 8:
        smooth = (band[:-2] + band[1:-1] + band[2:]) / 3
        # Three half overlapped windows of n bins are about 2 n independent squares; pauses hold the lower part of them.
        quiet = 1.06 * np.quantile(smooth, 0.1, axis=0) / (1 - 0.9 / np.sqrt(2.0 * spread + 1))
    else:
        quiet = band.min(axis=0)
    mean, low = power.mean(axis=0), 1 - 0.67 / np.sqrt(max(0.75 * count, 1.0))
    for index, (begin, end) in enumerate(pairwise(edges)):
        if end - begin >= 24:
            valley = float(np.quantile(mean[begin:end], 0.25)) * (end - begin) / low
            quiet[index] = valley if valley < quiet[index] / 2 else quiet[index]
    return np.concatenate([[0.0], np.repeat(quiet / spread, spread)])


def pauses(power: np.ndarray) -> float:
    """(T, bins) of `spectrogram` -> how even the spectrum of the quietest tenth is within bands, 0 to 1.

    Noise alone gives nearly 1, tones much less: then nothing pauses, and what is steady is not known to be noise.
    """
    level = power[:, 1:].sum(axis=1)
    quietest = np.argsort(level, kind="stable")[: max(len(level) // 10, 4)]
    mean = power[quietest, 1:].mean(axis=0) + 1e-13
    rows = mean[: len(mean) // 24 * 24].reshape(-1, 24)
    return float((24 * np.exp(np.log(rows).mean(axis=1))).sum() / rows.sum())


def bandwidth(spectrum: np.ndarray, rate: int) -> float:
    """(64,) decibels per equal band -> Hz up to which the sound reaches, if it ends in a wall; else half the rate.

    A wall: below it most of eight bands hold sound, three bands further there is 25 dB less, and from there up next to
    nothing at all. That is what sampling or coding at a lower rate leaves; sound that only fades out has none.
    """
    above = np.maximum.accumulate(spectrum[::-1])[::-1]  # the loudest from here up
    for band in range(2, BANDS - 3):
        below = spectrum[max(0, band - 8) : band]
        if above[band + 2] < min(NOTHING, float(np.median(below)) - 20, float(below[-3:].max()) - 25):
            return rate / 2 * (band + 1) / BANDS
    return rate / 2


def _window(rate: int) -> int:
    """A power of two near 43 ms."""
    return 1 << max(6, round(np.log2(rate * 0.043)))


def _square(x: np.ndarray) -> float:
    return float(np.dot(x, x)) / max(len(x), 1)


def _clipped(wave: np.ndarray) -> int:
    """Samples, of the channel with most of them, that lie in runs of three or more at full scale."""
    full = np.abs(wave) >= FULL
    if not full.any():
        return 0
    three = full[:, :-2] & full[:, 1:-1] & full[:, 2:]
    run = np.zeros_like(full)
    for shift in range(3):
        run[:, shift : shift + three.shape[1]] |= three
    return int(run.sum(axis=1).max())


def _bands(power: np.ndarray) -> np.ndarray:
    """(bins,) -> (64,) sums over equal bands."""
    edges = np.linspace(0, len(power) - 1, BANDS + 1).astype(int)
    return np.add.reduceat(power[:-1], edges[:-1])


def _tenths(energy: np.ndarray, samples: int, rate: int) -> np.ndarray:
    """(T,) K-weighted mean squares of windows -> (N,), one each 0.1 s."""
    count = max(1, round(10 * samples / rate))
    centres = (np.arange(len(energy)) + 1) * (_window(rate) // 2) / rate
    return np.interp((np.arange(count) + 0.5) * samples / rate / count, centres, energy)


@lru_cache(maxsize=8)
def _k_response(rate: int) -> np.ndarray:
    """(bins,) float32 power response of the two filters of BS.1770, from their analogue forms."""
    size = _window(rate)
    f = 1j * np.arange(size // 2 + 1) * rate / size
    low, q, gain = 1681.974450955533, 0.7071752369554196, 10 ** (3.999843853973347 / 20)
    s = f / low
    shelf = (gain * s * s + gain**0.4996667741545416 / q * s + 1) / (s * s + s / q + 1)
    s = f / 38.13547087602444
    high = s * s / (s * s + s / 0.5003270373238773 + 1)
    return (np.abs(shelf * high) ** 2).astype(np.float32)


def _voiced(power: np.ndarray, noise: np.ndarray, rate: int) -> np.ndarray:
    """(T, bins), (bins,) -> (T,) whether a window holds a voice: a pitch of 70 to 400 Hz with several harmonics."""
    top = min(power.shape[1] - 1, round(4000 / rate * 2 * (power.shape[1] - 1)))
    floor = noise[: top + 1]
    part = np.maximum(power[:, : top + 1] - 2 * floor, 0)
    loud = part.sum(axis=1) > floor.sum() + 1e-8
    root = np.sqrt(part)
    correlation = np.fft.irfft(root, axis=1)
    rate_of_lags = rate * top / (power.shape[1] - 1)  # the sample rate that ends at the highest bin kept
    first, last = (max(2, round(rate_of_lags / hz)) for hz in (400, 70))
    correlation = correlation[:, : last + 2] / np.maximum(correlation[:, :1], 1e-12)
    peak = correlation[:, first:].max(axis=1)
    # A voice spreads over octaves; a struck body rings in one or two.
    octaves = [
        slice(round(lo / 4000 * top), round(hi / 4000 * top)) for lo, hi in ((150, 500), (500, 1200), (1200, 4000))
    ]
    share = np.stack([part[:, octave].sum(axis=1) for octave in octaves], axis=1)
    rich = (share > 0.003 * share.sum(axis=1, keepdims=True)).all(axis=1)
    return (loud & rich & (peak > 0.3)).astype(np.float32)
