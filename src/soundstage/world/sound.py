"""Sound sources of the world: struck bodies, drums, harmonic stacks and band noise, placed at continuous times."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from soundstage.world.spec import MATERIALS

ATTACK = 0.0004  # seconds of linear rise; a struck body speaks within half a millisecond
PEAK = 0.6


class Mixer:
    """A mono wave that sounds are added to."""

    def __init__(self, num_samples: int, sample_rate: int) -> None:
        self.sample_rate = sample_rate
        self.wave = np.zeros(num_samples, np.float32)
        self.t = np.arange(num_samples) / sample_rate

    def place(self, start: float, length: float) -> tuple[slice, np.ndarray]:
        """Samples that lie in [start, start + length) and their times since `start`, in seconds."""
        first = max(0, int(np.ceil(start * self.sample_rate)))
        last = min(len(self.wave), int(np.ceil((start + length) * self.sample_rate)))
        where = slice(first, max(first, last))
        return where, np.arange(first, max(first, last)) / self.sample_rate - start

    def strike(self, start: float, f0: float, material: str, amp: float) -> None:
        """A struck body: sum of damped cosines, in phase at `start` (modal synthesis)."""
        body = MATERIALS[material]
        where, tau = self.place(start, 7 * max(body.decays))
        self.wave[where] += PEAK * amp * self._modes(tau, f0, body.ratios, body.levels, body.decays)

    def _modes(
        self,
        tau: np.ndarray,
        f0: float,
        ratios: tuple[float, ...],
        levels: tuple[float, ...],
        decays: tuple[float, ...],
    ) -> np.ndarray:
        tau = tau.astype(np.float32)
        out = np.zeros_like(tau)
        kept = 0.0
        for ratio, level, decay in zip(ratios, levels, decays, strict=True):
            if ratio * f0 < 0.45 * self.sample_rate:
                out += level * np.cos(np.float32(2 * np.pi * ratio * f0) * tau) * np.exp(tau * np.float32(-1 / decay))
                kept += level
        return out * np.minimum(1, tau / np.float32(ATTACK)) / max(kept, 1.0)

    def drum(self, start: float, name: str, amp: float) -> None:
        """One hit of a fixed kit: kick and tom are damped tones, snare and hat are noise bursts."""
        where, tau = self.place(start, 0.35)
        wave = {
            "kick": lambda: self._modes(tau, DRUM_PITCH["kick"], (1.0, 3.0), (1.0, 0.2), (0.06, 0.006)),
            "tom": lambda: self._modes(tau, DRUM_PITCH["tom"], (1.0, 1.59), (1.0, 0.3), (0.08, 0.04)),
            "snare": lambda: self._burst(tau, 0.05, 900, 5000),
            "hat": lambda: self._burst(tau, 0.022, 5500, 7900),
        }[name]()
        self.wave[where] += PEAK * amp * wave

    def _burst(self, tau: np.ndarray, decay: float, low: float, high: float) -> np.ndarray:
        noise = band_noise(round(0.4 * self.sample_rate), self.sample_rate, low, high, 11)[: len(tau)]
        return 1.4 * noise * np.exp(-tau / decay) * np.minimum(1, tau / ATTACK)

    def harmonics(self, where: slice, phase: np.ndarray, weights: np.ndarray, amp: np.ndarray) -> None:
        """Add amp * sum_h weights[h] sin((h + 1) phase), evaluated by Horner's rule on exp(i phase)."""
        turn = np.exp(1j * phase).astype(np.complex64)
        total = np.zeros_like(turn)
        for weight in weights[::-1]:
            total = (total + np.float32(weight)) * turn
        self.wave[where] += (amp * total.imag).astype(np.float32)


DRUM_PITCH = {"kick": 165.0, "tom": 380.0}


@lru_cache(maxsize=64)
def band_noise(num_samples: int, sample_rate: int, low: float, high: float, seed: int) -> np.ndarray:
    """Unit-peak noise between `low` and `high` Hz with soft edges, (num_samples,) float32, fixed by its seed."""
    white = np.random.Generator(np.random.Philox(key=[seed, num_samples])).standard_normal(num_samples)
    spectrum = np.fft.rfft(white)
    freqs = np.fft.rfftfreq(num_samples, 1 / sample_rate)
    edge = 1 / ((1 + (low / np.maximum(freqs, 1.0)) ** 8) * (1 + (freqs / high) ** 8))
    noise = np.fft.irfft(spectrum * edge, num_samples)
    noise = (noise / (3 * noise.std())).clip(-1, 1).astype(np.float32)
    noise.setflags(write=False)
    return noise


def rumble(num_samples: int, sample_rate: int, f0: float, seed: int) -> np.ndarray:
    """Noise of constant envelope around f0, (num_samples,) float32: a sine whose frequency wanders at random.

    A flat envelope lets loudness carry the speed alone, which band-passed Gaussian noise would blur by its own beats.
    """
    wander = band_noise(num_samples, sample_rate, 0.02 * f0, 0.35 * f0, seed)
    phase = np.cumsum(2 * np.pi * f0 / sample_rate * (1 + 0.6 * wander.astype(np.float64)))
    return np.sin(phase).astype(np.float32)
