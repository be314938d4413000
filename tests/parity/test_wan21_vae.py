"""The Wan2.1 video autoencoder against recorded outputs, loaded as the published file is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from soundstage.models.codecs.wan_vae import WAN21_VAE, WAN_VAE_KEYS, WanVAE, WanVAEConfig
from soundstage.models.weights import load_weights

STEM = "wan21_vae"


@pytest.fixture
def codec(vector: Any, tmp_path: Path) -> WanVAE:  # noqa: ANN401
    told = vector.info["config"]
    state = {name.removeprefix("sd."): x for name, x in vector.tensors.items() if name.startswith("sd.")}
    assert told["attn_scales"] == []
    config = WanVAEConfig(
        told["z_dim"],
        told["dim"],
        told["dim"],
        tuple(vector.tensors["in.mean"].tolist()),
        tuple(vector.tensors["in.std"].tolist()),
        tuple(told["dim_mult"]),
        told["num_res_blocks"],
        tuple(told["temperal_downsample"]),
    )
    found = WanVAEConfig.of({name: tuple(x.shape) for name, x in state.items()})
    assert (found.width, found.multipliers, found.depth) == (config.width, config.multipliers, config.depth)
    assert (found.temporal, found.residual, found.geometry) == (config.temporal, False, config.geometry)
    torch.save(state, tmp_path / "vae.pth")
    with torch.device("meta"):
        built = config.build()
    load_weights(built, tmp_path / "vae.pth", WAN_VAE_KEYS)
    return built.requires_grad_(False)


def test_statistics(vector: Any) -> None:  # noqa: ANN401
    if vector.info["config"]["z_dim"] == WAN21_VAE.channels:
        assert WAN21_VAE.mean == pytest.approx(vector.tensors["in.mean"].tolist(), abs=1e-6)
        assert WAN21_VAE.std == pytest.approx(vector.tensors["in.std"].tolist(), abs=1e-6)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("tile", [None, 2])
def test_encode(vector: Any, codec: WanVAE, tile: int | None, stream: bool) -> None:  # noqa: ANN401
    codec.tile, codec.stream = tile, stream

    def check(frames: Tensor, name: str) -> Tensor:
        made = codec.encode(frames[None])
        torch.testing.assert_close(made[0], vector.tensors[name], **vector.tolerance)
        return made[0]

    clip = check(vector.tensors["in.video"], "out.latent")
    check(vector.tensors["in.image"], "out.image_latent")
    check(vector.tensors["in.video"][:, :1], "out.first_frame_latent")
    mean, std = (vector.tensors[name].view(-1, 1, 1, 1) for name in ("in.mean", "in.std"))
    torch.testing.assert_close(clip * std + mean, vector.tensors["out.latent_not_normalised"], **vector.tolerance)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("tile", [None, 2])
def test_decode(vector: Any, codec: WanVAE, tile: int | None, stream: bool) -> None:  # noqa: ANN401
    codec.tile, codec.stream = tile, stream
    latents = vector.tensors["in.latent"][None]
    for made, name in (
        (codec.decode(latents, clamp=False), "out.decoded_unclamped"),
        (codec.decode(latents), "out.decoded"),
        (torch.cat(list(codec.decode_stream(latents)), dim=2), "out.decoded"),
        (codec.decode(vector.tensors["in.image_latent"][None]), "out.decoded_image"),
    ):
        torch.testing.assert_close(made[0], vector.tensors[name], **vector.tolerance)
