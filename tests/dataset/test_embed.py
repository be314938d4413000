"""Embeddings: like clips lie nearer than unlike ones, and models of transformers plug in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from soundstage.core.errors import ConfigError
from soundstage.data.embed import Embed, describe_picture, describe_sound
from soundstage.data.flow import Item
from soundstage.media.encode import write
from soundstage.media.frames import resize
from soundstage.world.render import Rendered, render, stream_item


def clip(kind: str, index: int) -> Rendered:
    return render(stream_item(2, index, kinds=[kind])[0], size=64)


def vector(item: Item, name: str) -> np.ndarray:
    return np.load(item.files[f"embedding:{name}"], allow_pickle=False)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_the_descriptors_know_a_clip_again() -> None:
    films = [clip(kind, index).clip for kind in ("bounce", "drums", "talker") for index in range(2)]
    looks = [describe_picture(film.frames[::8]) for film in films]
    smaller = [describe_picture(resize(film.frames[::8], (48, 48))) for film in films]
    assert all(np.argmax([cosine(a, b) for b in looks]) == n for n, a in enumerate(smaller))
    heard = [describe_sound(film.wave[0]) for film in films]
    quieter = [describe_sound(0.3 * film.wave[0, 1_000:]) for film in films]
    assert all(np.argmax([cosine(a, b) for b in heard]) == n for n, a in enumerate(quieter))


def test_the_stage_writes_vectors_of_length_one(tmp_path: Path) -> None:
    film = clip("bounce", 0).clip
    item = Item({"media": write(film, tmp_path / "a.mp4")})
    (out,) = Embed()(item, tmp_path)
    (out,) = Embed(of="sound", name="ears")(out, tmp_path)
    assert out.facts["embedding"] == {
        "picture": {"model": "hand-made", "size": len(vector(out, "picture"))},
        "ears": {"model": "hand-made", "size": 96},
    }
    assert np.linalg.norm(vector(out, "picture")) == pytest.approx(1)
    silent = replace(item, facts={"media": {"width": 64}})
    assert list(Embed(of="sound")(silent, tmp_path)) == [silent]
    with pytest.raises(ConfigError, match="picture, sound"):
        Embed(of="smell")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_image_models_plug_in(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = small | {"image_size": 32, "patch_size": 16, "projection_dim": 8}
    size = {"height": 32, "width": 32}
    if kind == "clip":
        text = small | {"vocab_size": 9, "projection_dim": 8}
        config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
        transformers.CLIPModel(config).save_pretrained(tmp_path / kind)
        transformers.CLIPImageProcessor(size=size, crop_size=size).save_pretrained(tmp_path / kind)
    else:
        config = transformers.SiglipConfig(text_config=small | {"vocab_size": 9}, vision_config=vision)
        transformers.SiglipModel(config).save_pretrained(tmp_path / kind)
        transformers.SiglipImageProcessor(size=size).save_pretrained(tmp_path / kind)
    item = Item({"media": write(clip("bounce", 0).clip, tmp_path / "a.mp4")})
    (out,) = Embed(model=str(tmp_path / kind), images=2)(item, tmp_path)
    assert vector(out, "picture").shape == ((8,) if kind == "clip" else (16,))
    assert np.linalg.norm(vector(out, "picture")) == pytest.approx(1, abs=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_clap_plugs_in(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    audio = {"hidden_size": 8, "patch_embeds_hidden_size": 4, "depths": [1, 1], "num_attention_heads": [2, 2]}
    audio |= {"num_hidden_layers": 2, "spec_size": 64, "num_mel_bins": 16, "window_size": 4, "projection_dim": 8}
    config = transformers.ClapConfig(
        text_config=small | {"vocab_size": 9, "projection_dim": 8}, audio_config=audio, projection_dim=8
    )
    transformers.ClapModel(config).save_pretrained(tmp_path / "clap")
    hearing = transformers.ClapFeatureExtractor(
        feature_size=16,
        sampling_rate=16_000,
        hop_length=480,
        max_length_s=2,
        fft_window_size=512,
        truncation="rand_trunc",
    )
    hearing.save_pretrained(tmp_path / "clap")
    item = Item({"media": write(clip("drums", 0).clip, tmp_path / "a.mp4")})
    (out,) = Embed(of="sound", model=str(tmp_path / "clap"))(item, tmp_path)
    assert vector(out, "sound").shape == (8,)
