"""The vocoder against recorded outputs, loaded folded as recorded and weight-normalised as published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from soundstage.models.codecs.bigvgan import BIGVGAN_KEYS, GAIN, RAW, BigVGAN, BigVGANConfig, Lowpass
from soundstage.models.weights import load_weights

STEM = "bigvgan"


def built(vector: Any) -> BigVGAN:  # noqa: ANN401
    """On the meta device, of the widths in the json, which are also those inferred from names and shapes."""
    told = vector.info["config"]
    assert told["resblock"] == "1" and told["activation"] == "snakebeta" and told["snake_logscale"]
    dilations = {tuple(each) for each in told["resblock_dilation_sizes"]}
    config = BigVGANConfig(
        told["num_mels"],
        told["upsample_initial_channel"],
        tuple(told["upsample_rates"]),
        tuple(told["upsample_kernel_sizes"]),
        tuple(told["resblock_kernel_sizes"]),
        *dilations,
    )
    for written in (state(vector), split(state(vector))):
        assert BigVGANConfig.of({name: tuple(x.shape) for name, x in written.items()}) == config
    with torch.device("meta"):
        return config.build()


def state(vector: Any) -> dict[str, Tensor]:  # noqa: ANN401
    return {name.removeprefix("sd."): x for name, x in vector.tensors.items() if name.startswith("sd.")}


def split(folded: dict[str, Tensor]) -> dict[str, Tensor]:
    """As published: a gain per row, and rows of any norm (here another one than they had)."""
    out = {}
    for name, x in folded.items():
        if name.endswith(".weight"):
            stem = name.removesuffix(".weight")
            out[stem + GAIN] = x.flatten(1).norm(dim=1).view(-1, *[1] * (x.ndim - 1))
            out[stem + RAW] = x * torch.linspace(0.3, 3.0, len(x)).view(-1, *[1] * (x.ndim - 1))
        else:
            out[name] = x
    return out


@torch.no_grad()
@pytest.mark.parametrize("published", [False, True], ids=["folded", "weight-normalised"])
def test_vocoder(vector: Any, published: bool, tmp_path: Path) -> None:  # noqa: ANN401
    path = tmp_path / "best_netG.pt"
    tensors = split(state(vector)) if published else state(vector)
    torch.save({"generator": tensors}, path)
    vocoder = built(vector)
    report = load_weights(vocoder, path, BIGVGAN_KEYS, inside="generator")
    assert report.loaded == len(state(vector))
    mine = vocoder(vector.tensors["in.mel"])
    torch.testing.assert_close(mine, vector.tensors["out.audio"], **vector.tolerance)
    pieces = torch.cat(list(vocoder.stream(vector.tensors["in.mel"], 2)), dim=2)
    torch.testing.assert_close(pieces, vector.tensors["out.audio"], **vector.tolerance)


def test_filters(vector: Any) -> None:  # noqa: ANN401
    mine = Lowpass().filter
    recorded = [x for name, x in state(vector).items() if name.endswith(".filter")]
    assert recorded
    for x in recorded:
        torch.testing.assert_close(mine, x, rtol=1e-5, atol=1e-7)
