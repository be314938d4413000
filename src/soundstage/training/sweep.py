"""A search over the settings of any recipe: trials of one study in a file, which goes on where it stopped."""

from __future__ import annotations

import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch

from soundstage.core.errors import ConfigError
from soundstage.core.extras import optional
from soundstage.training import checkpoint
from soundstage.training.config import TrainConfig, describe
from soundstage.training.engine import RunError, train
from soundstage.training.metrics import read
from soundstage.training.overrides import override


@dataclass(frozen=True)
class Range:
    """A setting and the numbers it may have. whole: integers, as both ends are written without a point.

    log: each factor of ten is as likely as another, where both ends are above 0 and ten times apart or more.
    """

    key: str
    low: float
    high: float
    whole: bool = False

    @classmethod
    def parse(cls, text: str) -> Range:
        """Reads key=low..high; raises ConfigError for anything else."""
        key, sign, span = text.partition("=")
        ends = span.split("..")
        try:
            low, high = map(float, ends)
        except ValueError:
            low, high = math.nan, math.nan
        if not (key and sign and -math.inf < low < high < math.inf):
            raise ConfigError(f"{text!r} is not key=low..high with low below high, for example optim.lr=1e-5..1e-3")
        return cls(key, low, high, all(end.strip().lstrip("+-").isdigit() for end in ends))

    @property
    def log(self) -> bool:
        """Whether it is searched by factors."""
        return self.low > 0 and self.high >= 10 * self.low

    def suggest(self, trial: Any) -> str:  # noqa: ANN401
        """The trial's value as an override."""
        if self.whole:
            value = trial.suggest_int(self.key, int(self.low), int(self.high), log=self.log)
        else:
            value = trial.suggest_float(self.key, self.low, self.high, log=self.log)
        return f"{self.key}={value!r}"


@dataclass(frozen=True)
class Trial:
    """One run: its settings as overrides, the metric it ended with, and how it ended.

    state: "done", "pruned" (it lagged behind the others at the same step), or "stopped" (by itself, `why` says).
    """

    number: int
    settings: tuple[str, ...]
    value: float | None
    state: str
    step: int
    why: str = ""


@dataclass(frozen=True)
class Result:
    """All finished trials, the best first, and whether as many as asked for are finished."""

    trials: tuple[Trial, ...]
    whole: bool

    @property
    def best(self) -> Trial | None:
        """The best trial that ran to its end."""
        return next((trial for trial in self.trials if trial.state == "done"), None)


OnTrial = Callable[[int, str], None]


def sweep(
    config: TrainConfig,
    ranges: Sequence[Range],
    metric: str,
    out: Path,
    *,
    trials: int = 20,
    maximize: bool = False,
    seed: int = 0,
    device: str | torch.device | None = None,
    on_trial: OnTrial | None = None,
) -> Result:
    """Run until `trials` runs of `config` are finished; the same call goes on where the study in `out` stopped.

    metric: a logged name, such as validate/f1; a run counts with its last value, and is pruned where it is worse than
        the median of the others at the same step. A run that stops by itself (its loss or its health) counts as pruned.
    out: folder of study.db and the trials' runs; checkpoints stay of the best alone. Interrupted, a trial is resumed
        from its last checkpoint. on_trial: told how many are finished, and a word on the one that runs.
    Raises ConfigError for settings that the recipe does not have, a metric that is not logged, another study in `out`,
    and under torchrun; MissingExtra without optuna.
    """
    optuna = optional("optuna", "train")
    _check(config, ranges, metric, trials)
    with _study(optuna, out, config, ranges, metric, maximize) as study:
        finished = _finished(study)
        while len(finished) < trials:
            study.sampler = optuna.samplers.TPESampler(seed=seed * 10_007 + len(finished), n_startup_trials=5)
            if not _run(optuna, study, config, ranges, metric, out, device, _telling(on_trial, len(finished))):
                break
            finished = _finished(study)
            _tidy(out, finished, maximize)
            if on_trial:
                on_trial(len(finished), "")
        return Result(_sorted(finished, maximize), len(finished) >= trials)


def _telling(on_trial: OnTrial | None, finished: int) -> Callable[[str], None]:
    return (lambda note: on_trial(finished, note)) if on_trial else (lambda _: None)


def _check(config: TrainConfig, ranges: Sequence[Range], metric: str, trials: int) -> None:
    if not ranges:
        raise ConfigError("there is nothing to search: give a range, for example optim.lr=1e-5..1e-3")
    if trials < 1:
        raise ConfigError(f"trials: {trials} is not at least 1")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("sweep: it runs in one process; start it without torchrun")
    if metric.startswith("validate/") and (config.validate is None or not config.validate_every):
        raise ConfigError(f"metric: {metric} is measured by validation, which is off; set validate_every")
    for end in ("low", "high"):
        override(config, [f"{r.key}={int(getattr(r, end)) if r.whole else getattr(r, end)!r}" for r in ranges])


