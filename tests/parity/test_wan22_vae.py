"""The Wan2.2 video autoencoder against recorded outputs, loaded as the published file is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from soundstage.models.codecs.wan_vae import WAN_VAE_KEYS, WanVAE, WanVAEConfig
from soundstage.models.weights import load_weights

STEM = "wan22_vae"


@pytest.fixture
def codec(vector: Any, tmp_path: Path) -> WanVAE:  # noqa: ANN401
    told = vector.info["config"]
    state = {name.removeprefix("sd."): x for name, x in vector.tensors.items() if name.startswith("sd.")}
    config = WanVAEConfig(
        told["z_dim"],
        told["dim"],
        told["dec_dim"],
        tuple(vector.tensors["in.mean"].tolist()),
        tuple(vector.tensors["in.std"].tolist()),
        tuple(told["dim_mult"]),
        told["num_res_blocks"],
        tuple(told["temporal_downsample"]),
        told["patch"],
        residual=True,
        rate=24,
        size=(704, 1280),
    )
    found = WanVAEConfig.of({name: tuple(x.shape) for name, x in state.items()})
    assert (found.width, found.decoder_width) == (config.width, config.decoder_width)
    assert (found.multipliers, found.depth, found.temporal) == (config.multipliers, config.depth, config.temporal)
    assert (found.residual, found.geometry) == (True, config.geometry)
    torch.save(state, tmp_path / "vae.pth")
    with torch.device("meta"):
        built = config.build()
    load_weights(built, tmp_path / "vae.pth", WAN_VAE_KEYS)
    return built.requires_grad_(False)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("tile", [None, 1])
def test_encode(vector: Any, codec: WanVAE, tile: int | None, stream: bool) -> None:  # noqa: ANN401
    codec.tile, codec.stream = tile, stream
    video = vector.tensors["in.video"]
    for frames, name in (
        (video, "out.video_latent"),
        (vector.tensors["in.image"], "out.image_latent"),
        (video[:, :, :1], "out.first_frame_latent"),
    ):
        torch.testing.assert_close(codec.encode(frames), vector.tensors[name], **vector.tolerance)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("tile", [None, 1])
def test_decode(vector: Any, codec: WanVAE, tile: int | None, stream: bool) -> None:  # noqa: ANN401
    codec.tile, codec.stream = tile, stream
    latents = vector.tensors["in.latent"]
    for made, name in (
        (codec.decode(latents, clamp=False), "out.decoded_unclamped"),
        (codec.decode(latents), "out.decoded_wrapped"),
        (torch.cat(list(codec.decode_stream(latents)), dim=2), "out.decoded_wrapped"),
        (codec.decode(vector.tensors["in.image_latent"], clamp=False), "out.decoded_image_unclamped"),
    ):
        torch.testing.assert_close(made, vector.tensors[name], **vector.tolerance)
