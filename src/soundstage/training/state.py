"""What moves during a run: networks, optimisers, the average, the step. Phases of a staged run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from soundstage.core.errors import ConfigError
from soundstage.training import checkpoint
from soundstage.training.config import Optim, Shared, TrainConfig
from soundstage.training.ema import Ema
from soundstage.training.optim import Optimizer
from soundstage.training.overrides import changed
from soundstage.training.parallel import World

_FIXED = ("name", "model", "roles", "steps", "seed", "ema", "init", "stages", "out", "compile")


@dataclass(frozen=True)
class Phase:
    """Steps start <= step < end under one configuration; the learning-rate schedule runs over `schedule`."""

    start: int
    end: int
    config: TrainConfig
    schedule: tuple[int, int]

    def taken(self, step: int) -> int:
        """How many of its steps are before `step`."""
        return max(0, min(self.end, step) - self.start)


def phases(config: TrainConfig) -> tuple[Phase, ...]:
    """The stages of a run in order; one phase without stages. Raises ConfigError for a stage that cannot be."""
    starts, configs, now = [0], [config], config
    for stage in config.stages:
        fixed = [key for key in stage.changes if key.split(".")[0] in _FIXED]
        if fixed:
            raise ConfigError(f"stages: the stage at step {stage.start} cannot change {', '.join(fixed)}")
        if stage.start >= config.steps:
            break
        now = changed(now, stage.changes)
        starts.append(stage.start)
        configs.append(now)
    renewed = [0] + [s for s, a, b in zip(starts[1:], configs[:-1], configs[1:], strict=True) if a.optim != b.optim]
    ends = [*starts[1:], config.steps]
    return tuple(
        Phase(start, end, now, _span(renewed, start, config.steps))
        for start, end, now in zip(starts, ends, configs, strict=True)
    )


def _span(renewed: list[int], start: int, steps: int) -> tuple[int, int]:
    """Where the schedule that is running at `start` began, and where it ends."""
    begin = max(at for at in renewed if at <= start)
    return begin, min([at for at in renewed if at > begin], default=steps)


@dataclass
class State:
    """A run at `step` steps taken. nets: role to module; optimizers: of the roles that move.

    samples: how many all its processes had of the data, or passed over where the size of a batch changed.
    """

    step: int
    nets: dict[str, nn.Module]
    optimizers: dict[str, Optimizer]
    ema: Ema | None
    device: torch.device
    samples: int = 0

    @property
    def student(self) -> nn.Module:
        """The averaged student where there is one: what to generate with."""
        return self.ema.module if self.ema else self.nets["student"]

    @property
    def players(self) -> dict[str, nn.Module]:
        """What an objective sees: the networks of all roles, and the average as "ema" where there is one."""
        return {**self.nets, "ema": self.ema.module} if self.ema else self.nets

    def modules(self) -> dict[str, nn.Module]:
        """What a checkpoint holds: the roles that move, and "ema"."""
        moving = {role: self.nets[role] for role in self.optimizers}
        return {**moving, "ema": self.ema.module} if self.ema else moving

    def save(self, folder: Path, keep: int) -> Path:
        """Write a checkpoint of this moment."""
        optimizers = {role: optimizer.state_dict() for role, optimizer in self.optimizers.items()}
        values = {"optimizers": optimizers}
        return checkpoint.save(folder, self.step, self.modules(), values, self.samples, keep=keep)

    def load(self, path: Path) -> None:
        """Go to the moment of a checkpoint; raises WeightsError when it is of other networks or optimisers."""
        checkpoint.restore(path, self.modules(), self.optimizers)
        self.step = checkpoint.step_of(path)

    def renew(self, before: TrainConfig, now: TrainConfig) -> None:
        """Give the student the optimiser of a new phase; moments of what moves on stay where the kind does."""
        if before.optim == now.optim:
            return
        old = self.optimizers["student"]
        # between turns of other roles the student collects no gradients
        for parameter in (*old.parameters, *old.frozen):
            parameter.requires_grad_(True)
        self.optimizers["student"] = Optimizer(self.nets["student"], now.optim)
        self.optimizers["student"].take_over(old)


def networks(
    config: TrainConfig,
    place: Callable[[str, nn.Module], nn.Module],
    make: Callable[[Any], nn.Module] = lambda model: model.build(),
) -> dict[str, nn.Module]:
    """Role to network: first those of their own, each made and put in its place, then those that share one of them."""
    models = config.models
    nets = {name: place(name, make(model)) for name, model in models.items() if not isinstance(model, Shared)}
    for name, model in models.items():
        if isinstance(model, Shared):
            nets[name] = place(name, model.on(nets[model.base], name))
    return {name: nets[name] for name in models}


def build(config: TrainConfig, world: World, optim: Optim | None = None) -> State:
    """Networks with their first weights (drawn from the seed, or read from `init`), optimisers and average."""
    torch.manual_seed(config.seed)
    inits = {"student": config.init} | {name: role.init for name, role in config.roles.items()}
    optims = {"student": optim or config.optim} | {name: role.optim for name, role in config.roles.items()}
    averages: list[Ema] = []

    def place(name: str, module: nn.Module) -> nn.Module:
        init = inits[name]
        if init and world.first:
            checkpoint.load_weights(module, init)
        module = module.train() if optims[name] else module.eval().requires_grad_(False)
        if name == "student" and config.ema is not None:  # before it is divided: what is cannot be copied
            averages.append(Ema(module, config.ema))
            world.place(averages[0].module, "ema")
        return world.place(module, name)

    nets = networks(config, place, world.build)
    for name, module in nets.items():
        if config.compile and optims[name]:
            module.compile()
    optimizers = {name: Optimizer(nets[name], kind) for name, kind in optims.items() if kind is not None}
    return State(0, nets, optimizers, averages[0] if averages else None, world.device)


@dataclass(frozen=True)
class Validation:
    """What a validation function gets: the run at a moment, and a folder for samples."""

    step: int
    student: nn.Module
    nets: dict[str, nn.Module]
    config: TrainConfig
    device: torch.device
    folder: Path

    @classmethod
    def of(cls, state: State, config: TrainConfig, folder: Path) -> Validation:
        """The validation of a run as it stands; `folder` is made."""
        folder.mkdir(parents=True, exist_ok=True)
        return cls(state.step, state.student, dict(state.nets), config, state.device, folder)
