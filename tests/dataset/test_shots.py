"""Takes by the traces: spans, trimming, lengths; nothing is decoded again."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from soundstage.core.errors import ConfigError
from soundstage.data.flow import Drop, Item
from soundstage.data.scan import Scan
from soundstage.data.shots import Shots
from soundstage.media.clip import Clip
from soundstage.media.encode import write

FPS = 24


@pytest.fixture
def film(tmp_path: Path) -> Item:
    """Takes of 2, 1 and 3 seconds, scanned."""
    rng = np.random.default_rng(0)
    takes = []
    for seconds in (2, 1, 3):
        wide = np.clip(rng.normal(size=(8, 40, 3)) * 40 + rng.uniform(60, 190, 3), 0, 255)
        wide = wide.repeat(12, axis=0).repeat(12, axis=1).astype(np.uint8)
        takes.append(np.stack([wide[:, n : n + 128] for n in range(seconds * FPS)]))
    wave = rng.normal(0, 0.1, (1, 6 * 16_000)).astype(np.float32)
    path = write(Clip(np.concatenate(takes), Fraction(FPS), wave, 16_000), tmp_path / "film.mp4")
    (item,) = Scan()(Item({"media": path}, digests={"media": "abc"}), tmp_path)
    item.files["media"].unlink()  # what follows must do without it
    return item


def test_children_have_spans_and_numbers_of_their_own(film: Item, tmp_path: Path) -> None:
    first, second, third = Shots(shortest=1.5, trim=0.25)(film, tmp_path)
    assert isinstance(second, Drop)
    assert (second.reason, second.score) == ("short take", pytest.approx(0.5, abs=0.01))
    assert first.facts["span"] == pytest.approx([0, 1.75], abs=1e-3)
    assert third.facts["span"] == pytest.approx([3.25, 6], abs=1e-3)
    assert first.facts["parent"] == third.facts["parent"] == "abc"
    assert first.files == film.files
    assert (film.facts["scan"]["cuts"], first.facts["scan"]["cuts"], third.facts["scan"]["cuts"]) == (2, 0, 0)
    assert third.facts["scan"]["seconds"] == pytest.approx(2.75, abs=1e-3)
    assert len(third.facts["hash"]["picture"]) == 16 * 11


def test_long_takes_become_equal_parts(film: Item, tmp_path: Path) -> None:
    spans = [child.facts["span"] for child in Shots(shortest=0.2, longest=0.8, trim=0)(film, tmp_path)]
    assert len(spans) == 3 + 2 + 4
    assert spans[0] == pytest.approx([0, 2 / 3], abs=1e-3)
    assert all(end - start <= 0.8 + 1e-6 for start, end in spans)


def test_a_higher_threshold_finds_fewer(film: Item, tmp_path: Path) -> None:
    assert len(list(Shots(threshold=0.99)(film, tmp_path))) == 1


def test_lengths_are_checked() -> None:
    with pytest.raises(ConfigError, match="shortest"):
        Shots(shortest=5, longest=3)
