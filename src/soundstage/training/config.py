"""A run as data: `recipe() -> TrainConfig`, variants by `dataclasses.replace`, stages by step."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from torch import nn

from soundstage.core.av import AV, MODALITIES
from soundstage.core.errors import ConfigError
from soundstage.objectives.base import Batch, Objective
from soundstage.training.health import Health
from soundstage.training.parallel import Parallel


class Buildable(Protocol):
    """A frozen dataclass that describes something heavy, and builds it.

    A model's config may also offer `describe() -> dict` with numbers for --dry-run (tokens, FLOPs per sample).
    """

    def build(self) -> Any: ...  # noqa: ANN401


@runtime_checkable
class Shared(Protocol):
    """A frozen dataclass that describes a network on another role's frozen one, such as models.adapters.lora.Lora.

    base: the role that carries it. `on` gives a module whose parameters are its own alone, and a deep copy of which
    shares the base too.
    """

    @property
    def base(self) -> str: ...

    def on(self, module: nn.Module, role: str) -> nn.Module: ...


class Data(Protocol):
    """Training data: `batch` is a pure function of its arguments (and the data's own seed), so resume needs no more.

    It gives the `part`-th of `of` equal parts of the batch, and reads no other. Data that has epochs deals the samples
    step * size onwards, so that every one comes once in each, whatever number of processes there is.
    """

    def batch(self, step: int, size: int, part: int = 0, of: int = 1) -> Batch: ...


@dataclass(frozen=True)
class Optim:
    """How one role moves.

    kind: "adamw", or "muon": torch.optim.Muon for the Linear weights inside ModuleLists, AdamW for the rest. Muon's
        update is scaled to the RMS of AdamW's (arXiv:2502.16982), so one `lr` serves both.
    schedule after `warmup` steps: "cosine" to `final` x lr; "linear" to `final` x lr; "constant"; "wsd" constant, then
        linear to `final` x lr over the last `decay` fraction of the steps.
    clip: global gradient norm (None = no clipping). Weight decay acts on matrices only.
    scale: factors on `lr` of the parameters in whose name a regular expression is found, the first that is; 0 = frozen.
    """

    kind: Literal["adamw", "muon"] = "adamw"
    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.01
    momentum: float = 0.95
    eps: float = 1e-8
    warmup: int = 0
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "constant"
    final: float = 0.0
    decay: float = 0.2
    clip: float | None = 1.0
    scale: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Role:
    """A network beside the student: "teacher", "fake_score", "discriminator". optim None = frozen.

    model: of a network of its own, or of one on the frozen network of another role. init: a safetensors file, or a
    run's folder, whose weights it starts from.
    """

    model: Buildable | Shared
    optim: Optim | None = None
    init: str | None = None


@dataclass(frozen=True)
class Stage:
    """From step `start` on, these settings hold: dotted names of TrainConfig to values, {"batch_size": 32}.

    Networks, seed and steps stay. A stage that changes the student's `optim` starts its warm-up and schedule anew. A
    stage at or after the last step is never reached.
    """

    start: int
    changes: Mapping[str, Any]


@dataclass(frozen=True)
class TrainConfig:
    """Everything of a run. The student is built from `model`; other networks are `roles`. Either may be a `Shared`.

    batch_size: samples per step, over all `accumulate` micro-batches. weights: factor of a term ("flow/audio") or of
    every term of a modality ("audio"); 1 where not named. ema: decay of the averaged student (None = no average).
    init: weights the student starts from. probe_every: steps between gradient norms by term and noise level (0 =
    never; a probe costs one backward pass for each). health: bounds outside of which the run stops. validate: called
    every validate_every steps and at the end with a `Validation`, returns numbers to log. keep: checkpoints kept. out:
    folder of the run.
    """

    name: str
    model: Buildable | Shared
    objective: Objective
    data: Any
    steps: int
    batch_size: int = 64
    accumulate: int = 1
    optim: Optim = Optim()
    roles: Mapping[str, Role] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    parallel: Parallel = field(default_factory=Parallel)
    ema: float | None = 0.999
    init: str | None = None
    seed: int = 0
    log_every: int = 20
    save_every: int = 500
    keep: int = 3
    probe_every: int = 0
    health: Health = field(default_factory=Health)
    validate: Callable[[Any], Mapping[str, float]] | None = None
    validate_every: int = 0
    stages: tuple[Stage, ...] = ()
    out: str | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "log_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: {getattr(self, name)} is not at least 1")
        if self.batch_size % self.accumulate:
            raise ConfigError(f"batch_size: {self.batch_size} is not a multiple of accumulate={self.accumulate}")
        if "student" in self.roles or "ema" in self.roles:
            raise ConfigError("roles: 'student' and 'ema' are made from model=; name only the others here")
        for name, model in self.models.items():
            self._check_shared(name, model)
        starts = [stage.start for stage in self.stages]
        if starts != sorted(set(starts)) or (starts and starts[0] < 1):
            raise ConfigError(f"stages: their starts {starts} do not ascend from 1")
        for name in self.weights:
            if name not in MODALITIES and "/" not in name:
                raise ConfigError(f"weights: {name!r} is neither a modality nor a term such as 'flow/audio'")

    def _check_shared(self, name: str, model: Buildable | Shared) -> None:
        """A network on another needs that other to be there, whole and still."""
        if not isinstance(model, Shared):
            return
        able = [n for n, role in self.roles.items() if role.optim is None and not isinstance(role.model, Shared)]
        if model.base not in able:
            raise ConfigError(
                f"roles: {name} is to share the network of {model.base!r}, which is no frozen role with a network of "
                f"its own; there are {', '.join(able) or 'none: add one with optim=None'}"
            )

    @property
    def models(self) -> dict[str, Buildable | Shared]:
        """Role to what builds its network, the student first."""
        return {"student": self.model} | {name: role.model for name, role in self.roles.items()}

    @property
    def folder(self) -> Path:
        """Where the run writes: `out`, or runs/<name>."""
        return Path(self.out) if self.out else Path("runs") / self.name


def recipe_function(name: str) -> Callable[..., Any]:
    """The function that an importable `module:function` means; raises ConfigError when there is none."""
    module, _, function = name.partition(":")
    if not function:
        raise ConfigError(f"recipe: {name!r} is not module:function, for example soundstage.recipes.world:tiny")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not (module == error.name or module.startswith(error.name + ".")):
            raise
        raise ConfigError(f"recipe: there is no module {error.name!r}; it must be importable from here") from error
    if not hasattr(found, function):
        public = [key for key, value in vars(found).items() if callable(value) and value.__module__ == module]
        raise ConfigError(f"recipe: {module} has no {function!r}; it has {', '.join(sorted(public))}")
    return getattr(found, function)


def load_recipe(name: str) -> TrainConfig:
    """The configuration made by any importable `module:function`; raises ConfigError when it is not one."""
    config = recipe_function(name)()
    if not isinstance(config, TrainConfig):
        raise ConfigError(f"recipe: {name} returned {type(config).__name__}, not a TrainConfig")
    return config


def describe(value: Any) -> Any:  # noqa: ANN401
    """A JSON-able picture of a configuration: dataclasses as dicts with "is" naming their class."""
    if isinstance(value, AV):
        return {name: describe(item) for name, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        shown = {f.name: describe(getattr(value, f.name)) for f in fields(value)}
        return {"is": f"{type(value).__module__}:{type(value).__qualname__}", **shown}
    if isinstance(value, Mapping):
        return {str(key): describe(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [describe(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Fraction | Path):
        return str(value)
    owner = value if hasattr(value, "__qualname__") else type(value)
    return f"{owner.__module__}:{owner.__qualname__}"
