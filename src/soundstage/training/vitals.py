"""Vital signs of samples, for validation: brightness, saturation, loudness, sync, and the teacher's variety."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from soundstage.core.av import AV
from soundstage.core.errors import ShapeError
from soundstage.training.state import Validation

__all__ = ["Vitals", "coverage", "diversity", "look"]

Samples = Callable[[Validation], AV[Tensor]]
"""Media made the same way at every step: fixed prompts and seeds."""


def look(media: AV[Tensor]) -> dict[str, float]:
    """brightness and saturation in [0, 1], loudness in dB of full scale, means over the samples.

    media: video (B, C, F, H, W) and audio (B, channels, N) in [-1, 1]. Brightness is the mean of the channels, weighted
    as Rec. 709 where they are three; saturation the distance of the greatest and the least.
    """
    found: dict[str, float] = {}
    if "video" in media:
        video = media["video"].float()
        channels = video.shape[1]
        luma = (0.2126, 0.7152, 0.0722) if channels == 3 else (1 / channels,) * channels
        found["brightness"] = float((torch.einsum("bcfhw,c->bfhw", video, video.new_tensor(luma)).mean() + 1) / 2)
        found["saturation"] = float((video.amax(1) - video.amin(1)).mean() / 2)
    if "audio" in media:
        power = media["audio"].float().square().flatten(1).mean(1)
        found["loudness"] = float((10 * (power + 1e-8).log10()).mean())
    return found


def diversity(x: Tensor, seeds: int | None = None) -> float:
    """Mean root-mean-square distance between samples of different seeds.

    x: (B, ...). seeds: every so many samples are of one prompt, and only they are compared; None = all are.
    Raises ShapeError where B is not a multiple of `seeds`, or there are not two of a prompt.
    """
    seeds = len(x) if seeds is None else seeds
    if seeds < 2 or len(x) % seeds:
        raise ShapeError(f"{len(x)} samples are not prompts of {seeds} seeds each; make two or more of each prompt")
    groups = x.flatten(1).double().unflatten(0, (-1, seeds))
    apart = torch.cdist(groups, groups) / groups.shape[2] ** 0.5
    return float(apart.sum((1, 2)).mean() / (seeds * (seeds - 1)))


def coverage(true: Tensor, made: Tensor, neighbours: int = 5) -> float:
    """Share of the true samples that have a made one nearer than their own k-th neighbour (arXiv:2002.09797).

    true, made: (B, ...). Nearly 1 - 2^-k for two samples of one distribution; a mode that is not made takes its share
    away. Raises ShapeError for too few true samples.
    """
    if len(true) <= neighbours:
        raise ShapeError(f"{len(true)} samples have no {neighbours}-th neighbour; make more, or lower neighbours")
    x, y = true.flatten(1).double(), made.flatten(1).double()
    # the nearest of all is the sample itself
    radius = torch.cdist(x, x).kthvalue(neighbours + 1, dim=1).values
    return float((torch.cdist(x, y).amin(1) <= radius).double().mean())


@dataclass(frozen=True)
class Vitals:
    """A validation function whose numbers `Health` judges.

    student, teacher: make media (or latents) of the same prompts and seeds, the teacher's once per process. seeds: how
    many samples in a row share a prompt, None = all. features: what distances are taken of, per modality (B, ...);
    None = the media themselves. sync: how well sound and picture of media fit, more is better: what each modality by
    itself cannot show. scores: a validation function whose numbers are added.

    Logged: brightness, saturation, loudness, sync, diversity/M; with a teacher the same under teacher/..., and
    coverage/M.
    """

    student: Samples
    teacher: Samples | None = None
    seeds: int | None = None
    features: Callable[[AV[Tensor]], AV[Tensor]] | None = None
    neighbours: int = 5
    sync: Callable[[AV[Tensor]], float] | None = None
    scores: Callable[[Validation], Mapping[str, float]] | None = None
    _kept: _Kept = field(default_factory=lambda: _Kept(), init=False, repr=False, compare=False)

    def __call__(self, validation: Validation) -> dict[str, float]:
        """The numbers of a run at a moment."""
        with torch.no_grad():
            found, made = self._of(self.student(validation))
            if self.teacher is not None:
                teacher = self.teacher
                reference, true = self._kept.first(lambda: self._of(teacher(validation)))
                found |= {f"teacher/{name}": value for name, value in reference.items()}
                found |= {
                    f"coverage/{name}": coverage(x, made[name], self.neighbours)
                    for name, x in true.items()
                    if len(x) > self.neighbours
                }
        return found | dict(self.scores(validation) if self.scores else {})

    def _of(self, media: AV[Tensor]) -> tuple[dict[str, float], AV[Tensor]]:
        """Numbers and features of samples."""
        features = media if self.features is None else self.features(media)
        spread = {f"diversity/{name}": diversity(x, self.seeds) for name, x in features.items() if len(x) > 1}
        fits = {} if self.sync is None else {"sync": self.sync(media)}
        return look(media) | fits | spread, features.map(lambda x: x.detach().cpu())


class _Kept:
    """Remembers what was made first: the teacher does not change."""

    def __init__(self) -> None:
        self._found: tuple[dict[str, float], AV[Tensor]] | None = None

    def first(self, make: Callable[[], tuple[dict[str, float], AV[Tensor]]]) -> tuple[dict[str, float], AV[Tensor]]:
        """The result of the first call of all."""
        if self._found is None:
            self._found = make()
        return self._found
