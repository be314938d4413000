"""Fidelity: terms that look at decoded clips through networks of your own, beside any objective of the student.

How alike two clips look (`Perceptual`), whether the picture flickers where nothing but motion is (`Temporal`), whether
what was to stay has stayed (`Background`), whether the product is still the product (`Identity`), and any other measure
(`Likeness`, such as spectra of the sound). Nothing is fetched: a network is a callable in the configuration, or the
name of a role, frozen as the teacher is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from soundstage.core.av import AV
from soundstage.core.denoiser import Losses
from soundstage.core.errors import ConfigError, one_of
from soundstage.core.flow import noised, to_x0
from soundstage.core.rng import Rng
from soundstage.core.times import Joint, Uniform
from soundstage.objectives.base import Batch, Nets, mean_where
from soundstage.objectives.reconstruction import Measure
from soundstage.objectives.regression import Pair, Pairs, Solved
from soundstage.objectives.rollout import Given, Rollout, Simulate

__all__ = [
    "Background",
    "Fidelity",
    "Identity",
    "Likeness",
    "Noised",
    "OwnSample",
    "Perceptual",
    "Predicted",
    "Shown",
    "Source",
    "Temporal",
    "Term",
    "warped_error",
]

Network = Callable[..., Any] | str
"""A callable, or the role that is one."""


@dataclass(frozen=True, eq=False)
class Shown:
    """What a term looks at. made: the student's clips, with their gradient; aim: the clips they are to be like.

    Both are media: video (B, 3, F, H, W) and audio (B, channels, N) in [-1, 1]. mask: (B, 1, F, H, W), 1 where the
    picture is to be new, None where the conditions have no mask. control: decodes the conditions' control.
    """

    made: AV[Tensor]
    aim: AV[Tensor]
    mask: Tensor | None
    control: Callable[[], AV[Tensor]]
    batch: Batch
    nets: Nets
    rng: Rng

    def network(self, named: Network) -> Callable[..., Any]:
        """The network of a term; raises ConfigError for a role that the run does not have."""
        return _network(named, self.nets)

    def frames(self, count: int | None) -> Tensor:
        """Indices of so many frames, drawn for the whole batch, in order; of all for None."""
        length = self.made["video"].shape[2]
        if count is None or count >= length:
            return torch.arange(length)
        return self.rng.everywhere().fold("frames").uniform(length)[0].argsort()[:count].sort().values


class Term(Protocol):
    """Values (B,) of each modality it judges, one loss term "name/modality" each; none where it has nothing to see."""

    @property
    def name(self) -> str: ...

    def __call__(self, shown: Shown) -> Mapping[str, Tensor]: ...


@dataclass(frozen=True)
class Perceptual:
    """Distance of deep features, normalised along channels (arXiv:1801.03924, eq. 1, with all weights 1).

    features: frames (N, 3, H, W) -> maps (N, C, h, w), one or several. frames: of each clip, so many are drawn.
    """

    features: Network
    frames: int | None = None
    name: str = "perceptual"

    def __call__(self, shown: Shown) -> Mapping[str, Tensor]:
        """Of the picture."""
        if "video" not in shown.made:
            return {}
        at, network = shown.frames(self.frames), shown.network(self.features)
        made = _maps(network(_flat(shown.made["video"][:, :, at])))
        with torch.no_grad():
            aim = _maps(network(_flat(shown.aim["video"][:, :, at])))
        layers = [
            (F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(1).flatten(1).mean(1)
            for a, b in zip(made, aim, strict=True)
        ]
        return {"video": torch.stack(layers).sum(0).unflatten(0, (-1, len(at))).mean(1)}


@dataclass(frozen=True)
class Temporal:
    """How much worse the next frame, moved back along the flow, fits each frame of the student's than of the aim's.

    flow: (frames, next), each (N, 3, H, W) -> (N, 2, H, W): how many pixels right and down each pixel has gone.
    of: whose motion the student's clip must keep to: the aim's, where both are to show the same, or its own, which
        forbids flicker alone. A perfect clip costs nothing even where the flow is wrong.
    """

    flow: Network
    of: Literal["aim", "made"] = "aim"
    name: str = "temporal"

    def __post_init__(self) -> None:
        if self.of not in ("aim", "made"):
            raise one_of("Temporal.of", self.of, ("aim", "made"))

    def __call__(self, shown: Shown) -> Mapping[str, Tensor]:
        """Of the picture."""
        if "video" not in shown.made or shown.made["video"].shape[2] < 2:
            return {}
        made, aim, flow = shown.made["video"], shown.aim["video"], shown.network(self.flow)
        with torch.no_grad():
            allowed = warped_error(aim, aim, flow)
        return {"video": (warped_error(made, aim if self.of == "aim" else made, flow) - allowed).clamp_min(0)}


@dataclass(frozen=True)
class Background:
    """Mean absolute difference outside the conditions' mask, grown by `margin` pixels.

    against: the "aim", or the conditions' "control" (the source clip of an edit), decoded.
    """

    against: Literal["aim", "control"] = "aim"
    margin: int = 4
    name: str = "background"

    def __post_init__(self) -> None:
        if self.against not in ("aim", "control"):
            raise one_of("Background.against", self.against, ("aim", "control"))

    def __call__(self, shown: Shown) -> Mapping[str, Tensor]:
        """Of the picture; raises ConfigError without a mask, or without the control it asks for."""
        if "video" not in shown.made:
            return {}
        if shown.mask is None:
            raise ConfigError("Background: the conditions have no mask of the picture; give the data one, or drop it")
        true = shown.aim["video"] if self.against == "aim" else shown.control()["video"]
        size = 2 * self.margin + 1
        outside = 1 - F.max_pool3d(shown.mask, (1, size, size), 1, (0, self.margin, self.margin))
        error = (shown.made["video"] - true).abs().mean(1, keepdim=True)
        return {"video": _weighted(error, outside)}


@dataclass(frozen=True)
class Identity:
    """1 - cosine between embeddings of the product as made and as it is (as measured by CLIP-I and DINO-I).

    embed: pictures (N, 3, size, size) in [-1, 1] -> (N, D). reference: from the batch to pictures of the product
    (B, 3, h, w), None = the product in the aim's same frame. The product is cut out by the conditions' mask, on a white
    square with `pad` of its size around it; without a mask the whole frame is. Frames that do not show it do not count.
    """

    embed: Network
    reference: Callable[[Batch], Tensor] | None = None
    size: int = 224
    pad: float = 0.1
    frames: int | None = None
    name: str = "identity"

    def __call__(self, shown: Shown) -> Mapping[str, Tensor]:
        """Of the picture."""
        if "video" not in shown.made:
            return {}
        at, embed = shown.frames(self.frames), shown.network(self.embed)
        frames = _flat(shown.made["video"][:, :, at])
        mask = torch.ones_like(frames[:, :1]) if shown.mask is None else _flat(shown.mask[:, :, at])
        made = embed(_cut(frames, mask, self.size, self.pad))
        with torch.no_grad():
            if self.reference is None:
                true = embed(_cut(_flat(shown.aim["video"][:, :, at]), mask, self.size, self.pad))
            else:
                pictures = self.reference(shown.batch).to(frames)
                true = embed(_cut(pictures, torch.ones_like(pictures[:, :1]), self.size, 0.0))
                true = true.repeat_interleave(len(at), 0)
        apart = 1 - F.cosine_similarity(made, true, dim=1)
        seen = mask.flatten(1).amax(1) >= 0.5
        return {"video": _weighted(apart.unflatten(0, (-1, len(at))), seen.to(apart).unflatten(0, (-1, len(at))))}


@dataclass(frozen=True)
class Likeness:
    """Any measure of (made, aim), a scalar, of each clip by itself: Likeness("spectral", MultiResolutionSTFT())."""

    name: str
    measure: Measure | str
    modality: Literal["video", "audio"] = "audio"

    def __call__(self, shown: Shown) -> Mapping[str, Tensor]:
        """Of its modality."""
        if self.modality not in shown.made:
            return {}
        measure = shown.network(self.measure)
        rows = zip(shown.made[self.modality].split(1), shown.aim[self.modality].split(1), strict=True)
        return {self.modality: torch.stack([measure(made, aim).reshape(()) for made, aim in rows])}


class Source(Protocol):
    """(made, aim) latents: what the student makes, with its gradient, and what that is to be like."""

    def __call__(
        self, role: str, nets: Nets, batch: Batch, given: Given, rng: Rng
    ) -> tuple[AV[Tensor], AV[Tensor]]: ...


@dataclass(frozen=True)
class Predicted:
    """The student's clean prediction on a path, and the end of that path: the teacher's, or with `Noised` data."""

    pairs: Pairs = field(default_factory=Solved)

    def __call__(self, role: str, nets: Nets, batch: Batch, given: Given, rng: Rng) -> tuple[AV[Tensor], AV[Tensor]]:
        """One call of the student."""
        pair = self.pairs(nets, batch, given, rng.fold("pairs"))
        known = given.around(nets[role])
        return known.keep(to_x0(pair.x_t, known(pair.x_t, pair.t, given.cond), pair.t)), pair.x0


@dataclass(frozen=True)
class OwnSample:
    """The student's own sample, and the clip of the batch: for terms that hold between the two, as in an edit."""

    rollout: Simulate = field(default_factory=Rollout)

    def __call__(self, role: str, nets: Nets, batch: Batch, given: Given, rng: Rng) -> tuple[AV[Tensor], AV[Tensor]]:  # noqa: ARG002
        """As many calls as the rollout makes, the last with a gradient."""
        return self.rollout(nets[role], given, rng.fold("rollout")).x0, given.x0


