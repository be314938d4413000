"""Recorded reference outputs: a test module names their `STEM`, and its tests run once for every file STEM_*.json."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor


@dataclass(frozen=True)
class Vector:
    """One recorded run: what its json says and its tensors."""

    info: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def tolerance(self) -> dict[str, float]:
        return {"rtol": 0.0, "atol": 0.0} | self.info["tolerance"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "vector" not in metafunc.fixturenames:
        return
    folder: Path = metafunc.config.getoption("golden")
    stem = metafunc.module.STEM
    paths = sorted(p for p in folder.glob(f"{stem}_*.json") if p.with_suffix(".safetensors").is_file())
    metafunc.parametrize("vector", paths, ids=[p.stem for p in paths], indirect=True)


@pytest.fixture
def vector(request: pytest.FixtureRequest) -> Vector:
    path: Path = request.param
    return Vector(json.loads(path.read_text(encoding="utf-8")), load_file(path.with_suffix(".safetensors")))
