"""What a sound track says by itself: onsets, pitches, drums, loudness and the course of a voice or an engine."""

from __future__ import annotations

import numpy as np

from soundstage.world.spec import DRUMS

ABSOLUTE = 0.012  # RMS below which nothing is an onset (-38 dB)
RELATIVE = 0.12  # an onset is at least this fraction of the loudest one
RISE = 1.9  # loudness after / before
ATTACK_DELAY = 0.0004  # seconds
DRUM_BANDS = ((80, 250), (290, 800), (900, 5000), (5500, 8000))  # Hz: kick, tom, snare, hat
DRUM_BAND_NAMES = ("kick", "tom", "snare", "hat")
VOWEL_BANDS = ((100, 480), (520, 1250), (1300, 1800), (1850, 3400))  # Hz


def _power(wave: np.ndarray) -> np.ndarray:
    return np.concatenate([[0.0], np.cumsum(wave.astype(np.float64) ** 2)])


def _rms(power: np.ndarray, start: np.ndarray, stop: np.ndarray) -> np.ndarray:
    """RMS over samples [start, stop); what lies outside the wave counts as silence."""
    last = len(power) - 1
    energy = power[np.clip(stop, 0, last)] - power[np.clip(start, 0, last)]
    return np.sqrt(np.maximum(energy, 0) / np.maximum(stop - start, 1))


def onsets(wave: np.ndarray, sample_rate: int) -> np.ndarray:
    """Seconds at which sounds start, from a mono (N,) wave.

    Loudness over the next 12 ms is compared with that from 30 to 8 ms before; each rise is then placed where the
    level climbs to the attack's peak. Silence has none, and a sound that is
    already there when the clip starts has none either.
    """
    power, hop = _power(wave), max(1, round(sample_rate / 1000))
    at = np.arange(0, len(wave), hop)
    ms = sample_rate / 1000
    after = _rms(power, at, at + round(12 * ms))
    before = _rms(power, at - round(30 * ms), at - round(8 * ms))
    strong = (after > RISE * before) & (after > ABSOLUTE) & (after > RELATIVE * after.max(initial=0))
    found: list[float] = []
    for group in np.split(np.flatnonzero(strong), np.flatnonzero(np.diff(np.flatnonzero(strong)) > 25) + 1):
        if len(group):
            best = group[np.argmax((after - before)[group])]
            found.append(_attack(power, int(at[best]), ms) / sample_rate)
    found = [t for t in found if t > 0.003]
    return np.array(_thin(found, 0.06))


def _thin(times: list[float], gap: float) -> list[float]:
    kept: list[float] = []
    for t in times:
        if not kept or t - kept[-1] >= gap:
            kept.append(t)
    return kept


def _attack(power: np.ndarray, near: int, ms: float) -> float:
    """Sample at which the level over 0.5 ms first gets 40 % of the way from what was before to the attack's peak.

    ATTACK_DELAY, measured on the world, is what this comes after the true start.
    """
    width = max(2, round(0.5 * ms))
    at = np.arange(near - round(14 * ms), near + round(24 * ms))
    level = _rms(power, at - width + 1, at + 1)
    rest = float(np.median(level[: round(6 * ms)]))
    first = int(np.argmax(level >= rest + 0.4 * (level.max() - rest)))
    return max(0.0, float(at[first]) - ATTACK_DELAY * 1000 * ms)


def spectrum(wave: np.ndarray, sample_rate: int, start: float, stop: float) -> tuple[np.ndarray, np.ndarray]:
    """(frequencies in Hz, magnitudes) of [start, stop) seconds under a window that falls from its start."""
    part = wave[max(0, round(start * sample_rate)) : max(0, round(stop * sample_rate))]
    if len(part) < 64:
        return np.zeros(1), np.zeros(1)
    window = np.cos(np.linspace(0, np.pi / 2, len(part))) ** 2
    window[:16] *= np.linspace(0, 1, 16)
    size = 1 << int(np.ceil(np.log2(max(len(part) * 4, sample_rate))))
    return np.fft.rfftfreq(size, 1 / sample_rate), np.abs(np.fft.rfft(part * window, size))


def peak_frequency(freqs: np.ndarray, mags: np.ndarray, low: float = 90, high: float = 3500) -> float:
    """Frequency in Hz of the highest peak, by a parabola through log magnitudes; nan where there is none."""
    inside = np.flatnonzero((freqs >= low) & (freqs <= high))
    if len(inside) < 3 or mags[inside].max() <= 1e-9:
        return float("nan")
    k = int(inside[np.argmax(mags[inside])])
    if not 0 < k < len(mags) - 1:
        return float(freqs[k])
    a, b, c = np.log(mags[k - 1 : k + 2] + 1e-12)
    bend = a - 2 * b + c
    return float(freqs[k] + (0.5 * (a - c) / bend if bend < 0 else 0.0) * (freqs[1] - freqs[0]))


def pitches(wave: np.ndarray, sample_rate: int, times: np.ndarray) -> np.ndarray:
    """(A,) Hz: the strongest partial of the 120 ms after each onset, or until the next one."""
    ends = np.append(times[1:], len(wave) / sample_rate)[: len(times)] - 0.004
    return np.array(
        [
            peak_frequency(*spectrum(wave, sample_rate, t + 0.002, min(t + 0.12, end)))
            for t, end in zip(times, ends, strict=True)
        ]
    )


def loudness_at(wave: np.ndarray, sample_rate: int, times: np.ndarray) -> np.ndarray:
    """(A,) RMS over the 30 ms after each onset."""
    at = np.round(np.asarray(times) * sample_rate).astype(int)
    return _rms(_power(wave), at, at + round(0.03 * sample_rate))


