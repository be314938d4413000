"""From a folder of raw clips to shards and to training, by the recipes' flow."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from soundstage.cli.app import app
from soundstage.data.ledger import Ledger
from soundstage.data.records import ClipShape
from soundstage.data.sources import parse
from soundstage.recipes import curate
from soundstage.testing.tiny import tiny
from soundstage.training.engine import train
from soundstage.training.metrics import read
from soundstage.world import render, stream_item


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Four bouncing balls with captions, one of them twice, and a file that is cut off."""
    folder = tmp_path / "raw"
    folder.mkdir()
    for index in range(4):
        scene, caption = stream_item(11, index, kinds=("bounce",))
        film = render(scene).clip.save(folder / f"ball{index}.mp4")
        film.with_suffix(".txt").write_text(caption, encoding="utf-8")
    (folder / "again.mp4").write_bytes((folder / "ball0.mp4").read_bytes())
    (folder / "again.txt").write_text("another caption", encoding="utf-8")
    (folder / "cut.mp4").write_bytes((folder / "ball1.mp4").read_bytes()[:3000])
    return folder


def test_a_raw_folder_becomes_windows_and_every_file_is_accounted_for(raw: Path, tmp_path: Path) -> None:
    source = curate.Curated(str(raw), str(tmp_path / "set"), workers=1).build(ClipShape())
    assert source.size == 4
    captions = {source.item(index).caption for index in range(4)}
    wanted = {path.read_text(encoding="utf-8") for path in raw.glob("*.txt")}
    assert captions < wanted and len(captions) == 4
    with Ledger.open(tmp_path / "set") as ledger:
        funnel = {count.name: count for count in ledger.funnel(curate.small())}
        assert ledger.add(parse(str(raw))) == 0
    assert funnel["scan"].poisoned == 1
    assert dict(funnel["dedup"].dropped) == {"duplicate": 1}
    told = CliRunner().invoke(app, ["data", "funnel", str(tmp_path / "set"), "--json"])
    assert {line["name"]: line["passed"] for line in json.loads(told.stdout)} == {
        k: v.passed for k, v in funnel.items()
    }
    for count in funnel.values():
        assert count.entered == count.passed + sum(count.dropped.values()) + count.poisoned


@pytest.mark.slow
def test_one_command_from_raw_clips_to_training_steps(raw: Path, tmp_path: Path) -> None:
    recipe = curate.tiny(str(raw), str(tmp_path / "set"))
    data = replace(recipe.data, cache=str(tmp_path / "latents"), source=replace(recipe.data.source, workers=1))
    train(tiny(replace(recipe, data=data), tmp_path / "run"), tensorboard=False)
    assert [entry["step"] for entry in read(tmp_path / "run") if "loss" in entry] == [1, 2]
