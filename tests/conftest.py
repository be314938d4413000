"""Settings of every test: one thread, no network, and the folder of recorded reference outputs."""

import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden",
        type=Path,
        default=Path(__file__).parent / "data",
        help="folder of recorded reference outputs (NAME.json with NAME.safetensors) for tests/parity",
    )


def pytest_configure() -> None:
    import torch

    torch.set_num_threads(1)