@contextmanager
def _study(
    optuna: Any,  # noqa: ANN401
    out: Path,
    config: TrainConfig,
    ranges: Sequence[Range],
    metric: str,
    maximize: bool,
) -> Iterator[Any]:
    """The study in `out`, begun or resumed; trials that were cut off wait to be run first."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    out.mkdir(parents=True, exist_ok=True)
    storage = optuna.storages.RDBStorage(f"sqlite:///{out.resolve() / 'study.db'}")
    about = {
        "recipe": config.name,
        "ranges": [asdict(r) for r in ranges],
        "metric": metric,
        "maximize": maximize,
        "settings": blake2b(json.dumps(describe(config), sort_keys=True).encode()).hexdigest(),
    }
    try:
        study = optuna.create_study(
            storage=storage,
            study_name="sweep",
            direction="maximize" if maximize else "minimize",
            load_if_exists=True,
            pruner=optuna.pruners.MedianPruner(n_startup_trials=4),
        )
        before = study.user_attrs.get("about", about)
        differing = [name for name in about if before.get(name) != about[name]]
        if differing:
            raise ConfigError(f"{out} holds a study with other {', '.join(differing)}; choose another folder")
        study.set_user_attr("about", about)
        for trial in study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
            study.enqueue_trial(trial.params, skip_if_exists=False)
        yield study
    finally:
        storage.remove_session()
        storage.engine.dispose()


def _run(
    optuna: Any,  # noqa: ANN401
    study: Any,  # noqa: ANN401
    config: TrainConfig,
    ranges: Sequence[Range],
    metric: str,
    out: Path,
    device: str | torch.device | None,
    tell: Callable[[str], None],
) -> bool:
    """One trial; False when it was interrupted."""
    trial = study.ask()
    settings = [r.suggest(trial) for r in ranges]
    folder = out / _name(settings)
    tried = replace(override(config, settings), out=str(folder), keep=1)
    last = checkpoint.latest(folder / "checkpoints")
    watch = _Watch(trial, metric, lambda step: tell(f"trial {trial.number}: step {step} of {tried.steps}"))
    state, why = optuna.trial.TrialState.COMPLETE, ""
    try:
        for entry in read(folder) if last else []:
            if entry["step"] <= checkpoint.step_of(last or folder):
                watch(entry)
        if train(tried, folder, device=device, on_log=watch).step < tried.steps:
            return False
    except _Pruned:
        state = optuna.trial.TrialState.PRUNED
    except RunError as error:
        state, why = optuna.trial.TrialState.PRUNED, str(error)
    if state == optuna.trial.TrialState.COMPLETE and watch.value is None:
        raise ConfigError(f"metric: {metric!r} was not logged; there are {', '.join(sorted(watch.names))}")
    trial.set_user_attr("settings", settings)
    trial.set_user_attr("step", watch.step)
    trial.set_user_attr("why", why)
    if state == optuna.trial.TrialState.COMPLETE:
        study.tell(trial, watch.value)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a run that stopped before its first value has none
            study.tell(trial, state=state)
    return True


class _Pruned(Exception):
    """The trial lags behind."""


class _Watch:
    """Reads what a run logs: reports the metric, and stops a run that lags behind."""

    def __init__(self, trial: Any, metric: str, tell: Callable[[int], None]) -> None:  # noqa: ANN401
        self.trial, self.metric, self.tell = trial, metric, tell
        self.value: float | None = None
        self.step, self.names = 0, set[str]()

    def __call__(self, entry: Mapping[str, float | None]) -> None:
        """One entry of metrics.jsonl."""
        self.step = int(entry["step"] or 0)
        self.names |= entry.keys() - {"step"}
        self.tell(self.step)
        value = entry.get(self.metric)
        if value is None or not math.isfinite(value):
            return
        self.value = value
        self.trial.report(value, self.step)
        if self.trial.should_prune():
            raise _Pruned


def _finished(study: Any) -> list[Trial]:  # noqa: ANN401
    """Trials that count, in order."""
    states = {"COMPLETE": "done", "PRUNED": "pruned"}
    found = []
    for trial in study.get_trials(deepcopy=False):
        if trial.state.name in states and "settings" in trial.user_attrs:
            about = trial.user_attrs
            last = trial.intermediate_values.get(max(trial.intermediate_values, default=-1))
            state = "stopped" if about["why"] else states[trial.state.name]
            found.append(Trial(trial.number, tuple(about["settings"]), last, state, about["step"], about["why"]))
    return found


def _sorted(trials: Sequence[Trial], maximize: bool) -> tuple[Trial, ...]:
    """Those that ran to their end first, each kind the best first."""

    def place(trial: Trial) -> tuple[int, float]:
        value = math.inf if trial.value is None else -trial.value if maximize else trial.value
        return ("done", "pruned", "stopped").index(trial.state), value

    return tuple(sorted(trials, key=place))


def _tidy(out: Path, trials: Sequence[Trial], maximize: bool) -> None:
    """Checkpoints stay of the best trial alone."""
    best = _sorted(trials, maximize)[0]
    for trial in trials:
        if _name(trial.settings) != _name(best.settings):
            shutil.rmtree(out / _name(trial.settings) / "checkpoints", ignore_errors=True)


def _name(settings: Sequence[str]) -> str:
    """The folder of a trial: the same settings go on in the same folder."""
    return f"trial-{blake2b(' '.join(settings).encode(), digest_size=6).hexdigest()}"
