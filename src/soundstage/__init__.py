"""Joint audio-video generation: `Generator.load().generate("...").save("clip.mp4")`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from soundstage.core.av import AV
    from soundstage.core.conditions import Conditions
    from soundstage.inference.generator import Generator

__version__ = "0.1.0"
__all__ = ["AV", "Conditions", "Generator", "__version__"]

_HOMES = {
    "AV": "soundstage.core.av",
    "Conditions": "soundstage.core.conditions",
    "Generator": "soundstage.inference.generator",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401
    """Import a public name when it is first asked for, so that `import soundstage` does not load torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'soundstage' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
