from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import torch

from soundstage.core.parallel import leave
from soundstage.objectives.flow_matching import FlowMatching
from soundstage.testing.tiny import GaussianLatents, ToyConfig
from soundstage.training.config import Optim, TrainConfig

Make = Callable[..., TrainConfig]
Together = Callable[[int, Callable[[int], Any]], list[Any]]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A toy run of 6 steps; settings by keyword."""

    def config(**changes: Any) -> TrainConfig:  # noqa: ANN401
        settings: dict[str, Any] = {
            "name": "toy",
            "model": ToyConfig(),
            "objective": FlowMatching(),
            "data": GaussianLatents(mean=1.0, std=0.5),
            "steps": 6,
            "batch_size": 8,
            "optim": Optim(lr=1e-2, warmup=2, schedule="cosine"),
            "log_every": 1,
            "save_every": 2,
            "out": str(tmp_path / "run"),
        }
        return TrainConfig(**{**settings, **changes})

    return config


@pytest.fixture
def together(tmp_path_factory: pytest.TempPathFactory) -> Together:
    """What work(rank) gives on each of so many processes; None of one that is killed. An error is given, not raised.

    They are forked from a process that has only imported: a fork of this one would inherit the threads of every library
    that an earlier test woke.
    """

    def run(count: int, work: Callable[[int], Any]) -> list[Any]:
        folder = tmp_path_factory.mktemp("processes")
        context = torch.multiprocessing.get_context("forkserver")
        heavy = ("pytest", "torch.", "soundstage.")
        context.set_forkserver_preload([name for name in sys.modules if name.startswith(heavy)])
        given = [(rank, count, ByValue(work), folder) for rank in range(count)]
        started = [context.Process(target=ByValue(_process), args=each) for each in given]
        for process in started:
            process.start()
        for process in started:
            process.join(300)
            assert process.exitcode is not None, "a process hangs"
        files = [folder / f"{rank}.pt" for rank in range(count)]
        return [torch.load(file, weights_only=False) if file.exists() else None for file in files]

    return run


class ByValue:
    """What goes whole to a process that cannot import the tests: their functions and classes travel with it."""

    def __init__(self, given: Any) -> None:  # noqa: ANN401
        self.given = given

    def __reduce__(self) -> tuple[Any, ...]:
        cloudpickle.register_pickle_by_value(sys.modules["tests"])
        return cloudpickle.loads, (cloudpickle.dumps(self.given),)

    def __call__(self, *given: Any) -> Any:  # noqa: ANN401
        return self.given(*given)


def _process(rank: int, count: int, work: Callable[[int], Any], folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=count)
    try:
        found = work(rank)
    except Exception as error:
        found = error
    torch.save(found, folder / f"{rank}.pt", pickle_module=cloudpickle)
    leave()
