"""`Conditions`: everything a denoiser is told beside the noisy latents and the time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from soundstage.core.av import AV
from soundstage.core.errors import ConfigError, ShapeError, one_of

_GROUPS = {
    "text": ("text", "text_mask"),
    "reference": ("reference",),
    "control": ("control", "mask"),
    "positions": ("positions",),
}
_FIELDS = tuple(name for group in _GROUPS.values() for name in group)
_ABSENT = {"text": 0, "text_mask": 0, "reference": 0, "control": 0, "mask": 1}
"""What an absent field is filled with where other samples of the batch have it."""


@dataclass(frozen=True, eq=False)
class Conditions:
    """Conditioning as data; every field may be absent, and an absent field means "unconditional".

    text: per modality (B, S, D) features; text_mask: per modality (B, S) bool, True = a real token.
    reference: (B, R, D) reference-image features.
    control: latents in the layout of x_t (source video, pose, product plate); mask: per-step (B, F) or full latents,
        1 = generate, 0 = keep.
    positions: per modality (B, F) seconds at the middle of each latent step; absent means the model's own rates.
    The negative prompt is another Conditions, held by the guidance wrapper.
    """

    text: AV[Tensor] | None = None
    text_mask: AV[Tensor] | None = None
    reference: Tensor | None = None
    control: AV[Tensor] | None = None
    mask: AV[Tensor] | None = None
    positions: AV[Tensor] | None = None

    def drop(self, group: str, where: Tensor | None = None) -> Conditions:
        """Remove "text", "reference", "control" or "positions".

        where: (B,) bool, True = drop for this sample: features and control become zero, text mask False and mask 1
        (generate all), which is what an absent field means once samples are batched. Raises ConfigError on another
        group name, and for "positions" with where, since an absent position has no number.
        """
        if group not in _GROUPS:
            raise one_of("Conditions.drop", group, _GROUPS)
        if where is None:
            return replace(self, **dict.fromkeys(_GROUPS[group]))
        if group == "positions":
            raise ConfigError("Conditions.drop: positions can only be dropped for the whole batch, without where")
        full = _with_text_mask(self) if group == "text" else self
        names = [name for name in _GROUPS[group] if getattr(full, name) is not None]
        erase = {name: partial(_erase, where=where, absent=_ABSENT[name]) for name in names}
        return replace(full, **{name: _tree_map(erase[name], getattr(full, name)) for name in names})

    def to(self, *args: Any, **kwargs: Any) -> Conditions:  # noqa: ANN401
        """Tensor.to on every field; masks and token ids (bool, integers) change device but not type."""

        def move(x: Tensor) -> Tensor:
            return x.to(*args, **kwargs) if x.is_floating_point() else x.to(x.new_empty(0).to(*args, **kwargs).device)

        return _tree_map(move, self)

    def map(self, fn: Any) -> Conditions:  # noqa: ANN401
        """Apply `fn` to every tensor (indexing, expanding, detaching)."""
        return _tree_map(fn, self)

    def only(self, *modalities: str) -> Conditions:
        """Keep the named modalities in every per-modality field."""

        def keep(value: Any) -> Any:  # noqa: ANN401
            if not isinstance(value, AV):
                return value
            kept = [name for name in modalities if name in value]
            return value.only(*kept) if kept else None

        return Conditions(**{name: keep(getattr(self, name)) for name in _FIELDS})

    @staticmethod
    def cat(parts: Sequence[Conditions]) -> Conditions:
        """Join along the batch, for guidance in one call.

        A field absent in one part and present in another is filled with what absence means: zeros, text mask False,
        mask 1. A part with nothing set counts as many samples as the first that has the field. Shorter texts are
        padded with masked tokens. Raises ShapeError where shapes cannot be joined, or only some parts have positions.
        """
        parts = [_with_text_mask(part) for part in parts]
        return Conditions(**{n: _cat_field(n, [getattr(part, n) for part in parts], parts) for n in _FIELDS})

    @property
    def batch(self) -> int | None:
        """Number of samples B, or None when nothing is set."""
        leaves = pytree.tree_leaves(self)
        return int(leaves[0].shape[0]) if leaves else None


def _tree_map(fn: Any, tree: Any) -> Any:  # noqa: ANN401
    return pytree.tree_map(fn, tree)


def _erase(x: Tensor, where: Tensor, absent: int) -> Tensor:
    return x.masked_fill(where.to(x.device).reshape(-1, *(1,) * (x.ndim - 1)), absent)


def _with_text_mask(cond: Conditions) -> Conditions:
    if cond.text is None or cond.text_mask is not None:
        return cond
    return replace(cond, text_mask=cond.text.map(lambda x: torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)))


def _cat_field(field: str, values: list[Any], parts: Sequence[Conditions]) -> Any:  # noqa: ANN401
    present = [value for value in values if value is not None]
    if not present:
        return None
    if isinstance(present[0], AV):
        names = present[0].modalities
        return AV(**{n: _cat_field(field, [None if v is None else v[n] for v in values], parts) for n in names})
    if len(present) < len(values) and field not in _ABSENT:
        raise ShapeError(f"Conditions.cat: {field} must be set in all parts or in none")
    tensors = [
        present[0].new_full((part.batch or len(present[0]), *present[0].shape[1:]), _ABSENT[field])
        if value is None
        else value
        for value, part in zip(values, parts, strict=True)
    ]
    if field in _GROUPS["text"]:
        tensors = _pad_tokens(tensors)
    if any(x.shape[1:] != tensors[0].shape[1:] for x in tensors):
        raise ShapeError(f"Conditions.cat: {field} of shapes {[tuple(x.shape) for x in tensors]} cannot be joined")
    return torch.cat(tensors)


def _pad_tokens(tensors: list[Tensor]) -> list[Tensor]:
    """Text (B, S, ...) of unequal length, padded at the end with zeros or False."""
    longest = max(x.shape[1] for x in tensors)
    return [torch.cat([x, x.new_zeros((len(x), longest - x.shape[1], *x.shape[2:]))], dim=1) for x in tensors]


def _flatten(cond: Conditions) -> tuple[list[Any], tuple[str, ...]]:
    names = tuple(name for name in _FIELDS if getattr(cond, name) is not None)
    return [getattr(cond, name) for name in names], names


def _flatten_with_keys(cond: Conditions) -> tuple[list[tuple[Any, Any]], tuple[str, ...]]:
    children, names = _flatten(cond)
    return [(pytree.GetAttrKey(name), child) for name, child in zip(names, children, strict=True)], names


def _unflatten(children: Any, names: tuple[str, ...]) -> Conditions:  # noqa: ANN401
    return Conditions(**dict(zip(names, children, strict=True)))


pytree.register_pytree_node(
    Conditions,
    _flatten,
    _unflatten,
    flatten_with_keys_fn=_flatten_with_keys,
    serialized_type_name="soundstage.Conditions",
    to_dumpable_context=list,
    from_dumpable_context=tuple,
)
torch.serialization.add_safe_globals([Conditions])
