"""The world's recipes cut down: train the codecs, train on their latents, resume, pack, generate."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from soundstage.core.errors import ConfigError
from soundstage.data.records import ClipShape
from soundstage.inference.generator import Generator
from soundstage.models.text.bytes import ByteTextConfig
from soundstage.models.unified_dit import UnifiedDiTConfig
from soundstage.recipes import world
from soundstage.testing.tiny import tiny
from soundstage.training.config import TrainConfig
from soundstage.training.engine import train
from soundstage.training.metrics import read
from soundstage.training.state import Validation

SMALL = UnifiedDiTConfig(width=32, depth=1, num_heads=2, rank=8, text=ByteTextConfig(16, 1, 2), text_inner=16)


@pytest.fixture(scope="module")
def codecs(tmp_path_factory: pytest.TempPathFactory) -> world.WorldCodec:
    """Both codecs after two steps."""
    root = tmp_path_factory.mktemp("codecs")
    for recipe in (world.video_codec, world.audio_codec):
        train(tiny(recipe(), root / recipe.__name__), tensorboard=False)
        assert all(math.isfinite(entry["loss"]) for entry in read(root / recipe.__name__))
    return world.WorldCodec(str(root / "video_codec"), str(root / "audio_codec"))


def _small(codecs: world.WorldCodec, out: Path, steps: int) -> TrainConfig:
    recipe = world.tiny()
    data = replace(recipe.data, codec=codecs, num=8, cache=str(out.parent / "latents"))
    return tiny(replace(recipe, model=SMALL, data=data), out, steps)


def test_tiny_trains_resumes_packs_and_generates(codecs: world.WorldCodec, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(_small(codecs, out, 2), tensorboard=False)
    state = train(_small(codecs, out, 4), tensorboard=False)
    assert state.step == 4
    assert [entry["step"] for entry in read(out) if "loss" in entry] == [1, 2, 3, 4]

    folder = world.pack(out, tmp_path / "model", _small(codecs, out, 4))
    made = Generator.load(folder).generate("a red ball bounces twice", steps=2)
    assert made.clip.frames is not None
    assert made.clip.wave is not None
    assert made.clip.frames.shape == (33, 64, 64, 3)
    assert made.clip.wave.shape == (1, 33000)
    packed = Generator.load(folder).system.codec
    latents = packed.encode(world.to_media(made.clip, ClipShape()).map(lambda x: x[None]))
    assert torch.isfinite(torch.cat([x.flatten() for x in latents.values()])).all()


def test_the_score_of_a_run_is_measured_and_its_clips_kept(codecs: world.WorldCodec, tmp_path: Path) -> None:
    config = _small(codecs, tmp_path / "run", 1)
    student = config.model.build().eval()
    folder = tmp_path / "samples"
    folder.mkdir()
    found = world.score(Validation(1, student, {}, config, torch.device("cpu"), folder))
    # an untrained model is scored all the same: nothing fits, and what cannot be measured is left out
    assert found["world/f1@45"] < 0.5
    assert all(math.isfinite(value) for value in found.values())
    assert len(list(folder.glob("*.mp4"))) == 24


def test_the_source_is_pure_and_keeps_to_its_kinds() -> None:
    source = world.World(seed=5, kinds=("drums",)).build(ClipShape())
    one, again, other = source.item(3), source.item(3), source.item(4)
    assert torch.equal(one.media["video"], again.media["video"])
    assert one.caption == again.caption
    assert not torch.equal(one.media["audio"], other.media["audio"])
    assert one.media["video"].shape == (3, 33, 64, 64)
    assert one.media["audio"].shape == (1, 33000)
    with pytest.raises(ConfigError, match="trumpet"):
        world.World(kinds=("trumpet",)).build(ClipShape())
