"""Typed overrides of a configuration: `optim.lr=1e-5 steps=6000 data=folder:PATH`."""

from __future__ import annotations

import difflib
import types
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from soundstage.core.av import AV
from soundstage.core.errors import ConfigError

C = TypeVar("C")


def override(config: C, assignments: Sequence[str]) -> C:
    """Apply `key=value` texts to a frozen dataclass; dotted keys reach inside, also into mappings.

    The type of the field decides how a text is read; a value (or type) with `parse(text)` reads it itself. Raises
    ConfigError that names the nearest setting for a wrong key, or the expected type for a wrong value.
    """
    for text in assignments:
        key, sign, value = text.partition("=")
        if not sign or not key:
            raise ConfigError(f"override {text!r} is not key=value, for example optim.lr=1e-5")
        config = _assign(config, key.split("."), key, value, parse=True)
    return config


def changed(config: C, changes: Mapping[str, Any]) -> C:
    """Set dotted keys to values that already have their type; raises ConfigError on a wrong key."""
    for key, value in changes.items():
        config = _assign(config, key.split("."), key, value, parse=False)
    return config


def _assign(owner: Any, path: list[str], key: str, value: Any, *, parse: bool) -> Any:  # noqa: ANN401
    """A copy of `owner` in which the setting at `path` is `value`."""
    hints = _settings(owner)
    if hints is None:
        raise ConfigError(f"{key}: {type(owner).__name__} has no settings inside")
    name = path[0]
    free = isinstance(owner, Mapping) and len(path) == 1
    if name not in hints and not free:
        raise _unknown(key, name, list(hints))
    current = owner.get(name) if isinstance(owner, Mapping) else getattr(owner, name)
    if len(path) > 1:
        new = _assign(current, path[1:], key, value, parse=parse)
    else:
        hint = hints.get(name, next(iter(hints.values()), float))
        new = _read(value, hint, current, key) if parse else value
    if isinstance(owner, Mapping):
        return {**owner, name: new}
    return replace(owner, **{name: new})


def _settings(owner: Any) -> dict[str, Any] | None:  # noqa: ANN401
    """Names and types of what can be set inside `owner`; None when nothing can."""
    if isinstance(owner, Mapping):
        return {name: float if type(value) is int else type(value) for name, value in owner.items()}
    if is_dataclass(owner) and not isinstance(owner, type):
        hints = get_type_hints(type(owner))
        return {f.name: hints[f.name] for f in fields(owner) if f.init}
    return None


def _unknown(key: str, name: str, names: list[str]) -> ConfigError:
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(sorted(names))}"
    return ConfigError(f"{key}: {name!r} is not a setting; {hint}")


def _read(text: str, hint: Any, current: Any, key: str) -> Any:  # noqa: ANN401
    """`text` as a value of type `hint`; the current value stands in for a type that says nothing."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        if text.lower() == "none" and type(None) in get_args(hint):
            return None
        return _first(text, [arg for arg in get_args(hint) if arg is not type(None)], current, key)
    reader = getattr(current, "parse", None) or getattr(hint, "parse", None)
    if reader is not None:
        return reader(text)
    if origin is Literal:
        if text not in get_args(hint):
            raise ConfigError(f"{key}: {text!r} is not one of {', '.join(map(str, get_args(hint)))}")
        return text
    if origin is tuple or hint is tuple:
        return _tuple(text, get_args(hint), key)
    if (origin or hint) is AV:
        values = _tuple(text, get_args(hint) or (float,), key, repeat=True)
        return AV(**dict(zip(("video", "audio"), values, strict=False)))
    if isinstance(hint, TypeVar) or hint is Any or hint is object:
        hint = type(current)
    return _scalar(text, hint, key)


def _first(text: str, hints: list[Any], current: Any, key: str) -> Any:  # noqa: ANN401
    """The first type of a union that can read `text`."""
    for hint in hints[:-1]:
        try:
            return _read(text, hint, current, key)
        except ConfigError:
            continue
    return _read(text, hints[-1], current, key)


def _tuple(text: str, args: tuple[Any, ...], key: str, *, repeat: bool = False) -> tuple[Any, ...]:
    items = [item.strip() for item in text.strip("()[]").split(",") if item.strip()]
    if repeat or not args or args[-1] is Ellipsis:
        return tuple(_read(item, args[0] if args else str, None, key) for item in items)
    if len(items) != len(args):
        raise ConfigError(f"{key}: {text!r} has {len(items)} values, not {len(args)}")
    return tuple(_read(item, arg, None, key) for item, arg in zip(items, args, strict=True))


_BOOLS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def _scalar(text: str, hint: Any, key: str) -> Any:  # noqa: ANN401
    try:
        if hint is bool:
            return _BOOLS[text.lower()]
        if hint is int:
            number = Fraction(text.replace("_", ""))
            if number.denominator != 1:
                raise ValueError
            return int(number)
        if hint in (float, str, Path, Fraction):
            return hint(text)
    except (ValueError, KeyError, ZeroDivisionError):
        pass
    else:
        inside = "; set what is inside it, with a dotted name" if is_dataclass(hint) else ""
        name = getattr(hint, "__name__", str(hint))
        raise ConfigError(f"{key}: a {name} cannot be given as text{inside}")
    raise ConfigError(f"{key}: {text!r} is not {'an' if hint is int else 'a'} {hint.__name__}")
