"""A model folder: written, read, refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from soundstage.core.av import AV
from soundstage.core.conditions import Conditions
from soundstage.core.errors import WeightsError
from soundstage.core.system import Sampling, load_system
from soundstage.models.codecs.audio import AudioCodecConfig
from soundstage.models.codecs.pair import PairCodec
from soundstage.models.codecs.video import VideoCodecConfig
from soundstage.models.system import save_system
from soundstage.models.text.bytes import ByteTextConfig
from soundstage.models.unified_dit import UnifiedDiTConfig


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    codec = PairCodec(
        AV(
            video=VideoCodecConfig(channels=4, detail=8, encoder_width=16, decoder_width=16).build(),
            audio=AudioCodecConfig(channels=6, encoder_width=16, decoder_width=16, vocoder_width=16).build(),
        )
    )
    config = UnifiedDiTConfig(codec.geometry, 32, 1, 2, rank=8, text=ByteTextConfig(16, 1, 2), text_inner=16)
    sampling = Sampling("heun", 7, AV(2.0, 3.0), AV(4.0, 1.5))
    return save_system(tmp_path / "m", "small", config, config.build(), codec, sampling)


def test_round_trip(folder: Path) -> None:
    system = load_system(folder)
    assert system.name == "small"
    assert system.shape.as_dict() == {"video": (4, 9, 4, 4), "audio": (6, 33)}
    assert system.sampling.shift.as_dict() == {"video": 2.0, "audio": 3.0}
    assert (system.sampling.sampler, system.sampling.steps) == ("heun", 7)
    x = system.shape.map(lambda shape: torch.randn(1, *shape))
    again = load_system(folder)
    t = x.map(lambda z: torch.ones(len(z)))
    for a, b in zip(
        system.denoiser(x, t, Conditions()).values(), again.denoiser(x, t, Conditions()).values(), strict=True
    ):
        assert torch.equal(a, b)
    media = system.codec.decode(x)
    assert media["video"].shape == (1, 3, 33, 64, 64)


def test_a_tensor_that_does_not_fit_is_named(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(str(path))
    tensors["denoiser.extra"] = torch.zeros(1)
    save_file(tensors, str(path))
    with pytest.raises(WeightsError, match=r"denoiser\.extra"):
        load_system(folder)
