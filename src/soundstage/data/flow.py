"""A flow: stages that turn items into items, one after another, and what a stage may say of an item.

A stage is a frozen dataclass whose fields are its parameters and whose call is a pure function of the item. So an
outcome is known by (name, version, parameters, item): a change of a parameter runs again what depends on it, no more.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from fractions import Fraction
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

from soundstage.core.errors import ConfigError, SoundstageError

__all__ = ["Drop", "Flow", "Gather", "Item", "Poison", "Stage", "Transient", "described", "signature"]


class Transient(SoundstageError, RuntimeError):
    """Try again later: a busy server, a dead connection.

    after: seconds to wait at least, where a host asked for them. progressed: this attempt kept more than there was
    before, such as the next part of a file. In either case it is not counted as an attempt.
    """

    def __init__(self, message: str, after: float | None = None, *, progressed: bool = False) -> None:
        super().__init__(message)
        self.after, self.progressed = after, progressed


class Poison(SoundstageError, ValueError):
    """This item can never be worked on, such as a broken file: it is put into quarantine at once with this reason."""


@dataclass(frozen=True)
class Item:
    """One thing on its way.

    files: by role ("media", "traces", ...), paths that can be read. facts: what is known, in plain JSON values:
    provenance ("source", "url", "licence"), spans, measures, captions; children inherit them.
    digests: content hash (SHA-256, hex) of each file, filled in when an item is committed.
    """

    files: Mapping[str, Path] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """A hash of what the item is: its files' content and its facts. Only a committed item has one."""
        missing = sorted(set(self.files) - set(self.digests))
        if missing:
            raise ConfigError(f"Item.id: {missing[0]!r} has no digest yet; items get theirs when they are committed")
        told = {"files": dict(self.digests), "facts": dict(self.facts)}
        return sha256(json.dumps(told, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:32]

    def child(self, files: Mapping[str, Path] | None = None, **facts: Any) -> Item:  # noqa: ANN401
        """The same with more files and facts; a file written anew loses its old digest."""
        new = dict(files or {})
        kept = {role: digest for role, digest in self.digests.items() if role not in new}
        return replace(self, files={**self.files, **new}, facts={**self.facts, **facts}, digests=kept)

    def without(self, *roles: str) -> Item:
        """The same without these files."""
        return replace(
            self,
            files={role: path for role, path in self.files.items() if role not in roles},
            digests={role: digest for role, digest in self.digests.items() if role not in roles},
        )


@dataclass(frozen=True)
class Drop:
    """An item that goes no further, on purpose. reason: a short word that the funnel counts; score: what decided."""

    item: Item
    reason: str
    score: float | None = None


@runtime_checkable
class Stage(Protocol):
    """One step of work on one item. version: raised when the code gives other results for the same parameters.

    A field that changes no outcome (a rate, a folder of unfinished files) is told apart by field(compare=False).
    """

    version: ClassVar[int]

    def __call__(self, item: Item, folder: Path) -> Iterable[Item | Drop]:
        """What becomes of an item; new files are written into `folder`, an empty one of this call's own.

        Raises Transient or Poison; anything else counts as a failed attempt.
        """
        ...


@runtime_checkable
class Gather(Protocol):
    """A step that needs to see many items: it starts when all stages before it are done."""

    version: ClassVar[int]

    def groups(self, items: Sequence[Item]) -> Iterable[Sequence[Item]]:
        """What belongs together, from items sorted by id: every item in exactly one group."""
        ...

    def gather(self, group: Sequence[Item], folder: Path) -> Iterable[Item | Drop]:
        """What becomes of a group; as Stage.__call__. Each Drop stands for one member that goes no further."""
        ...


def described(name: str, stage: Stage | Gather) -> dict[str, Any]:
    """A stage's place, class, version and parameters as plain JSON: what its outcomes depend on beside the item."""
    return {"name": name, "class": type(stage).__qualname__, "version": stage.version, "params": _plain(stage)}


def signature(name: str, stage: Stage | Gather) -> str:
    """A hash of `described`."""
    told = described(name, stage)
    return sha256(json.dumps(told, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:  # noqa: ANN401
    """A parameter as JSON; raises ConfigError for one that has no stable form."""
    if is_dataclass(value) and not isinstance(value, type):
        return {"": type(value).__qualname__} | {
            f.name: _plain(getattr(value, f.name)) for f in fields(value) if f.compare
        }
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(each) for each in value]
    if isinstance(value, (Path, Fraction)):
        return str(value)
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}:{value.__qualname__}"
    raise ConfigError(f"a stage's parameter {value!r} has no stable form; use numbers, text, or frozen dataclasses")


@dataclass(frozen=True)
class Flow:
    """Stages by name, in order; names are what commands and the funnel call them."""

    stages: Mapping[str, Stage | Gather]

    def __post_init__(self) -> None:
        if not self.stages:
            raise ConfigError("Flow.stages: there is none; give at least one stage by name")

    def until(self, name: str) -> Flow:
        """The flow up to a stage and with it."""
        names = list(self.stages)
        if name not in names:
            raise ConfigError(f"stage: there is no {name!r} in this flow; it has {', '.join(names)}")
        return Flow({each: self.stages[each] for each in names[: names.index(name) + 1]})

    @property
    def signatures(self) -> Mapping[str, str]:
        """Of every stage, by name."""
        return {name: signature(name, stage) for name, stage in self.stages.items()}
