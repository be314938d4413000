"""The one training loop: every objective, every network, any mix of roles."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from soundstage.core.errors import ConfigError, SoundstageError
from soundstage.core.parallel import only_rank_zero
from soundstage.core.rng import Rng
from soundstage.objectives.base import Batch
from soundstage.training import checkpoint, probe, provenance
from soundstage.training.config import TrainConfig
from soundstage.training.metrics import Log, Meter
from soundstage.training.optim import Optimizer, rate
from soundstage.training.parallel import World, joined
from soundstage.training.shards import Writer
from soundstage.training.state import Phase, State, Validation, build, phases


class RunError(SoundstageError, RuntimeError):
    """A run cannot go on: a loss that is not finite, a bound of its health, or memory that is used up."""


OnLog = Callable[[Mapping[str, float]], None]


def train(
    config: TrainConfig,
    out: str | Path | None = None,
    *,
    device: str | torch.device | None = None,
    on_log: OnLog | None = None,
    tensorboard: bool = True,
) -> State:
    """Run a recipe to its end, resuming from the last checkpoint in `out` where there is one.

    out: folder of the run (default config.folder): config.json, environment.json, diff.txt, metrics.jsonl,
        tensorboard/, checkpoints/, samples/. device: default "cuda" where present, else "cpu".
    on_log: called with every logged entry. SIGTERM and SIGINT save and return early: state.step < config.steps.
    Under torchrun every process calls this alike, and its first writes and calls `on_log`.
    Raises RunError when the loss is not finite, a bound of config.health is passed or memory runs out, LostError when
    another process of the run is gone; the last checkpoint is kept.
    """
    folder = Path(out) if out else config.folder
    plan = phases(config)
    with joined(config.parallel, device, bf16=config.precision == "bf16") as world, ExitStack() as stack:
        _check(plan, world)
        only_rank_zero(lambda: provenance.record(config, folder), world.writers)
        last = world.told(checkpoint.latest(folder / "checkpoints"))
        done = checkpoint.step_of(last) if last else 0
        current = next(phase for phase in reversed(plan) if phase.start < max(1, done))
        state = build(config, world, current.config.optim)
        if last:
            state.load(last)
            state.samples = checkpoint.samples_of(last) or sum(p.config.batch_size * p.taken(done) for p in plan)
        log = stack.enter_context(Log(folder, state.step, tensorboard=tensorboard)) if world.first else None
        run = _Run(folder, state, world, log, on_log or (lambda _: None), stack.enter_context(_interrupts()))
        stack.callback(run.writer.close)
        for phase in plan:
            if phase.end <= state.step or run.stopped:
                continue
            state.renew(current.config, phase.config)
            current = phase
            run.phase(phase)
        run.writer.wait()
    return state


def _check(plan: Sequence[Phase], world: World) -> None:
    """Raises ConfigError where a phase cannot be done by these processes."""
    for phase in plan:
        config = phase.config
        if config.batch_size % (world.parts * config.accumulate):
            raise ConfigError(
                f"batch_size: {config.batch_size} does not divide over {world.parts} processes with "
                f"accumulate={config.accumulate}; make it a multiple of {world.parts * config.accumulate}"
            )
        if config.probe_every and world.mesh is not None:
            raise ConfigError("probe_every: gradients by noise level cannot be had of divided weights; set it to 0")


class _Run:
    """One call of `train`."""

    def __init__(
        self, folder: Path, state: State, world: World, log: Log | None, on_log: OnLog, stop: threading.Event
    ) -> None:
        self.folder, self.state, self.world, self.log, self.on_log = folder, state, world, log, on_log
        self.stop, self.stopped = stop, False
        self.meter, self.writer = Meter(), Writer(world)

    def phase(self, phase: Phase) -> None:
        """The loop. Everything drawn at a step depends on the seed and the step alone, so resume is exact."""
        config, state, world = phase.config, self.state, self.world
        self._judge(config)
        size = config.batch_size
        # the first whole batch that no step has had, whatever the batches so far held
        ahead = -(-state.samples // size) - state.step
        with _Loader(world.after_first(config.data.build), size, phase.end + ahead, world) as loader:
            self.meter.resume()
            while state.step < phase.end and not self._stopping():
                batch = loader.batch(state.step + ahead).to(state.device)
                torch.manual_seed(config.seed * 1_000_003 + state.step + (world.part << 40))
                for role in config.objective.turn(state.step):
                    self._move(role, batch, phase)
                    world.rest(state.nets.values())
                if state.ema:
                    state.ema.update(state.nets["student"], state.step)
                state.step += 1
                state.samples = (state.step + ahead) * size
                self.meter.step(size)
                self._after(config)
        if self.stopped:
            self._save(config)

    def _stopping(self) -> bool:
        """Whether any process was asked to stop: all of them do, after the same step."""
        self.stopped = self.world.any(self.stop.is_set())
        return self.stopped

    def _move(self, role: str, batch: Batch, phase: Phase) -> None:
        """One step of one role: accumulate, clip, step."""
        config, state = phase.config, self.state
        optimizer = _optimizer(state, role)
        probing = bool(config.probe_every) and state.step % config.probe_every == 0
        with _memory_report(config, self.world.parts):
            for index in range(config.accumulate):
                part = batch.part(index, config.accumulate) if config.accumulate > 1 else batch
                start = self.world.part * len(batch) + index * len(part)
                rng = Rng.of(config.seed, len(part), start=start).fold("step", state.step, role)
                terms = self._terms(role, part, rng, config)
                self._read(terms, config)
                if probing and index == 0:
                    found = probe.gradients(terms, optimizer.parameters, lambda name: weight(name, config.weights))
                    for name, value in found.items():
                        self.meter.add(name, value)
                (total(terms, config.weights) / config.accumulate).backward()
        self.world.average(optimizer.parameters)
        norm = float(optimizer.clip())
        if not math.isfinite(norm):
            raise RunError(_not_finite(f"the gradient of {role}", norm, state.step, config))
        begin, end = phase.schedule
        lr = rate(optimizer.optim, state.step - begin, end - begin)
        optimizer.step(lr)
        self.meter.add(f"grad_norm/{role}", norm)
        self.meter.add(f"lr/{role}", lr)

    def _terms(self, role: str, part: Batch, rng: Rng, config: TrainConfig) -> dict[str, Tensor]:
        kind = self.state.device.type
        with torch.autocast(kind, torch.bfloat16, enabled=config.precision == "bf16"):
            return config.objective.loss(role, self.state.players, part, rng)

    def _read(self, terms: Mapping[str, Tensor], config: TrainConfig) -> None:
        """Log the terms and reports, as means over the processes; stop when one is not finite."""
        flat = torch.cat([term.detach().float().reshape(-1) for term in terms.values()])
        flat = self.world.mean(flat).tolist()
        loss, at = 0.0, 0
        for name, term in terms.items():
            values, at = flat[at : at + term.numel()], at + term.numel()
            if not all(map(math.isfinite, values)):
                raise RunError(_not_finite(name, values[0], self.state.step, config))
            self.meter.add(name, values[0], values[1] if len(values) == 2 else 1.0)
            if len(values) == 1:
                loss += weight(name, config.weights) * values[0]
        self.meter.add("loss", loss)

    def _after(self, config: TrainConfig) -> None:
        """Log, validate and save where it is time to."""
        step, last = self.state.step, self.state.step == config.steps
        due = config.validate is not None and config.validate_every > 0 and (step % config.validate_every == 0 or last)
        saving = step % config.save_every == 0 or last
        if step % config.log_every == 0 or saving or due:
            self._log(self.meter.take(), config)
        if saving:
            self._save(config)
        if due and config.validate is not None:
            self._log({f"validate/{name}": value for name, value in self._validated(config).items()}, config)
        if saving or due:
            self.meter.resume()

    def _validated(self, config: TrainConfig) -> Mapping[str, float]:
        """Every process validates, as a divided student needs them all; only the first one's samples are kept."""
        with ExitStack() as stack:
            folder = self.folder / "samples" / f"step-{self.state.step:08d}"
            if not self.world.first:
                folder = Path(stack.enter_context(TemporaryDirectory()))
            found = config.validate(Validation.of(self.state, config, folder)) if config.validate else {}
            self.world.rest([*self.state.nets.values(), self.state.student])
            return found

    def _log(self, values: Mapping[str, float], config: TrainConfig) -> None:
        if values and self.log is not None:
            self.on_log(self.log.write(self.state.step, values))
        self._judge(config)

    def _judge(self, config: TrainConfig) -> None:
        """Stop the run where what was logged is beyond the bounds of its health."""
        reason = config.health(self.log.entries) if self.log is not None else None
        if self.world.any(reason is not None):
            self.writer.wait()
            raise RunError(self.world.told(reason))

    def _save(self, config: TrainConfig) -> None:
        folder, state = self.folder / "checkpoints", self.state
        if self.world.size == 1:
            state.save(folder, config.keep)
        else:
            checkpoint.save_divided(
                self.writer, folder, state.step, state.modules(), state.optimizers, state.samples, keep=config.keep
            )