def drum_names(wave: np.ndarray, sample_rate: int, times: np.ndarray) -> tuple[str, ...]:
    """The drum of each onset: the band that holds the most energy in its first 60 ms."""
    names = []
    for t in times:
        freqs, mags = spectrum(wave, sample_rate, t, t + 0.06)
        energy = [float((mags[(freqs >= low) & (freqs < high)] ** 2).sum()) for low, high in DRUM_BANDS]
        names.append(DRUM_BAND_NAMES[int(np.argmax(energy))])
    assert set(names) <= set(DRUMS)
    return tuple(names)


def tempo(times: np.ndarray) -> float:
    """Beats per minute of an even train, by least squares over its beat numbers; nan where there is none."""
    if len(times) < 2:
        return float("nan")
    beat = float(np.median(np.diff(times)))
    if beat <= 0.02:
        return float("nan")
    number = np.round((times - times[0]) / beat)
    return 60 / float(np.polyfit(number, times, 1)[0]) if number[-1] > 0 else float("nan")


def loudness(wave: np.ndarray, sample_rate: int, width: float = 0.024) -> tuple[np.ndarray, np.ndarray]:
    """(t in seconds every 2 ms, RMS under a centred Hann window of `width` seconds)."""
    hop = max(1, round(0.002 * sample_rate))
    window = np.hanning(round(width * sample_rate) | 1)
    window /= window.sum()
    if not len(wave):
        return np.zeros(0), np.zeros(0)
    size = 1 << int(np.ceil(np.log2(len(wave) + len(window))))
    smooth = np.fft.irfft(np.fft.rfft(wave.astype(np.float64) ** 2, size) * np.fft.rfft(window, size), size)
    power = smooth[len(window) // 2 :][: len(wave) : hop]
    return np.arange(0, len(wave), hop) / sample_rate, np.sqrt(np.maximum(power, 0))


def f0_track(
    wave: np.ndarray, sample_rate: int, low: float = 62, high: float = 650, width: float = 0.064
) -> tuple[np.ndarray, np.ndarray]:
    """(t every 5 ms, f0 in Hz or nan where unvoiced) by normalised autocorrelation under a Hann window."""
    size, hop = round(width * sample_rate), round(0.005 * sample_rate)
    if len(wave) < size:
        return np.zeros(0), np.zeros(0)
    starts = np.arange(0, len(wave) - size + 1, hop)
    window = np.hanning(size)
    parts = wave[starts[:, None] + np.arange(size)].astype(np.float64) * window
    length = 1 << int(np.ceil(np.log2(2 * size)))
    corr = np.fft.irfft(np.abs(np.fft.rfft(parts, length)) ** 2, length)[:, :size]
    own = np.fft.irfft(np.abs(np.fft.rfft(window, length)) ** 2, length)[:size]
    first, last = int(sample_rate / high), min(int(sample_rate / low), size * 2 // 3)
    scaled = corr / np.maximum(corr[:, :1], 1e-9) / np.maximum(own / own[0], 0.02)
    region = scaled[:, first : last + 1]
    peak = (region[:, 1:-1] >= region[:, :-2]) & (region[:, 1:-1] >= region[:, 2:])
    good = peak & (region[:, 1:-1] >= 0.88 * region.max(1, keepdims=True))
    lag = np.argmax(good, 1) + 1 + first
    rows = np.arange(len(lag))
    a, b, c = (scaled[rows, lag + k] for k in (-1, 0, 1))
    bend = np.minimum(a - 2 * b + c, -1e-9)
    f0 = sample_rate / (lag + np.clip(0.5 * (a - c) / bend, -1, 1))
    voiced = good.any(1) & (b > 0.5) & (corr[:, 0] / size > (0.3 * ABSOLUTE) ** 2)
    return (starts + size / 2) / sample_rate, np.where(voiced, f0, np.nan)


def centre_frequency(wave: np.ndarray, sample_rate: int) -> float:
    """Hz below which half of the power lies; nan for silence."""
    mags = np.abs(np.fft.rfft(wave)) ** 2
    total = np.cumsum(mags)
    if len(wave) == 0 or total[-1] <= 1e-6:
        return float("nan")
    return float(np.searchsorted(total, total[-1] / 2) * sample_rate / len(wave))


def loud_starts(t: np.ndarray, loud: np.ndarray) -> np.ndarray:
    """Seconds at which loudness rises through half of each syllable's peak."""
    active = np.concatenate([[0], (loud > max(ABSOLUTE, 0.2 * loud.max(initial=0))).astype(int), [0]])
    edges = np.flatnonzero(np.diff(active))
    starts = []
    for first, last in zip(edges[::2], edges[1::2], strict=True):
        if t[last - 1] - t[first] > 0.05:
            half = 0.5 * np.percentile(loud[first:last], 80)
            k = first + int(np.argmax(loud[first:last] >= half))
            a, b = loud[max(k - 1, 0)], loud[k]
            starts.append(float(t[k] - (t[1] - t[0]) * ((b - half) / (b - a) if b > half > a else 0.0)))
    return np.array(starts)


def vowel_names(wave: np.ndarray, sample_rate: int, times: np.ndarray) -> tuple[str, ...]:
    """The vowel after each time: the one whose formants hold the largest share of the energy of 0.14 s."""
    names = []
    for t in times:
        freqs, mags = spectrum(wave, sample_rate, t, t + 0.16)
        share = [float((mags[(freqs >= low) & (freqs < high)] ** 2).sum()) for low, high in VOWEL_BANDS]
        total = sum(share) + 1e-12
        names.append("ah" if share[1] > 0.35 * total else "ee" if share[3] > share[1] else "oo")
    return tuple(names)
