"""`benchmarks/ovi_dmd.py` at its smallest: real steps of the recipe, and figures that hold together."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    """The benchmark as a module."""
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("ovi_dmd")
    sys.path.remove(str(FOLDER))


@pytest.mark.slow
def test_steps_are_timed_and_their_work_is_counted(bench: Any) -> None:  # noqa: ANN401
    preset = bench.presets(128, 1, 128)["tiny"]
    row = bench.measured(preset, 1, 6, torch.device("cpu"))
    assert 0 < row["seconds_critic"] < row["seconds_student"]
    # a step of the critic: a rollout of 2.5 calls on average, and 4 for a call that learns
    call = bench.Stack(preset, 1).describe()["flops"]
    assert 6 * call < row["flops"] < 16 * call
    assert bench.shown({"rows": [row | {"tflops": 1.0, "peak_tflops": 4.0}]}).count("25 %") == 1
