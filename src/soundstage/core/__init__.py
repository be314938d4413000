"""The waist of Soundstage: one `AV` value, one `Denoiser` call, and everything that composes them."""

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