def weight(name: str, weights: Mapping[str, float]) -> float:
    """The factor of a term: its own, else its modality's, else 1."""
    return weights.get(name, weights.get(name.rpartition("/")[2], 1.0))


def total(terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Weighted sum of the scalar terms that depend on a parameter that moves; raises ConfigError when none does."""
    scalars = {name: term for name, term in terms.items() if term.ndim == 0 and term.requires_grad}
    if not scalars:
        raise ConfigError(f"objective: none of its terms ({', '.join(terms)}) depends on a parameter that moves")
    return torch.stack([weight(name, weights) * term.float() for name, term in scalars.items()]).sum()


def _optimizer(state: State, role: str) -> Optimizer:
    """The role's optimiser, with only its parameters collecting gradients."""
    if role not in state.optimizers:
        raise ConfigError(
            f"objective moves {role!r}, but the roles that move are {', '.join(state.optimizers)}: give it an optim"
        )
    if len(state.optimizers) > 1:
        for name, optimizer in state.optimizers.items():
            for parameter in optimizer.parameters:
                parameter.requires_grad_(name == role)
    return state.optimizers[role]


def _not_finite(what: str, value: float, step: int, config: TrainConfig) -> str:
    clip = "" if config.optim.clip else ", set optim.clip=1"
    bf16 = ", try precision=fp32" if config.precision == "bf16" else ""
    return (
        f"step {step}: {what} is {value}; the last checkpoint is kept. "
        f"Lower optim.lr (now {config.optim.lr:g}){clip}{bf16}, or look for bad samples in the data of this step, "
        "and run the same command again"
    )


@contextmanager
def _memory_report(config: TrainConfig, parts: int) -> Iterator[None]:
    """Turn running out of memory into a RunError that says what to change."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # the CPU allocator raises a plain RuntimeError
        told = ("can't allocate memory", "not enough memory")
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and not any(text in str(error) for text in told):
            raise
        size = config.batch_size // (config.accumulate * parts)
        halves = f"accumulate={config.accumulate * 2} (the same result from half the samples at a time)"
        remedy = halves if size > 1 and size % 2 == 0 else "a smaller model or shorter clips"
        bf16 = "precision=bf16, " if config.precision == "fp32" else ""
        raise RunError(
            f"memory is used up by {size} samples at a time; use {bf16}{remedy}, and run the same command again"
        ) from error


@contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set; a second signal acts as usual. Outside the main thread: never set."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: Any) -> None:  # noqa: ANN401, ARG001
        stop.set()
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Loader:
    """Reads the batch of the next step in a thread while this one trains."""

    def __init__(self, data: Any, size: int, end: int, world: World) -> None:  # noqa: ANN401
        self._data, self._end = data, end
        self._which = size, world.part, world.parts
        self._pool = ThreadPoolExecutor(1)
        self._next: tuple[int, Future[Batch]] | None = None

    def batch(self, step: int) -> Batch:
        """This process's part of the batch of `step`; raises what the data raises."""
        if self._next is not None and self._next[0] == step:
            found = self._next[1].result()
        else:
            found = self._data.batch(step, *self._which)
        if step + 1 < self._end:
            self._next = (step + 1, self._pool.submit(self._data.batch, step + 1, *self._which))
        return found

    def __enter__(self) -> _Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
