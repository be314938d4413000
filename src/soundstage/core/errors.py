"""The error tree: what a user may see, each one sentence with its remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SoundstageError(Exception):
    """Root of every error a user can cause and mend; the command line prints it as one sentence and exits with 2."""


class ConfigError(SoundstageError, ValueError):
    """A setting has a wrong name, type or value."""


class ModalityError(SoundstageError, ValueError):
    """Two values that must share their modalities do not."""


class ShapeError(SoundstageError, ValueError):
    """A tensor's shape does not fit what it is combined with."""


class WeightsError(SoundstageError, ValueError):
    """Weights are missing, partial or of another model."""


class RequestError(SoundstageError, ValueError):
    """A request that cannot be met: duration, size, task or input."""


class MissingExtra(SoundstageError, ImportError):
    """An optional package is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f'{package} is not installed: run pip install "soundstage[{extra}]"')


class Caution(UserWarning):
    """Something is done otherwise than asked, or may disappoint; the text names the remedy."""


def one_of(name: str, value: object, allowed: Iterable[str]) -> ConfigError:
    """The error for a value outside a set of names, with the nearest name as the remedy."""
    names = sorted(allowed)
    near = difflib.get_close_matches(str(value), names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return ConfigError(f"{name}: {value!r} is not one of {', '.join(names)}{hint}")
