"""Contact sheets and clips on disk."""

import json
from pathlib import Path

import numpy as np
import pytest

from soundstage.world import caption, parse, render, stream_item
from soundstage.world.show import COLUMNS, MARGIN, SEEN, WIDTH, contact_sheet
from soundstage.world.write import write_clips

AMBER = tuple(int(SEEN[i : i + 2], 16) for i in (1, 3, 5))


def near(sheet: np.ndarray, colour: tuple[int, ...]) -> np.ndarray:
    return np.abs(sheet.astype(int) - colour).max(-1) < 40


def marks(sheet: np.ndarray, titled: bool = False) -> np.ndarray:
    """The row of pixels between square frames and waveform, where events are marked."""
    return sheet[MARGIN + 44 * titled + (WIDTH - 2 * MARGIN) // COLUMNS + 5]


def test_events_stand_at_their_times_on_the_sheet(tmp_path: Path) -> None:
    rendered = render(stream_item(5, 2, kinds=("bounce",))[0])
    sheet = contact_sheet(rendered.clip, tmp_path / "new" / "ball.png", title=caption(rendered.scene))
    assert sheet.shape[1:] == (WIDTH, 3)
    assert sheet.dtype == np.uint8
    assert (tmp_path / "new" / "ball.png").stat().st_size > 5000
    for event in rendered.events:
        x = MARGIN + (WIDTH - 2 * MARGIN) * event.t / rendered.clip.duration
        assert near(marks(sheet, titled=True), AMBER)[round(x) - 1 : round(x) + 2].all()
    assert near(marks(sheet, titled=True), AMBER).sum() < 12 * len(rendered.events)


def test_a_clip_may_lack_sound_or_picture_or_title() -> None:
    clip = render(stream_item(5, 0, kinds=("engine",))[0]).clip
    whole = contact_sheet(clip).shape[0]
    assert contact_sheet(clip.without("audio")).shape[0] < whole
    assert contact_sheet(clip.without("video")).shape[0] < whole
    assert contact_sheet(clip, title="a film of the sea").shape[0] > whole
    assert not near(marks(contact_sheet(clip)), AMBER).any()


def test_truth_can_be_marked() -> None:
    rendered = render(stream_item(5, 1, kinds=("drums",))[0])
    sheet = contact_sheet(rendered.clip, events=rendered.events)
    assert near(marks(sheet), AMBER).any()


def test_written_clips_have_truth_and_caption_beside_them(tmp_path: Path) -> None:
    pytest.importorskip("av")
    paths = list(write_clips(tmp_path, 2, seed=3, kinds=("bounce",), size=32, fps=8, num_frames=17))
    assert [p.name for p in paths] == ["00000-bounce.mp4", "00001-bounce.mp4"]
    scene, text = stream_item(3, 0, kinds=("bounce",))
    truth = json.loads(paths[0].with_suffix(".json").read_text())
    assert paths[0].with_suffix(".txt").read_text() == text + "\n"
    assert truth["scene"] == {"seed": scene.seed, **scene.fields}
    assert parse(truth["canonical"]) == scene.fields
    assert len(truth["events"]) == scene.count
    assert len(truth["tracks"]["body"]["x"]) == 17
    assert (tmp_path / "sheet.png").exists()
