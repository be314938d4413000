"""The codecs trained here and the linear one: causality, inverses, statistics."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest
import torch

from soundstage.core.av import AV
from soundstage.core.denoiser import StreamGeometry
from soundstage.core.errors import ShapeError
from soundstage.media.waves import mel_spectrogram
from soundstage.models.codecs.audio import CENTRE, HALF_RANGE, AudioCodec, AudioCodecConfig
from soundstage.models.codecs.pair import PairCodec, fit_statistics
from soundstage.models.codecs.pca import PCACodec
from soundstage.models.codecs.video import VideoCodec, VideoCodecConfig, _fold, _unfold


@pytest.fixture(scope="module")
def video() -> VideoCodec:
    torch.manual_seed(0)
    built = VideoCodecConfig(channels=4, detail=8, encoder_width=16, decoder_width=16).build().eval()
    for parameter in built.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    return built


@pytest.fixture(scope="module")
def audio() -> AudioCodec:
    torch.manual_seed(0)
    return AudioCodecConfig(channels=4, encoder_width=16, decoder_width=16, vocoder_width=16).build().eval()


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def test_folding_is_undone() -> None:
    x = torch.randn(2, 3, 8, 16, 32)
    assert torch.equal(_unfold(_fold(x, 4, 8).movedim(-1, 1).movedim(1, -1), 4, 8), x)


def test_video_latents_do_not_see_the_future(video: VideoCodec) -> None:
    frames = torch.rand(1, 3, 13, 32, 32) * 2 - 1
    later = frames.clone()
    later[:, :, 5:] = 0.0
    a, b = video.encode(frames), video.encode(later)
    assert a.shape == (1, 4, 4, 2, 2)
    assert torch.allclose(a[:, :, :2], b[:, :, :2], atol=1e-6)
    assert float((a[:, :, 2:] - b[:, :, 2:]).abs().max()) > 1e-3
    assert torch.allclose(video.encode(frames[:, :, :5]), a[:, :, :2], atol=1e-5)


def test_one_image_is_the_first_latent(video: VideoCodec) -> None:
    frames = torch.rand(1, 3, 9, 32, 32) * 2 - 1
    assert torch.allclose(video.encode(frames[:, :, :1]), video.encode(frames)[:, :, :1], atol=1e-5)
    assert video.decode(video.encode(frames)).shape == frames.shape


def test_a_frame_count_off_the_grid_is_refused(video: VideoCodec) -> None:
    with pytest.raises(ShapeError, match="1 \\+ 4k"):
        video.encode(torch.zeros(1, 3, 12, 32, 32))


def test_mel_is_the_one_of_media(audio: AudioCodec) -> None:
    wave = np.random.default_rng(0).uniform(-0.5, 0.5, (1, 8192)).astype(np.float32)
    mine = audio.mel(torch.from_numpy(wave)[None])[0] * HALF_RANGE + CENTRE
    assert np.abs(mine.numpy() - np.squeeze(mel_spectrogram(wave))).max() < 1e-4


def test_sound_comes_back_in_whole_steps(audio: AudioCodec) -> None:
    latents = audio.encode(torch.rand(2, 1, 33000) - 0.5)
    assert latents.shape == (2, 4, 33)
    assert audio.decode(latents).shape == (2, 1, 33 * 1024)
    assert audio.config.geometry.steps(33000) == 33


def test_statistics_give_unit_variance(audio: AudioCodec) -> None:
    media = [torch.rand(4, 1, 8192) - 0.5 for _ in range(3)]
    fit_statistics(audio, media)
    latents = torch.cat([audio.encode(batch) for batch in media]).transpose(0, 1).flatten(1)
    assert latents.mean(1).abs().max() < 1e-4
    assert (latents.std(1) - 1).abs().max() < 1e-3


def test_a_pair_serves_what_it_is_given(video: VideoCodec, audio: AudioCodec) -> None:
    codec = PairCodec(AV(video=video, audio=audio))
    latents = codec.encode(AV(video=torch.zeros(1, 3, 5, 32, 32)))
    assert latents.modalities == ("video",)
    assert codec.geometry["video"].steps(5) == latents["video"].shape[2] == 2


def test_linear_codec_is_exact_with_all_components_and_best_with_few() -> None:
    torch.manual_seed(0)
    geometry = AV(
        video=StreamGeometry(Fraction(16), 2, channels=24, spatial_stride=2, causal_first=True),
        audio=StreamGeometry(Fraction(8000), 8, channels=2),
    )
    line = torch.linspace(0, 20, 64)
    media = AV(video=torch.rand(8, 3, 5, 4, 4) * 2 - 1, audio=torch.sin(line + torch.rand(8, 1, 1) * 6) * 0.5)
    codec = PCACodec(geometry).fit([media])
    latents = codec.encode(media)
    assert latents["video"].shape == (8, 24, 3, 2, 2)
    assert latents["audio"].std().item() == pytest.approx(1.0, abs=0.02)
    back = codec.decode(latents)
    assert (back["video"] - media["video"]).abs().max() < 1e-4
    # a sinusoid of one frequency lives in two dimensions
    assert (back["audio"] - media["audio"]).abs().max() < 1e-4