@dataclass(frozen=True)
class Noised:
    """Pairs of noised data and the data itself."""

    times: Joint = field(default_factory=lambda: Joint(AV(Uniform(0.02, 0.98), Uniform(0.02, 0.98)), shared=True))

    def __call__(self, nets: Nets, batch: Batch, given: Given, rng: Rng) -> Pair:  # noqa: ARG002
        """At drawn levels."""
        t = self.times(rng, given.x0)
        return Pair(noised(given.x0, rng.fold("noise").normal_like(given.x0), t), t, given.x0)


@dataclass(frozen=True)
class Fidelity:
    """The sum of `terms`, each under its own name and weight ("perceptual/video"); an anchor of DMD, or part of a Sum.

    decode: latents to media, Codec.decode or a role; None = the terms look at the latents. source: where the clips come
    from. tasks: as in FlowMatching. causal_first: the first latent step is one frame, as in StreamGeometry; it tells
    which frames a step of the mask covers.
    """

    terms: tuple[Term, ...]
    decode: Network | None = None
    source: Source = field(default_factory=Predicted)
    tasks: Mapping[str, float] = field(default_factory=lambda: {"t2av": 1.0})
    causal_first: bool = True

    def __post_init__(self) -> None:
        names = [term.name for term in self.terms]
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"Fidelity.terms: {names} must be one or more, each with a name of its own")

    def turn(self, step: int) -> tuple[str, ...]:  # noqa: ARG002
        """Only the student moves."""
        return ("student",)

    def loss(self, role: str, nets: Nets, batch: Batch, rng: Rng) -> Losses:
        """Terms of one batch; pure given rng."""
        given = Given.of(batch, self.tasks, rng.fold("tasks"))
        made, aim = self.source(role, nets, batch, given, rng)
        decode = _network(self.decode, nets) if self.decode is not None else _as_they_are
        with torch.no_grad():
            aim = decode(aim.map(Tensor.detach))
        made = decode(made)

        @torch.no_grad()
        def control() -> AV[Tensor]:
            if batch.cond.control is None:
                raise ConfigError("Background.against: the conditions have no control; give the data one, or use aim")
            return decode(batch.cond.control)

        shown = Shown(made, aim, self._mask(batch, made), control, batch, nets, rng.fold("fidelity"))
        generated = given.generated()
        return {
            f"{term.name}/{modality}": mean_where(values, generated[modality])
            for term in self.terms
            for modality, values in term(shown).items()
        }

    def _mask(self, batch: Batch, made: AV[Tensor]) -> Tensor | None:
        """The conditions' mask of the picture, per pixel: (B, 1, F, H, W)."""
        masks = batch.cond.mask
        if masks is None or "video" not in masks or "video" not in made:
            return None
        mask, video = masks["video"], made["video"]
        mask = mask[:, None, :, None, None] if mask.ndim == 2 else mask.amax(1, keepdim=True)
        steps, length = mask.shape[2], video.shape[2]
        frame = torch.arange(length)
        if self.causal_first and steps > 1:
            # frame 0 alone, then equal shares
            step = -(-frame * (steps - 1) // max(1, length - 1))
        else:
            step = frame * steps // length
        mask = mask.to(video)[:, :, step.to(mask.device)]
        return F.interpolate(mask, (length, *video.shape[3:]), mode="nearest")


def warped_error(clip: Tensor, moving: Tensor, flow: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """(B,) mean |frame - next frame moved back along the flow of `moving`|, over pixels that both frames show.

    clip, moving: (B, 3, F, H, W), F > 1. A pixel is hidden where it leaves the picture, or the flow there and back does
    not return to it: |f + b|^2 > 0.01 (|f|^2 + |b|^2) + 0.5 (arXiv:1604.08610, the test of disocclusion).
    """
    with torch.no_grad():
        first, then = _flat(moving[:, :, :-1]), _flat(moving[:, :, 1:])
        there, back = flow(first, then).float(), flow(then, first).float()
        grid, inside = _moved(there)
        back = F.grid_sample(back, grid, align_corners=True)
        gap = (there + back).square().sum(1)
        seen = inside & (gap <= 0.01 * (there.square().sum(1) + back.square().sum(1)) + 0.5)
    now, later = _flat(clip[:, :, :-1]).float(), _flat(clip[:, :, 1:]).float()
    error = (now - F.grid_sample(later, grid, align_corners=True)).abs().mean(1)
    pairs = (-1, clip.shape[2] - 1)
    return _weighted(error.unflatten(0, pairs), seen.to(error).unflatten(0, pairs))


def _moved(flow: Tensor) -> tuple[Tensor, Tensor]:
    """Where each pixel goes, as a grid (N, H, W, 2) in [-1, 1], and whether that is inside the picture."""
    height, width = flow.shape[2:]
    y, x = torch.meshgrid(
        torch.arange(height, device=flow.device), torch.arange(width, device=flow.device), indexing="ij"
    )
    size = flow.new_tensor([max(1, width - 1), max(1, height - 1)])
    grid = (torch.stack([x, y], dim=-1) + flow.movedim(1, -1)) * 2 / size - 1
    return grid, grid.abs().amax(-1) <= 1 + 1e-4


def _cut(frames: Tensor, mask: Tensor, size: int, pad: float) -> Tensor:
    """(N, 3, size, size): what is inside the mask (N, 1, H, W), on white: a square around it, `pad` wider each way."""
    inside = mask[:, 0] >= 0.5
    lengths = frames.shape[3], frames.shape[2]  # x, then y
    middles, sides = [], []
    for over, length in zip((1, 2), lengths, strict=True):
        line, index = inside.any(over), torch.arange(length, device=frames.device)
        low = torch.where(line, index, length).amin(1).clamp_max(length - 1)
        high = torch.where(line, index + 1, 0).amax(1).maximum(low + 1)
        middles.append((low + high) / length - 1)
        sides.append(high - low)
    side = torch.stack(sides).amax(0) * (1 + 2 * pad)
    rows = [[side / lengths[0], side * 0, middles[0]], [side * 0, side / lengths[1], middles[1]]]
    theta = torch.stack([torch.stack(row, 1) for row in rows], 1)
    grid = F.affine_grid(theta.to(frames), [len(frames), 3, size, size], align_corners=False)
    white = torch.where(inside[:, None], frames, torch.ones_like(frames))
    # grid_sample puts 0 past the edges, which is to be white too
    return F.grid_sample(white - 1, grid, align_corners=False) + 1


def _weighted(values: Tensor, weights: Tensor) -> Tensor:
    """(B,) mean of values (B, ...) under weights of the same shape; 0 (with a graph) where all of them are 0."""
    weights = weights.expand_as(values).flatten(1)
    return (values.flatten(1) * weights).sum(1) / weights.sum(1).clamp_min(1)


def _flat(video: Tensor) -> Tensor:
    """(B, C, F, H, W) -> (B F, C, H, W)."""
    return video.movedim(2, 1).flatten(0, 1)


def _maps(found: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    return [found] if isinstance(found, Tensor) else found


def _as_they_are(latents: AV[Tensor]) -> AV[Tensor]:
    return latents


def _network(named: Network, nets: Nets) -> Callable[..., Any]:
    if not isinstance(named, str):
        return named
    if named not in nets:
        raise ConfigError(f"Fidelity: no role {named!r}; the run has {', '.join(nets)}: add it to roles")
    return nets[named]
