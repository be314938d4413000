"""The suite on real clips: the floor is at the top, shuffled sound at chance, silence at zero, and it resumes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from soundstage.core.errors import RequestError
from soundstage.evaluation.metric import Figure
from soundstage.evaluation.oracle import Oracle
from soundstage.evaluation.report import build, required
from soundstage.evaluation.suite import Format, folder_items, read_records, run, stream_items
from soundstage.evaluation.tables import markdown, write
from soundstage.inference.generator import Generated
from soundstage.media.clip import Clip
from soundstage.world import is_held_out, render

EVENTS = ("bounce", "metronome", "drums")


@dataclass
class Delayed:
    """A generator that renders the truth of the prompts with the sound `late` seconds late."""

    items: Sequence[Any]
    late: float = 0.03
    calls: list[str] = field(default_factory=list)

    def generate(
        self,
        prompts: Sequence[str],
        *,
        seed: Sequence[int],
        task: str,
        audio: Sequence[Clip] | None = None,
        video: Sequence[Clip] | None = None,
    ) -> list[Generated]:
        assert len(seed) == len(prompts)
        self.calls.append(task)
        scenes = {item.caption: item.scene for item in self.items}
        made = []
        for index, prompt in enumerate(prompts):
            clip = render(scenes[prompt]).clip
            shift = round(self.late * clip.sample_rate)
            clip = replace(clip, wave=np.pad(clip.wave, ((0, 0), (shift, 0)))[:, : clip.wave.shape[1]])
            if audio is not None:
                assert audio[index].frames is None
                clip = replace(clip, wave=audio[index].wave)
            if video is not None:
                assert video[index].wave is None
            made.append(Generated(clip, prompt, seed[index], task, None, {}))
        return made


def test_the_stream_is_nested_balanced_and_apart() -> None:
    few, many = stream_items(6, kinds=EVENTS), stream_items(12, kinds=EVENTS)
    assert [(a.id, a.scene) for a in few] == [(a.id, a.scene) for a in many[:6]]
    assert [item.kind for item in few] == [*EVENTS, *EVENTS]
    other = stream_items(6, seed=1, kinds=EVENTS)
    assert {a.scene for a in many}.isdisjoint(b.scene for b in other)
    held = stream_items(8, holdout=True)
    assert all(is_held_out(item.scene) for item in held)
    assert not any(is_held_out(item.scene) for item in stream_items(40))
    with pytest.raises(RequestError, match="'bounces' is not one of bounce"):
        stream_items(3, kinds=("bounces",))


def test_real_clips_reach_the_top_and_shuffled_ones_chance(tmp_path: Path) -> None:
    report = build(run(stream_items(24, kinds=EVENTS), tmp_path), {})
    real, mixed = report.get("real clips", "f1@45", "events"), report.get("real clips, shuffled sound", "f1@45", "all")
    assert real.value >= 0.95
    assert report.get("real clips", "abs_offset_ms").value < 5
    chance = report.get("real clips, shuffled sound", "chance_f1@45")
    assert mixed.low <= chance.value + 0.1
    assert mixed.value < chance.value + 0.15
    assert report.get("real clips, no sound", "recall@45").value == 0
    assert report.get("real clips, no sound", "f1@45").value == 0


def test_a_late_sound_is_seen_in_the_scores(tmp_path: Path) -> None:
    items, held = stream_items(9, kinds=EVENTS), stream_items(3, kinds=EVENTS, holdout=True)
    report = build(run(items, tmp_path, generator=Delayed([*items, *held]), held_out=held), {})
    assert next(iter(report.rows)) == "model"
    assert set(report.rows) == {
        "model",
        "model, shuffled sound",
        "model, no sound",
        "model, a2v",
        "model, v2a",
        "model, held-out cells",
        "real clips",
        "real clips, shuffled sound",
    }
    assert report.get("model", "offset_ms").value == pytest.approx(30, abs=3)
    assert report.get("model", "f1@20").value < 0.2
    assert report.get("model", "f1@45").value > 0.9
    assert abs(report.get("model, a2v", "offset_ms").value) < 5
    assert report.get("model", "offset_ms").floor == report.get("real clips", "offset_ms").value
    assert report.get("model, held-out cells", "f1@45").num == 3
    checks = {(row, key): reached for row, key, _, _, reached in required(report)}
    assert set(checks) >= {("model", key) for key in ("f1@45", "abs_offset_ms", "pitch_semitones", "colour", "kind")}
    assert checks["model", "f1@45"]
    assert not checks["model", "abs_offset_ms"]


def test_a_blank_clip_scores_nothing() -> None:
    """Nothing seen and nothing heard is no sync."""
    blank = Clip(
        frames=np.full((33, 64, 64, 3), 30, np.uint8),
        fps=Fraction(16),
        wave=np.zeros((1, 33000), np.float32),
        sample_rate=16000,
    )
    for item in stream_items(4, kinds=(*EVENTS, "typing")):
        scores = Oracle()(blank, item.wanted)
        assert scores["f1@45"] == scores["recall@45"] == scores["precision@45"] == 0
        assert Oracle()(Format().render(item), item.wanted)["f1@45"] > 0.9


def test_a_stopped_run_goes_on(tmp_path: Path) -> None:
    items = stream_items(6, kinds=EVENTS)
    whole = run(items, tmp_path / "whole")
    stopped = tmp_path / "stopped"
    run(items, stopped)
    path = stopped / "scores.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join(lines[:7]) + '\n{"row": "real cl', encoding="utf-8")
    assert len(read_records(path)) == 7
    again = run(items, stopped)
    key = lambda record: (record["row"], record["id"])  # noqa: E731
    assert sorted(again, key=key) == sorted(whole, key=key)
    seen: list[str] = []

    class Counting:
        figures: tuple[Figure, ...] = ()

        def __call__(self, clip: Clip, wanted: str | Mapping[str, object]) -> Mapping[str, float]:
            seen.append(f"{clip.duration} {wanted}")
            return {}

    run(items, stopped, metric=Counting())
    assert not seen


def test_a_folder_of_clips(tmp_path: Path) -> None:
    folder = tmp_path / "clips"
    folder.mkdir()
    for item in stream_items(3, kinds=EVENTS):
        Format().render(item).save(folder / f"{item.id}.mp4")
        (folder / f"{item.id}.txt").write_text(item.caption + "\n", encoding="utf-8")
    report = build(run(folder_items(folder, None), tmp_path / "out"), {})
    assert report.get("clips", "f1@45").value >= 0.9
    assert report.get("clips", "f1@45").num == 3
    assert "clips, no sound" in report.rows
    assert len(folder_items(folder, None, kinds=("drums",))) == 1
    (folder / "00000.txt").write_text("a cat", encoding="utf-8")
    with pytest.raises(RequestError, match="'a cat' names no kind"):
        folder_items(folder, None)
    (folder / "00000.txt").unlink()
    with pytest.raises(RequestError, match=r"has no caption; write one into 00000\.txt"):
        folder_items(folder, None)
    with pytest.raises(RequestError, match="is not a folder"):
        folder_items(tmp_path / "none", None)
    with pytest.raises(RequestError, match="holds no mp4"):
        folder_items(tmp_path, None)


def test_the_report_is_written_with_intervals(tmp_path: Path) -> None:
    report = build(run(stream_items(12, kinds=EVENTS), tmp_path), {"command": "soundstage evaluate", "num": 12})
    as_json, as_markdown = write(report, tmp_path)
    told = json.loads(as_json.read_text(encoding="utf-8"))
    score = told["rows"]["real clips"]["events"]["f1@45"]
    assert score["low"] <= score["value"] <= score["high"]
    assert score["n"] == 12
    text = as_markdown.read_text(encoding="utf-8")
    assert text == markdown(report)
    assert "- command: soundstage evaluate" in text
    assert "| real clips, no sound |" in text
