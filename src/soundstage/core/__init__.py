"""The waist of Soundstage: one `AV` value, one `Denoiser` call, and everything that composes them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from soundstage.core.av import AV, MODALITIES, cat, collate, split, spread
    from soundstage.core.batch import Batch
    from soundstage.core.conditions import Conditions
    from soundstage.core.denoiser import Codec, Denoiser, Losses, StreamGeometry, Tileable
    from soundstage.core.errors import (
        Caution,
        ConfigError,
        MissingExtra,
        ModalityError,
        RequestError,
        ShapeError,
        SoundstageError,
        WeightsError,
    )
    from soundstage.core.features import tap
    from soundstage.core.flow import from_x0, noised, to_noise, to_x0, velocity
    from soundstage.core.guidance import APG, Guided, Isolated, cross_modal, skip_layer
    from soundstage.core.known import Known
    from soundstage.core.rng import Rng
    from soundstage.core.sampling import SAMPLERS, Sampler, dpmpp_2m, euler, heun, renoise, unipc
    from soundstage.core.schedule import explicit, held, linear, shift, shifted
    from soundstage.core.times import Joint, Listed, LogitNormal, Mode, Shifted, TimeLaw, TokenShift, Uniform

__all__ = [
    "APG",
    "AV",
    "MODALITIES",
    "SAMPLERS",
    "Batch",
    "Caution",
    "Codec",
    "Conditions",
    "ConfigError",
    "Denoiser",
    "Guided",
    "Isolated",
    "Joint",
    "Known",
    "Listed",
    "LogitNormal",
    "Losses",
    "MissingExtra",
    "ModalityError",
    "Mode",
    "RequestError",
    "Rng",
    "Sampler",
    "ShapeError",
    "Shifted",
    "SoundstageError",
    "StreamGeometry",
    "Tileable",
    "TimeLaw",
    "TokenShift",
    "Uniform",
    "WeightsError",
    "cat",
    "collate",
    "cross_modal",
    "dpmpp_2m",
    "euler",
    "explicit",
    "from_x0",
    "held",
    "heun",
    "linear",
    "noised",
    "renoise",
    "shift",
    "shifted",
    "skip_layer",
    "split",
    "spread",
    "tap",
    "to_noise",
    "to_x0",
    "unipc",
    "velocity",
]

_HOMES = {
    "av": ("AV", "MODALITIES", "cat", "collate", "split", "spread"),
    "batch": ("Batch",),
    "conditions": ("Conditions",),
    "denoiser": ("Codec", "Denoiser", "Losses", "StreamGeometry", "Tileable"),
    "errors": (
        "Caution",
        "ConfigError",
        "MissingExtra",
        "ModalityError",
        "RequestError",
        "ShapeError",
        "SoundstageError",
        "WeightsError",
    ),
    "features": ("tap",),
    "flow": ("from_x0", "noised", "to_noise", "to_x0", "velocity"),
    "guidance": ("APG", "Guided", "Isolated", "cross_modal", "skip_layer"),
    "known": ("Known",),
    "rng": ("Rng",),
    "sampling": ("SAMPLERS", "Sampler", "dpmpp_2m", "euler", "heun", "renoise", "unipc"),
    "schedule": ("explicit", "held", "linear", "shift", "shifted"),
    "times": ("Joint", "Listed", "LogitNormal", "Mode", "Shifted", "TimeLaw", "TokenShift", "Uniform"),
}


def __getattr__(name: str) -> Any:  # noqa: ANN401
    """Import a public name when it is first asked for, so that what needs `core.errors` alone does not load torch."""
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return __all__
