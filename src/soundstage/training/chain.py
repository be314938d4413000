"""Runs one after another, with a gate between them: each begins from the student before, which is also its teacher."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from soundstage.core.errors import ConfigError
from soundstage.objectives.progressive import Gate
from soundstage.training import checkpoint
from soundstage.training.config import TrainConfig, recipe_function
from soundstage.training.engine import RunError, train
from soundstage.training.metrics import read
from soundstage.training.overrides import changed, override


@dataclass(frozen=True)
class Chain:
    """run: what all links share; overrides on the command line reach it.

    links: name to changes, dotted names of TrainConfig to values. gate: what a link's student must reach in the run's
    validation, at its end; else the link is extended by `extension` of its steps, and in the end the chain stops.
    """

    run: TrainConfig
    links: Mapping[str, Mapping[str, Any]]
    gate: Gate | None = None
    extension: float = 0.5

    def __post_init__(self) -> None:
        if not self.links or not self.extension > 0:
            raise ConfigError("Chain: needs at least one link, and an extension above 0")
        if self.gate is not None and (self.run.validate is None or self.run.validate_every < 1):
            raise ConfigError("Chain.gate: it is of a validation; set run.validate and run.validate_every")

    @property
    def folder(self) -> Path:
        """Where the links have their folders."""
        return self.run.folder

    @property
    def configs(self) -> tuple[TrainConfig, ...]:
        """The run of each link in order: from the second on, student and teacher are the student before."""
        made: list[TrainConfig] = []
        for name, changes in self.links.items():
            config = changed(self.run, changes)
            config = replace(config, name=f"{self.run.name}-{name}", out=str(self.folder / name))
            if made:
                before = made[-1].out
                teacher = config.roles.get("teacher")
                roles = {} if teacher is None else {"teacher": replace(teacher, init=before)}
                config = replace(config, init=before, roles={**config.roles, **roles})
            made.append(config)
        return tuple(made)


def load(name: str, words: Sequence[str] = ()) -> TrainConfig | Chain:
    """The recipe of that name with `key=value` words: those that are the function's own parameters, and overrides.

    Raises ConfigError for a name that is no recipe, and for a word that fits neither.
    """
    function = recipe_function(name)
    own = set(inspect.signature(function).parameters)
    given = {key: value for key, sign, value in (word.partition("=") for word in words) if sign and key in own}
    rest = [word for word in words if word.partition("=")[0] not in given]
    recipe = function(**given)
    if isinstance(recipe, Chain):
        return replace(recipe, run=override(recipe.run, rest))
    if not isinstance(recipe, TrainConfig):
        raise ConfigError(f"recipe: {name} returned {type(recipe).__name__}, not a TrainConfig or a Chain")
    return override(recipe, rest)


def train_chain(
    chain: Chain,
    *,
    on_link: Callable[[TrainConfig], None] = lambda _: None,
    **how: Any,  # noqa: ANN401
) -> bool:
    """Run what is left of a chain; how: as in `train`. True when it is done, False when it was stopped by a signal.

    on_link: called with each run before it begins or goes on. Raises RunError where a link's student does not pass the
    gate with all its extensions; what was trained is kept.
    """
    for config in chain.configs:
        extended = 0
        while True:
            steps = config.steps + round(extended * chain.extension * config.steps)
            now = replace(config, steps=steps)
            if _reached(now) < steps:
                on_link(now)
                if train(now, **how).step < steps:
                    return False
                if torch.distributed.is_initialized():
                    torch.distributed.barrier()  # the first process has written what was measured
            verdict = "pass" if chain.gate is None else chain.gate(measured(now), extended)
            if verdict == "pass":
                break
            if verdict == "stop":
                raise RunError(_failed(chain, now, extended))
            extended += 1
    return True


def measured(config: TrainConfig) -> dict[str, float]:
    """What the validation at the end of a run found."""
    last = [entry for entry in read(config.folder) if entry["step"] == config.steps]
    named = (item for entry in last for item in entry.items() if item[0].startswith("validate/"))
    return {name.removeprefix("validate/"): float(value) for name, value in named}


def _reached(config: TrainConfig) -> int:
    last = checkpoint.latest(config.folder / "checkpoints")
    return checkpoint.step_of(last) if last else 0


def _failed(chain: Chain, config: TrainConfig, extended: int) -> str:
    gate = chain.gate
    assert gate is not None
    bounds = {"at least": gate.at_least, "at most": gate.at_most}
    wanted = " and ".join(f"{word} {bound:g}" for word, bound in bounds.items() if bound is not None)
    return (
        f"{config.name}: {gate.metric} is {measured(config)[gate.metric]:.4g} after {config.steps} steps and "
        f"{extended} extensions, and must be {wanted}; the students are kept in {chain.folder}. Lower optim.lr or take "
        "smaller strides between the links, and run the same command again in another folder"
    )
