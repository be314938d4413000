"""Health: rules over what a run has logged that stop it, and say why, before it wastes its hours.

Every rule is a pure function of the logged entries, so a run that was killed and resumed decides as one that was not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from soundstage.core.av import MODALITIES
from soundstage.core.errors import ConfigError

Entry = Mapping[str, float | None]
DRAWS = 20
"""Logged entries per exit before their shares are judged: fair draws of one exit each fail about once in 10^8."""


@dataclass(frozen=True)
class Health:
    """Bounds outside of which a run stops; None = that rule is off. A rule whose numbers are not logged is silent.

    critic: error/fake/M, how far the fake score predicts from the student's samples, is at most so many times
        error/teacher/M: a fake score that knows them less well than that no longer leads anywhere.
    gradient: each grad_norm/... (of roles; of terms and modalities where probed) is at most so many times its median.
    exits: the rarest exit/K has at least this part of an equal share.
    brightness, saturation (of 1), loudness (dB): how far validate/... may drift from validate/teacher/..., or from the
        first validation where there is no teacher's.
    diversity: validate/diversity/M is at least this part of validate/teacher/diversity/M.
    sync: validate/sync is at least this part of validate/teacher/sync: scores of one modality cannot see a picture and
        a sound that belong to different clips.
    coverage: validate/coverage/M, the share of the teacher's samples that have one of the student's near, is at least
        this: a lost mode lowers it by its share. `vitals.Vitals` measures all of the last six.
    window: logged entries of which the mean is judged. patience: validations in a row that must fail. after: the step
        up to which nothing is judged.
    """

    critic: float | None = 3.0
    gradient: float | None = 100.0
    exits: float | None = 0.1
    brightness: float | None = 0.15
    saturation: float | None = 0.15
    loudness: float | None = 10.0
    diversity: float | None = 0.5
    sync: float | None = 0.5
    coverage: float | None = 0.5
    window: int = 5
    patience: int = 2
    after: int = 0

    def __post_init__(self) -> None:
        if self.window < 1 or self.patience < 1:
            raise ConfigError(f"health: window {self.window} and patience {self.patience} must be at least 1")

    def __call__(self, history: Sequence[Entry]) -> str | None:
        """Why the run with these entries, oldest first, must stop; None where it may go on."""
        found = next((reason for rule in RULES for reason in rule(self, history)), None)
        return None if found is None else f"step {history[-1]['step']:g}: {found}"


def critic_gap(health: Health, history: Sequence[Entry]) -> Iterator[str]:
    """The fake score has lost the student."""
    if health.critic is None:
        return
    for name in MODALITIES:
        fake, teacher = (_values(history, f"error/{role}/{name}", health.after) for role in ("fake", "teacher"))
        if min(len(fake), len(teacher)) < health.window:
            continue
        ratio = fmean(fake[-health.window :]) / max(fmean(teacher[-health.window :]), 1e-12)
        if ratio > health.critic:
            yield _reason(
                f"the fake score is {ratio:.3g} times as far from the student's {name} as the teacher is",
                "critic",
                health.critic,
                "Raise objective.ratio, objective.warmup or its learning rate, or lower optim.lr",
            )


def gradient_norm(health: Health, history: Sequence[Entry]) -> Iterator[str]:
    """A gradient has grown out of all proportion."""
    if health.gradient is None or not history:
        return
    recent = history[-health.window :]
    for name in sorted({key for entry in recent for key in entry if key.startswith("grad_norm/")}):
        values = _values(history, name, health.after)
        if len(values) < 4 * health.window:
            continue
        now, usual = fmean(values[-health.window :]), median(values[: -health.window])
        if usual > 0 and now > health.gradient * usual:
            yield _reason(
                f"{name} is {now:.3g}, {now / usual:.3g} times its median",
                "gradient",
                health.gradient,
                "Lower the learning rate of what moves, or the weight of that term",
            )


def exit_collapse(health: Health, history: Sequence[Entry]) -> Iterator[str]:
    """Some step of the student is hardly ever trained."""
    if health.exits is None or not history:
        return
    names = sorted({key for entry in history[-health.window :] for key in entry if key.startswith("exit/")})
    need = DRAWS * len(names)
    shares = {name: _values(history, name, health.after) for name in names}
    if len(names) < 2 or min(map(len, shares.values())) < need:
        return
    means = {name: fmean(values[-need:]) for name, values in shares.items()}
    rarest = min(means, key=lambda name: means[name])
    if means[rarest] < health.exits / len(names):
        yield _reason(
            f"{rarest} has a share of {means[rarest]:.2g} of the last {need} entries, where 1/{len(names)} is equal",
            "exits",
            health.exits,
            "Look at how objective.rollout draws its exits",
        )


def sample_drift(health: Health, history: Sequence[Entry]) -> Iterator[str]:
    """Samples grow brighter, duller or louder than the teacher's."""
    for name, unit in (("brightness", ""), ("saturation", ""), ("loudness", " dB")):
        bound = getattr(health, name)
        values = _values(history, f"validate/{name}", health.after)
        if bound is None or not values:
            continue
        teacher = _values(history, f"validate/teacher/{name}")
        reference = teacher[-1] if teacher else values[0]
        if _lasting(health, values, lambda value, to=reference, bound=bound: abs(value - to) > bound):
            of = "the teacher's" if teacher else "the first validation's"
            yield _reason(
                f"the {name} of the samples is {values[-1]:.3g}{unit}, that of {of} {reference:.3g}{unit}",
                name,
                bound,
                "Add an anchor to the objective, or lower optim.lr",
            )


