"""`AV`: one value per modality. Code written on it serves video, audio or both without a branch.

Layout of latents: video (B, C, F, H, W), audio (B, C, A). Times and weights are (B,) per sample or (B, F) / (B, A)
per latent step; arithmetic spreads them over channels and space.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch.utils import _pytree as pytree

from soundstage.core.errors import ModalityError, ShapeError

T = TypeVar("T")
U = TypeVar("U")

MODALITIES = ("video", "audio")


def spread(value: Any, like: Any) -> Any:  # noqa: ANN401
    """Reshape a per-sample (B,) or per-step (B, F) tensor so that it broadcasts onto `like` (B, C, F, ...).

    Anything else (numbers, tensors of the same rank) is returned as it is. Raises ShapeError when the steps differ.
    """
    if not (isinstance(value, torch.Tensor) and isinstance(like, torch.Tensor)) or value.ndim >= like.ndim:
        return value
    if value.ndim == 1:
        return value.reshape(value.shape[0], *(1,) * (like.ndim - 1))
    if value.ndim == 2 and like.ndim >= 3:
        if value.shape[1] not in (1, like.shape[2]):
            raise ShapeError(f"{value.shape[1]} per-step values do not fit latents of {like.shape[2]} steps")
        return value.reshape(value.shape[0], 1, value.shape[1], *(1,) * (like.ndim - 3))
    return value


@dataclass(frozen=True, eq=False)
class AV(Generic[T]):
    """One value for `video` and one for `audio`; an absent modality is None. Frozen; a pytree of what is present."""

    video: T | None = None
    audio: T | None = None

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names of the modalities present, video first."""
        return tuple(name for name in MODALITIES if getattr(self, name) is not None)

    def items(self) -> Iterator[tuple[str, T]]:
        """(name, value) of the modalities present, video first."""
        return ((name, getattr(self, name)) for name in self.modalities)

    def values(self) -> Iterator[T]:
        """Values of the modalities present, video first."""
        return (getattr(self, name) for name in self.modalities)

    def __getitem__(self, name: str) -> T:
        value = getattr(self, name) if name in MODALITIES else None
        if value is None:
            raise ModalityError(f"no {name!r} here: the value has {', '.join(self.modalities) or 'no modality'}")
        return value

    def __contains__(self, name: str) -> bool:
        return name in self.modalities

    def map(self, fn: Callable[..., U], *others: Any) -> AV[U]:  # noqa: ANN401
        """Apply `fn` to each modality present; `others` are AVs of the same modalities, or plain values for all.

        Raises ModalityError when an AV among `others` has other modalities.
        """
        for other in others:
            if isinstance(other, AV) and other.modalities != self.modalities:
                raise ModalityError(
                    f"modalities differ: {', '.join(self.modalities)} and {', '.join(other.modalities)}; "
                    "use only() to keep the shared ones"
                )
        return AV(
            **{
                name: fn(value, *(other[name] if isinstance(other, AV) else other for other in others))
                for name, value in self.items()
            }
        )

    def only(self, *names: str) -> AV[T]:
        """Keep the named modalities; raises ModalityError when one is absent."""
        return AV(**{name: self[name] for name in names})

    def replace(self, **values: T | None) -> AV[T]:
        """The same value with some modalities set (or removed with None); raises ModalityError on an unknown name."""
        _known_names(values)
        return AV(**{name: values.get(name, getattr(self, name)) for name in MODALITIES})

    def _binary(self, other: Any, fn: Callable[[Any, Any], Any]) -> AV[Any]:  # noqa: ANN401
        return self.map(lambda a, b: fn(spread(a, b), spread(b, a)), other)

    def __add__(self, other: Any) -> AV[Any]:  # noqa: ANN401
        return self._binary(other, operator.add)

    def __sub__(self, other: Any) -> AV[Any]:  # noqa: ANN401
        return self._binary(other, operator.sub)

    def __mul__(self, other: Any) -> AV[Any]:  # noqa: ANN401
        return self._binary(other, operator.mul)

    def __truediv__(self, other: Any) -> AV[Any]:  # noqa: ANN401
        return self._binary(other, operator.truediv)

    def __radd__(self, other: Any) -> AV[Any]:  # noqa: ANN401
        return self._binary(other, lambda a, b: b + a)

    def __rsub__(self, other: Any) -> AV[Any]:  # noqa: ANN401
        return self._binary(other, lambda a, b: b - a)

    def __rmul__(self, other: Any) -> AV[Any]:  # noqa: ANN401
        return self._binary(other, lambda a, b: b * a)

    def __neg__(self) -> AV[Any]:
        return self.map(operator.neg)

    def to(self, *args: Any, **kwargs: Any) -> AV[Any]:  # noqa: ANN401
        """Tensor.to on each modality."""
        return self.map(lambda value: value.to(*args, **kwargs))

    @property
    def batch(self) -> int:
        """Number of samples B; raises ShapeError when the modalities disagree."""
        sizes = {int(value.shape[0]) for value in self.values()}  # type: ignore[attr-defined]
        if len(sizes) != 1:
            raise ShapeError(f"batch sizes differ or are missing: {sorted(sizes)}")
        return sizes.pop()

    def as_dict(self) -> dict[str, T]:
        """A plain dict of the modalities present, for disk."""
        return dict(self.items())

    @classmethod
    def from_dict(cls, values: Mapping[str, T]) -> AV[T]:
        """Inverse of as_dict; raises ModalityError on an unknown name."""
        _known_names(values)
        return cls(**values)


def _known_names(names: Iterable[str]) -> None:
    unknown = sorted(set(names) - set(MODALITIES))
    if unknown:
        raise ModalityError(f"{', '.join(unknown)}: not a modality, use {', '.join(MODALITIES)}")


def cat(values: Sequence[AV[torch.Tensor]], dim: int = 0) -> AV[torch.Tensor]:
    """Concatenate AVs of the same modalities along `dim`."""
    first, *rest = values
    return first.map(lambda *tensors: torch.cat(tensors, dim=dim), *rest)


def collate(values: Sequence[AV[torch.Tensor]]) -> AV[torch.Tensor]:
    """Stack samples into a batch: every modality gains a leading B axis."""
    first, *rest = values
    return first.map(lambda *tensors: torch.stack(tensors), *rest)


def split(value: AV[torch.Tensor], parts: int) -> tuple[AV[torch.Tensor], ...]:
    """Cut a batch into `parts` equal batches along B; raises ShapeError when it cannot be."""
    if value.batch % parts:
        raise ShapeError(f"a batch of {value.batch} cannot be cut into {parts} equal parts")
    chunks = {name: tensor.chunk(parts) for name, tensor in value.items()}
    return tuple(AV(**{name: pieces[i] for name, pieces in chunks.items()}) for i in range(parts))


def _flatten(value: AV[Any]) -> tuple[list[Any], tuple[str, ...]]:
    return [getattr(value, name) for name in value.modalities], value.modalities


def _flatten_with_keys(value: AV[Any]) -> tuple[list[tuple[Any, Any]], tuple[str, ...]]:
    return [(pytree.GetAttrKey(name), getattr(value, name)) for name in value.modalities], value.modalities


def _unflatten(children: Any, names: tuple[str, ...]) -> AV[Any]:  # noqa: ANN401
    return AV(**dict(zip(names, children, strict=True)))


pytree.register_pytree_node(
    AV,
    _flatten,
    _unflatten,
    flatten_with_keys_fn=_flatten_with_keys,
    serialized_type_name="soundstage.AV",
    to_dumpable_context=list,
    from_dumpable_context=tuple,
)
torch.serialization.add_safe_globals([AV])
