"""MMAudio's mel spectrogram and mel autoencoder against recorded outputs, loaded as the published file is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from soundstage.media.waves import MelConfig, hann, mel_basis
from soundstage.models.codecs.bigvgan import BIGVGAN_16K
from soundstage.models.codecs.mmaudio import MMAUDIO_VAE_KEYS, MMAudio, MMAudioConfig, normalise
from soundstage.models.weights import load_weights

STEM = "mmaudio_vae"


@pytest.fixture
def codec(vector: Any, tmp_path: Path) -> MMAudio:  # noqa: ANN401
    """The recorded autoencoder beside a vocoder of two channels, which the recording does not use."""
    told, mel = vector.info["config"], vector.info["mel"]
    state = {name.removeprefix("sd."): x for name, x in vector.tensors.items() if name.startswith("sd.")}
    mine = MelConfig(mel["sampling_rate"], mel["n_fft"], mel["hop"], mel["num_mels"], mel["fmin"], mel["fmax"])
    vocoder = replace(BIGVGAN_16K, bands=mel["num_mels"], width=64)
    config = MMAudioConfig(
        told["embed_dim"],
        told["hidden_dim"],
        tuple(told["ch_mult"]),
        told["num_res_blocks"],
        replace(mine, pad=mel["reflect_pad"]),
        vocoder,
    )
    with torch.device("meta"):
        vocoder_shapes = {name: tuple(x.shape) for name, x in vocoder.build().state_dict().items()}
    assert MMAudioConfig.of({name: tuple(x.shape) for name, x in state.items()}, vocoder_shapes) == config
    assert told["down_layers"] == [0]
    with torch.device("meta"):
        built = config.build()
    save_file(state, tmp_path / "vae.safetensors")
    load_weights(built.vae, tmp_path / "vae.safetensors", MMAUDIO_VAE_KEYS)
    return built


def test_mel(vector: Any, codec: MMAudio) -> None:  # noqa: ANN401
    mine = codec.mel(vector.tensors["in.waveform"][:, None])
    torch.testing.assert_close(mine, vector.tensors["out.mel"], **vector.info["tolerance"]["mel"])
    for made, name in ((mel_basis(codec.config.mel), "basis"), (hann(codec.config.mel.n_fft), "window")):
        torch.testing.assert_close(torch.from_numpy(made), vector.tensors[f"mel.{name}"], rtol=1e-5, atol=1e-7)


def test_normalised_weights(vector: Any, codec: MMAudio) -> None:  # noqa: ANN401
    loaded = codec.vae.state_dict()
    recorded = {name.removeprefix("sd_normalised."): x for name, x in vector.tensors.items() if "sd_norm" in name}
    assert recorded
    for name, x in recorded.items():
        torch.testing.assert_close(loaded[name], x, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(normalise(vector.tensors[f"sd.{name}"]), x, rtol=1e-6, atol=1e-7)
    for name in ("data_mean", "data_std", "encoder.learnable_gain", "decoder.learnable_gain"):
        assert torch.equal(loaded[name], vector.tensors[f"sd.{name}"]), name


@torch.no_grad()
def test_autoencoder(vector: Any, codec: MMAudio) -> None:  # noqa: ANN401
    def check(mine: Tensor, name: str) -> None:
        torch.testing.assert_close(mine, vector.tensors[name], **vector.info["tolerance"]["vae"])

    mean, log_variance = codec.vae.encode(vector.tensors["in.vae_mel"]).chunk(2, dim=1)
    check(mean, "out.latent_mean")
    check(log_variance.clamp(-30, 20), "out.latent_logvar")
    check(codec.vae.decode(vector.tensors["in.latent"]), "out.decoded_mel")
    check(codec.vae.decoder(vector.tensors["in.latent"]), "out.decoded_mel_not_unnormalised")
