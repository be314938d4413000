from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from soundstage.objectives.flow_matching import FlowMatching
from soundstage.testing.tiny import GaussianLatents, ToyConfig
from soundstage.training.config import Optim, TrainConfig

Make = Callable[..., TrainConfig]


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
