from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from soundstage.core.errors import ConfigError
from soundstage.data.folder import Folder
from soundstage.data.latents import Latents
from soundstage.data.records import ClipShape, to_media
from soundstage.media.clip import Clip
from soundstage.testing.records import MeanCodec, tokenize

SHAPE = ClipShape(fps=8, size=(16, 16), num_frames=8, sample_rate=16000)


def clip(seconds: float, size: tuple[int, int] = (32, 64), *, sound: bool = True) -> Clip:
    """Frames that brighten from black to white from left to right edge in time, and a tone that grows louder."""
    count = round(seconds * 8)
    frames = np.stack([np.full((*size, 3), 255 * i // max(1, count - 1), np.uint8) for i in range(count)])
    wave = (np.linspace(0, 0.8, round(seconds * 16000)) * np.sin(np.arange(round(seconds * 16000)) * 0.2))[None]
    return Clip(frames, Fraction(8), wave.astype(np.float32) if sound else None, 16000 if sound else None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "clips"
    (path / "more").mkdir(parents=True)
    clip(3.0).save(path / "a.mp4")
    (path / "a.txt").write_text("a grey field\nbrightens ")
    clip(1.0).save(path / "more" / "b.mp4")
    return path


def test_files_become_windows_with_captions(folder: Path) -> None:
    source = Folder(str(folder)).build(SHAPE)
    assert source.size == 4
    samples = [source.item(i) for i in range(4)]
    assert [sample.id for sample in samples] == ["a@0s", "a@1s", "a@2s", "b@0s"]
    assert [sample.caption for sample in samples] == ["a grey field brightens"] * 3 + [""]
    assert samples[0].media["video"].shape == (3, 8, 16, 16)
    assert samples[0].media["audio"].shape == (1, 16000)
    levels = [float(sample.media["video"].mean()) for sample in samples[:3]]
    expected = [np.mean([255 * i // 23 for i in range(s, s + 8)]) / 127.5 - 1 for s in (0, 8, 16)]
    assert levels == pytest.approx(expected, abs=0.05)
    loud = [float(sample.media["audio"].std()) for sample in samples[:3]]
    assert loud[0] < loud[1] < loud[2]


def test_windows_may_overlap(folder: Path) -> None:
    source = Folder(str(folder), hop=0.5).build(SHAPE)
    assert [source.item(i).id for i in range(6)] == ["a@0s", "a@0.5s", "a@1s", "a@1.5s", "a@2s", "b@0s"]


def test_a_changed_folder_has_another_key(folder: Path) -> None:
    before = Folder(str(folder)).build(SHAPE).key
    assert Folder(str(folder)).build(SHAPE).key == before
    (folder / "a.txt").write_text("other words")
    assert Folder(str(folder)).build(SHAPE).key != before


def test_what_cannot_be_used_is_left_out_with_a_warning(folder: Path) -> None:
    (folder / "broken.mp4").write_text("not a film")
    with pytest.warns(UserWarning, match=r"broken.mp4 is left out"):
        assert Folder(str(folder)).build(SHAPE).size == 4
    (folder / "broken.mp4").unlink()
    clip(2.0, sound=False).save(folder / "mute.mp4")
    with pytest.warns(UserWarning, match=r"mute.mp4 is left out: it has no audio"):
        assert Folder(str(folder)).build(SHAPE).size == 4
    assert Folder(str(folder), modalities=("video",)).build(SHAPE).size == 6
    with (
        pytest.warns(UserWarning, match=r"is shorter than 4 s"),
        pytest.raises(ConfigError, match=r"none of 3 files .* gives a clip of 4 s"),
    ):
        Folder(str(folder), modalities=("video",)).build(ClipShape(fps=8, num_frames=32))


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not a folder; give one that holds clips"):
        Folder(str(tmp_path / "nowhere")).build(SHAPE)


def test_a_folder_trains_like_any_source(folder: Path, tmp_path: Path) -> None:
    config = Latents(Folder(str(folder)), MeanCodec(), tokenize, SHAPE, cache=str(tmp_path / "cache"))
    batch = config.build().batch(0, 4)
    assert sorted(batch.ids) == ["a@0s", "a@1s", "a@2s", "b@0s"]
    assert batch.x0["video"].shape == (4, 3, 8, 2, 2)


def test_short_media_is_padded() -> None:
    media = to_media(clip(0.5), SHAPE)
    assert media["video"].shape[1] == 8
    assert float(media["video"][:, 7].mean()) == float(media["video"][:, 3].mean())
    assert not media["audio"][:, 8000:].any()
