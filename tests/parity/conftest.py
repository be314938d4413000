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


@pytest.fixture
def wan(vector: Vector) -> Any:  # noqa: ANN401
    """The recorded tower of Wan or Ovi: its sizes are read from the tensors, and must be those that were recorded."""
    from soundstage.models.wan import WAN_KEYS, WanConfig

    state = {key.removeprefix("sd."): value for key, value in vector.tensors.items() if key.startswith("sd.")}
    said = vector.info["config"]
    config = WanConfig.of(
        {name: tuple(value.shape) for name, value in state.items()},
        num_heads=said["num_heads"],
        text_length=said["text_len"],
        eps=said["eps"],
        time_scale=said.get("temporal_rope_scaling_factor", 1.0),
    )
    recorded = {
        "in_dim": config.in_channels,
        "out_dim": config.out_channels,
        "dim": config.width,
        "ffn_dim": config.hidden,
        "num_layers": config.depth,
        "freq_dim": config.frequencies,
        "text_dim": config.text_width,
        "clip_dim": config.image_width,
    }
    assert {key: value for key, value in recorded.items() if key in said} == {k: said[k] for k in recorded if k in said}
    model = config.build()
    model.load_state_dict({ours: state[source.names[0]] for ours, source in WAN_KEYS(list(state)).items()})
    return model.eval()
