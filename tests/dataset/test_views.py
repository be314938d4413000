"""Standard views: size, rate and loudness as asked, the same bytes every run, the native file untouched."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from soundstage.core.errors import ConfigError
from soundstage.data.flow import Item
from soundstage.data.views import Views, bucket
from soundstage.media.decode import read
from soundstage.media.encode import write
from soundstage.media.probe import probe
from soundstage.media.waves import loudness
from soundstage.world.render import render, stream_item


@pytest.fixture
def item(tmp_path: Path) -> Item:
    scene, _ = stream_item(1, 0, kinds=["talker"])
    clip = render(scene, size=64, fps=30, num_frames=90).clip
    path = write(clip, tmp_path / "native.mp4")
    return Item({"media": path}, {"span": [0.5, 2.5]}, {"media": "abc"})


def test_a_view_is_as_asked(item: Item, tmp_path: Path) -> None:
    before = item.files["media"].read_bytes()
    stage = Views(sizes=((32, 48), (48, 48)), loudness=-26.0)
    (out,) = stage(item, tmp_path)
    info, clip = probe(out.files["view"]), read(out.files["view"])
    assert (info.video.height, info.video.width, info.video.fps) == (48, 48, 24)
    assert (info.audio.sample_rate, info.audio.channels) == (48_000, 2)
    assert clip.frames.shape[0] == 48
    assert loudness(clip.wave, 48_000) == pytest.approx(-26, abs=0.5)
    assert out.facts["view"] == {"height": 48, "width": 48, "fps": "24", "sample_rate": 48_000, "loudness": -26.0}
    assert (out.files["media"], out.digests) == (item.files["media"], {"media": "abc"})
    assert item.files["media"].read_bytes() == before


def test_the_bytes_are_the_same_every_run(item: Item, tmp_path: Path) -> None:
    found = set()
    for run in range(3):
        (tmp_path / str(run)).mkdir()
        (out,) = Views(sizes=((64, 64),), preset="ultrafast")(item, tmp_path / str(run))
        found.add(out.files["view"].read_bytes())
    assert len(found) == 1


def test_the_bucket_is_the_nearest_in_proportions() -> None:
    assert bucket((1080, 1920)) == (480, 832)
    assert bucket((1920, 1080)) == (832, 480)
    assert bucket((500, 500)) == (640, 640)
    assert bucket((480, 640)) == (544, 720)
    assert bucket((100, 100), ((32, 32), (64, 64), (128, 128))) == (64, 64)


def test_what_is_cut_off_is_the_edge(tmp_path: Path) -> None:
    scene, _ = stream_item(1, 1, kinds=["bounce"])
    clip = render(scene, size=64, fps=24, num_frames=24).clip
    wide = np.pad(clip.frames, ((0, 0), (0, 0), (32, 32), (0, 0)))
    path = write(type(clip)(wide, clip.fps), tmp_path / "wide.mp4")
    view = Views(sizes=((64, 64),)).view(path)
    assert np.abs(view.frames.astype(int) - clip.frames).mean() < 4
    with pytest.raises(ConfigError, match="even"):
        Views(sizes=((63, 64),))
