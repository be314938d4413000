"""MMAudio's sound codec: lengths, mel, published names, pieces that equal the whole, one by one and in a batch."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from soundstage.core.av import AV
from soundstage.core.errors import ConfigError, ShapeError, WeightsError
from soundstage.media.waves import mel_spectrogram
from soundstage.models.codecs.bigvgan import BIGVGAN_16K, BIGVGAN_KEYS, GAIN, BigVGAN, BigVGANConfig
from soundstage.models.codecs.mmaudio import (
    MMAUDIO_16K,
    MMAUDIO_VAE_KEYS,
    MMAUDIO_VAE_OPTIONAL,
    MMAudio,
    MMAudioConfig,
)
from soundstage.models.codecs.pair import PairCodec
from soundstage.models.weights import KeyMap, check_weights, load_weights

PLAN = replace(BIGVGAN_16K, width=64)  # the published layers
TINY = MMAudioConfig(width=8, vocoder=replace(BIGVGAN_16K, width=8, rates=(16, 16), kernels=(32, 32)))
SHORT = BigVGANConfig(bands=4, width=8, rates=(4, 2), kernels=(8, 4), stacks=(3,), dilations=(1, 2))


@pytest.fixture(scope="module")
def codec() -> MMAudio:
    return lively(TINY.build())


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@torch.no_grad()
def lively(module: nn.Module) -> Any:  # noqa: ANN401
    """Random weights of a fixed seed, as wide as keeps signals alive through all layers and rounding errors small."""
    draw = torch.Generator().manual_seed(0)
    for name, x in module.named_parameters():
        fan_in = x[0].numel() if x.ndim == 3 else 16
        x.copy_(torch.randn(x.shape, generator=draw) * (0.5 if "resblocks" in name else 1.0) / fan_in**0.5)
        if name.endswith("learnable_gain"):
            x.fill_(0.3)
    return module.eval().requires_grad_(False)


def sound(samples: int, batch: int = 1) -> Tensor:
    time = torch.arange(samples) / 16000
    tones = torch.stack([0.5 * torch.sin(2 * torch.pi * 220 * (i + 1) * time) for i in range(batch)])
    return (tones + 0.05 * torch.randn(tones.shape, generator=torch.Generator().manual_seed(1)))[:, None]


@pytest.mark.parametrize("samples, steps", [(80_384, 157), (160_768, 314), (81_920, 160), (79_872, 156), (80_000, 157)])
def test_lengths(codec: MMAudio, samples: int, steps: int) -> None:
    """Ovi's 5 s and 10 s and MMAudio's 5.12 s; 80,000 samples are 156 steps and a quarter, which counts."""
    latents = codec.encode(sound(samples))
    assert latents.shape == (1, 20, steps) == (1, codec.config.channels, codec.config.geometry.steps(samples))
    assert codec.config.geometry.length(steps) == 512 * steps
    assert codec.config.geometry.seconds(2) == [0.016, 0.048]


def test_an_incomplete_step_is_filled_up_with_silence(codec: MMAudio) -> None:
    wave = sound(80_000)
    whole = torch.nn.functional.pad(wave, (0, 157 * 512 - 80_000))
    assert torch.equal(codec.encode(wave), codec.encode(whole))


@pytest.mark.parametrize("samples", [1, 100, 385, 511, 512, 513, 1100])
@pytest.mark.parametrize("level", [0.0, 1.0, 4.0], ids=["silence", "full scale", "clipped"])
def test_short_waves(codec: MMAudio, samples: int, level: float) -> None:
    wave = level * torch.sign(torch.sin(torch.arange(samples) * 0.7))[None, None]
    latents = codec.encode(wave)
    back = codec.decode(latents)
    assert latents.shape == (1, 20, -(-samples // 512)) and back.shape == (1, 1, 512 * latents.shape[2])
    assert latents.isfinite().all() and back.isfinite().all() and back.abs().max() <= 1


def test_mel_equals_the_mel_of_media(codec: MMAudio) -> None:
    wave = sound(16_000, batch=2) * 3
    assert codec.mel(wave).shape == (2, 80, 62)
    np.testing.assert_allclose(codec.mel(wave).numpy(), mel_spectrogram(wave[:, 0].numpy()), rtol=0, atol=2e-5)


def test_mel_is_float32_in_a_bfloat16_module_and_under_autocast(codec: MMAudio) -> None:
    half = TINY.build().to(torch.bfloat16)
    half.load_state_dict(codec.state_dict())
    wave = sound(8_192)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(half.mel(wave), codec.mel(wave))
    latents, exact = half.encode(wave), codec.encode(wave)
    assert latents.dtype == torch.float32
    assert (latents - exact).norm() < 0.05 * exact.norm()
    assert half.decode(exact).dtype == torch.float32


def test_latents_are_the_mean_without_scaling(codec: MMAudio) -> None:
    wave = sound(4_096)
    both = codec.vae.encoder((codec.mel(wave) - codec.vae.data_mean) / codec.vae.data_std)
    assert torch.equal(codec.encode(wave), both[:, :20])
    mel = codec.vae.decoder(both[:, :20]) * codec.vae.data_std + codec.vae.data_mean
    torch.testing.assert_close(codec.decode(both[:, :20]), codec.vocoder(mel), rtol=0, atol=1e-6)


def test_a_batch_equals_one_by_one(codec: MMAudio) -> None:
    waves = sound(6_000, batch=3)
    latents = codec.encode(waves)
    torch.testing.assert_close(latents, torch.cat([codec.encode(w[None]) for w in waves]), rtol=1e-5, atol=1e-5)
    decoded = codec.decode(latents)
    assert decoded.std() > 0.05
    torch.testing.assert_close(decoded, torch.cat([codec.decode(z[None]) for z in latents]), rtol=0, atol=1e-5)


def test_it_is_a_stream_of_a_pair_codec(codec: MMAudio) -> None:
    pair = PairCodec(AV(audio=codec))
    latents = pair.encode(AV(audio=sound(2_048)))
    assert pair.geometry["audio"].rate == 16000
    assert torch.equal(pair.decode(latents)["audio"], codec.decode(latents["audio"]))


def test_bad_shapes(codec: MMAudio) -> None:
    for wave in (torch.zeros(1, 2, 512), torch.zeros(1, 512), torch.zeros(1, 1, 0)):
        with pytest.raises(ShapeError, match="batch, 1, samples"):
            codec.encode(wave)
    for latents in (torch.zeros(1, 5, 20), torch.zeros(20, 5), torch.zeros(1, 20, 0)):
        with pytest.raises(ShapeError, match="batch, 20, steps"):
            codec.decode(latents)


# Pieces


@pytest.mark.parametrize("chunk", [7, 45, 100])
def test_pieces_equal_the_whole(codec: MMAudio, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    latents = torch.randn(2, 20, 90, generator=torch.Generator().manual_seed(2))
    monkeypatch.setattr(codec, "chunk", None)
    whole = codec.decode(latents)
    monkeypatch.setattr(codec, "chunk", chunk)
    pieces = list(codec.decode_stream(latents))
    assert [p.shape[2] for p in pieces[:-1]] == [512 * chunk] * (len(pieces) - 1)
    torch.testing.assert_close(torch.cat(pieces, dim=2), whole, rtol=0, atol=1e-5)
    assert whole.std() > 0.05


@pytest.mark.parametrize("frames", [1, 2, 3, 40])
def test_pieces_of_the_vocoder_equal_the_whole(frames: int) -> None:
    vocoder = lively(SHORT.build())
    mel = torch.randn(2, 4, 41, generator=torch.Generator().manual_seed(3))
    pieces = list(vocoder.stream(mel, frames))
    assert len(pieces) == -(-41 // frames)
    torch.testing.assert_close(torch.cat(pieces, dim=2), vocoder(mel), rtol=0, atol=1e-5)


@pytest.mark.parametrize("config", [SHORT, replace(SHORT, stacks=(5, 3), rates=(2, 2), kernels=(4, 4)), PLAN])
def test_the_halo_is_what_the_sound_of_a_frame_depends_on(config: BigVGANConfig) -> None:
    vocoder = lively(config.build()).double()
    middle = config.halo + 2
    mel = torch.randn(1, config.bands, 2 * middle + 1, dtype=torch.float64, requires_grad=True)
    with torch.enable_grad():
        vocoder(mel)[..., middle * config.hop : (middle + 1) * config.hop].sum().backward()
    assert mel.grad is not None
    seen = mel.grad.abs().sum((0, 1)).nonzero()[:, 0]
    assert (middle - seen.min(), seen.max() - middle) == (config.halo, config.halo)


def test_halo_of_the_published_vocoder() -> None:
    assert BIGVGAN_16K.halo == PLAN.halo == 38
    assert BIGVGAN_16K.hop == 256


def test_pieces_need_less_memory(codec: MMAudio, monkeypatch: pytest.MonkeyPatch) -> None:
    latents = torch.randn(1, 20, 300)
    peaks = []
    for chunk in (None, 30):
        monkeypatch.setattr(codec, "chunk", chunk)
        with Peak() as peak:
            for _ in codec.decode_stream(latents):
                pass
        peaks.append(peak.most)
    assert peaks[1] < peaks[0] / 4, peaks


class Peak(TorchDispatchMode):
    """The most bytes alive at once in tensors made within."""

    def __init__(self) -> None:
        super().__init__()
        self.alive, self.most = 0, 0
        self.known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        out = func(*args, **kwargs or {})
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage() not in self.known:
                storage = x.untyped_storage()
                self.known.add(storage)
                self.alive += storage.nbytes()
                weakref.finalize(storage, self.freed, storage.nbytes())
        self.most = max(self.most, self.alive)
        return out

    def freed(self, count: int) -> None:
        self.alive -= count


# Published files


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(x.shape) for name, x in module.state_dict().items()}


def full_size(name: str) -> dict[str, tuple[int, ...]]:
    path = Path(__file__).parents[1] / "data" / "ovi_full_size_keys.json"
    return {key: tuple(shape) for key, shape in json.loads(path.read_text(encoding="utf-8"))[name].items()}


def covered(module: nn.Module, published: Mapping[str, tuple[int, ...]], keys: KeyMap) -> None:
    """Every name of the file is used, and every tensor of the module gets its shape."""
    sources = keys(list(published))
    assert sorted(n for source in sources.values() for n in source.names) == sorted(published)
    made = {}
    for name, source in sources.items():
        parts = [torch.empty(published[n], device="meta") for n in source.names]
        made[name] = tuple((source.build(*parts) if source.build else parts[0]).shape)
    assert made == shapes(module)


def test_the_full_size_module_has_the_published_names() -> None:
    vae, vocoder = full_size("mmaudio_vae_16k"), full_size("bigvgan_16k")
    assert (len(vae), len(vocoder)) == (57, 784)
    assert MMAudioConfig.of(vae, vocoder) == MMAUDIO_16K
    with torch.device("meta"):
        built = MMAUDIO_16K.build()
    covered(built.vae, vae, MMAUDIO_VAE_KEYS)
    covered(built.vocoder, vocoder, BIGVGAN_KEYS)
    assert sum(p.numel() for p in built.vae.parameters()) == 171_657_218
    gains = sum(shape[0] for name, shape in vocoder.items() if name.endswith(GAIN))
    assert sum(p.numel() for p in built.vocoder.parameters()) == 112_231_250 - gains == 112_199_473


def test_published_files_load_into_a_module_without_memory(codec: MMAudio, tmp_path: Path) -> None:
    raw = {k: v * 3 if k.endswith("weight") else v for k, v in codec.vae.state_dict().items()}
    torch.save(raw, tmp_path / "v1-16.pth")
    torch.save({"generator": codec.vocoder.state_dict()}, tmp_path / "best_netG.pt")
    with torch.device("meta"):
        built = TINY.build()
    assert load_weights(built.vae, tmp_path / "v1-16.pth", MMAUDIO_VAE_KEYS).loaded == 57
    report = load_weights(built.vocoder, tmp_path / "best_netG.pt", BIGVGAN_KEYS, inside="generator")
    assert report.loaded == len(codec.vocoder.state_dict())
    rows = built.vae.decoder.conv_in.weight.flatten(1).norm(dim=1)
    torch.testing.assert_close(rows, torch.ones_like(rows), rtol=0, atol=0.01)
    assert torch.equal(built.vae.decoder.learnable_gain, codec.vae.decoder.learnable_gain)
    assert built.decode(built.encode(sound(3_000))).isfinite().all()
    assert not any(x.is_meta for x in built.state_dict().values())


def test_a_folder_of_diffusers_loads_as_it_is(codec: MMAudio, tmp_path: Path) -> None:
    saved = {f"vae.{name}": x for name, x in codec.vae.state_dict().items()}
    save_file({**saved, "mel_converter.hann_window": torch.ones(4)}, tmp_path / "model.safetensors")
    with torch.device("meta"):
        built = TINY.build()
    load_weights(built.vae, tmp_path, MMAUDIO_VAE_KEYS, optional=MMAUDIO_VAE_OPTIONAL)
    assert all(torch.equal(x, codec.vae.state_dict()[name]) for name, x in built.vae.state_dict().items())


def test_weights_of_another_model(codec: MMAudio, tmp_path: Path) -> None:
    vae, vocoder = shapes(codec.vae), shapes(codec.vocoder)
    assert MMAudioConfig.of({f"vae.{k}": v for k, v in vae.items()}, vocoder) == TINY
    with pytest.raises(WeightsError, match=r"mel autoencoder.*v1-16\.pth"):
        MMAudioConfig.of(vocoder, vocoder)
    with pytest.raises(WeightsError, match=r"BigVGAN.*best_netG\.pt"):
        MMAudioConfig.of(vae, vae)
    with pytest.raises(WeightsError, match="BigVGAN"):  # the second BigVGAN, which diffusers has
        MMAudioConfig.of(vae, {k: v for k, v in vocoder.items() if k != "conv_post.bias"})
    with pytest.raises(WeightsError, match="do not belong together"):
        MMAudioConfig.of(vae, {**vocoder, "conv_pre.weight": (64, 128, 7)})
    save_file({k: v for k, v in codec.vocoder.state_dict().items() if "ups.0" not in k}, tmp_path / "x.safetensors")
    report = check_weights(codec.vocoder, tmp_path / "x.safetensors", BIGVGAN_KEYS)
    assert report.missing == ("ups.0.0.weight", "ups.0.0.bias") and not report.unexpected


@pytest.mark.parametrize("multipliers, layers", [((1, 2), 1), ((1, 3, 4, 5), 3)])
def test_widths_and_depths_are_read_from_shapes(multipliers: tuple[int, ...], layers: int) -> None:
    config = replace(TINY, channels=7, width=12, multipliers=multipliers, layers=layers)
    with torch.device("meta"):
        built = config.build()
    assert MMAudioConfig.of(shapes(built.vae), shapes(built.vocoder)) == config


def test_settings_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match="512 samples"):
        MMAudioConfig(vocoder=replace(BIGVGAN_16K, rates=(8, 4, 2, 2, 2, 2)))
    with pytest.raises(ConfigError, match="one per stage"):
        replace(BIGVGAN_16K, rates=(4, 4))
    with pytest.raises(ConfigError, match="even"):
        replace(BIGVGAN_16K, kernels=(7, 8, 4, 4, 4, 4))
    with pytest.raises(ConfigError, match="two levels"):
        MMAudioConfig(multipliers=(1,))
    with pytest.raises(ShapeError, match="mel frames"):
        list(BigVGAN(SHORT).stream(torch.zeros(1, 4, 9), 0))