def mode_drop(health: Health, history: Sequence[Entry]) -> Iterator[str]:
    """The student makes less than the teacher does."""
    remedy = "Add a consistency anchor, lower optim.lr, or raise objective.ratio or objective.warmup"
    for name in MODALITIES:
        values = _values(history, f"validate/diversity/{name}", health.after)
        teacher = _values(history, f"validate/teacher/diversity/{name}")
        if health.diversity is not None and teacher:
            least = health.diversity * teacher[-1]
            if _lasting(health, values, lambda value, least=least: value < least):
                what = f"{name} of different seeds differs by {values[-1]:.3g}, the teacher's by {teacher[-1]:.3g}"
                yield _reason(what, "diversity", health.diversity, remedy)
        values = _values(history, f"validate/coverage/{name}", health.after)
        if health.coverage is not None:
            least = health.coverage
            if _lasting(health, values, lambda value, least=least: value < least):
                what = f"{values[-1]:.3g} of the teacher's {name} samples have a student's near: modes are lost"
                yield _reason(what, "coverage", health.coverage, remedy)


def out_of_step(health: Health, history: Sequence[Entry]) -> Iterator[str]:
    """Sound and picture of the samples do not belong together as the teacher's do."""
    values = _values(history, "validate/sync", health.after)
    teacher = _values(history, "validate/teacher/sync")
    if health.sync is None or not teacher:
        return
    least = health.sync * teacher[-1]
    if _lasting(health, values, lambda value: value < least):
        yield _reason(
            f"sync of the samples is {values[-1]:.3g}, the teacher's {teacher[-1]:.3g}",
            "sync",
            health.sync,
            "Score both modalities together, raise the weight of audio, or add an anchor to the objective",
        )


RULES: tuple[Callable[[Health, Sequence[Entry]], Iterator[str]], ...] = (
    critic_gap,
    gradient_norm,
    exit_collapse,
    sample_drift,
    mode_drop,
    out_of_step,
)


def _lasting(health: Health, values: Sequence[float], bad: Callable[[float], bool]) -> bool:
    """Whether the last `patience` values are all bad."""
    return len(values) >= health.patience and all(map(bad, values[-health.patience :]))


def _values(history: Sequence[Entry], name: str, after: int = 0) -> list[float]:
    """The finite values logged under a name beyond a step; JSON keeps None for others."""
    found = (entry.get(name) for entry in history if (entry["step"] or 0) > after)
    return [value for value in found if value is not None and math.isfinite(value)]


def _reason(what: str, rule: str, bound: float, remedy: str) -> str:
    return (
        f"{what} (health.{rule}={bound:g}); the last checkpoint is kept. {remedy}, and start from an earlier one, "
        f"or set health.{rule}=none to go on as it is"
    )
