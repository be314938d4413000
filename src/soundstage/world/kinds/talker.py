"""A face says vowels; the mouth opens with the loudness and is as wide as the vowel."""

from __future__ import annotations

import numpy as np

from soundstage.world.spec import SIZES, Scene
from soundstage.world.stage import Envelope, Stage, rgb

FORMANTS = {"ah": (730, 1090, 2440), "ee": (270, 2290, 3010), "oo": (300, 870, 2240)}  # Hz
MOUTH = {"ah": (0.42, 0.36), "ee": (0.62, 0.17), "oo": (0.2, 0.22)}  # half width, half height / face radius
SCALE = 2.2  # face radius / the radius of its size
ATTACK, RELEASE = 0.04, 0.09


def voice(size: str) -> float:
    """f0 in Hz: larger faces speak lower."""
    return 18.7 / SIZES[size]


def formant_weights(f0: float, vowel: str, sample_rate: int) -> np.ndarray:
    """Level of each harmonic: a falling source through three resonances of 90, 120 and 180 Hz half width."""
    freqs = f0 * np.arange(1, int(min(4000, 0.45 * sample_rate) / f0) + 1)
    gain = sum(
        level / (1 + ((freqs - centre) / width) ** 2)
        for centre, width, level in zip(FORMANTS[vowel], (90, 120, 180), (1.0, 0.7, 0.3), strict=True)
    )
    weights = (gain + 0.02) / np.sqrt(freqs / freqs[0])
    return weights / np.sqrt((weights**2).sum())


def syllable(tau: np.ndarray, length: float) -> np.ndarray:
    """Loudness in [0, 1] at `tau` seconds into a syllable: raised-cosine rise and fall."""
    rise, fall = np.clip(tau / ATTACK, 0, 1), np.clip((length - tau) / RELEASE, 0, 1)
    return 0.25 * (1 - np.cos(np.pi * rise)) * (1 - np.cos(np.pi * fall))


def perform(stage: Stage, scene: Scene) -> None:
    """One syllable per word of the pattern, with pauses between."""
    rng, vowels = stage.rng, scene.pattern
    slot = (stage.duration - 0.2) / len(vowels)
    starts = 0.08 + slot * (np.arange(len(vowels)) + rng.uniform(0.0, 0.25, len(vowels)))
    lengths = np.minimum(slot * rng.uniform(0.55, 0.7, len(vowels)), 0.5)
    fine = np.arange(0, stage.duration + 0.001, 0.001)
    loud = sum(syllable(fine - s, n) for s, n in zip(starts, lengths, strict=True))
    radius, f0, mixer = SCALE * scene.radius, voice(scene.size), stage.mixer
    nearest = np.argmin(np.abs(fine[:, None] - (starts + lengths / 2)[None]), axis=1)
    shape = np.array([MOUTH[v] for v in vowels])[nearest]
    wide = np.interp(stage.t, fine, shape[:, 0] * (0.7 + 0.3 * loud)) * radius
    tall = np.interp(stage.t, fine, shape[:, 1] * loud) * radius + 0.02 * radius
    dark = stage.background * 0.5
    stage.disc(0.5, 0.5, radius, rgb(scene.colour))
    for side in (-1, 1):
        stage.disc(0.5 + side * 0.38 * radius, 0.5 - 0.35 * radius, 0.12 * radius, dark)
    stage.ellipse(0.5, 0.5 + 0.38 * radius, wide, tall, dark)
    stage.track("face", 0.5, 0.5, radius)
    stage.envelopes["loudness"] = Envelope(fine, loud)
    stage.envelopes["aperture"] = Envelope(fine, shape[:, 1] * loud)
    for vowel, start, length in zip(vowels, starts, lengths, strict=True):
        where, tau = mixer.place(start, length)
        weights = formant_weights(f0, vowel, mixer.sample_rate)
        mixer.harmonics(where, 2 * np.pi * f0 * tau, weights, 0.28 * syllable(tau, length))
        stage.event(start, vowel, "mouth", 1.0, f0, 0.5, 0.5 + 0.38 * radius)
