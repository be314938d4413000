"""The table of published models: folders in every layout are found, told apart, and checked against the full size."""

from __future__ import annotations

import importlib
import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from soundstage.core.errors import ConfigError, WeightsError
from soundstage.models import zoo
from soundstage.models.published import Found
from soundstage.models.weight_files import peek

DATA = Path(__file__).parents[1] / "data"
Shapes = Mapping[str, tuple[int, ...]]


def sparse(path: Path, shapes: Shapes, code: str = "BF16", width: int = 2) -> Path:
    """A safetensors file of any size that takes no room: its data is a hole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    told, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * width
        told[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
    header = json.dumps(told).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + end)
    return path


def pickled(path: Path, shapes: Shapes, inside: str | None = None) -> Path:
    """A .pth of tensors of any size that takes no room: each repeats one number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}
    torch.save({inside: tensors} if inside else tensors, path)
    return path


def recorded(file: str, model: str) -> dict[str, tuple[int, ...]]:
    """Published names and shapes of a full-size model, as recorded."""
    told = json.loads((DATA / f"{file}_full_size_keys.json").read_text(encoding="utf-8"))[model]
    keys = {name: tuple(shape) for name, shape in told.get("keys", told).items()}
    if "num_layers" in told:  # block 0 stands for all
        first = {name: shape for name, shape in keys.items() if ".blocks.0." in name}
        for i in range(1, told["num_layers"]):
            keys |= {name.replace(".blocks.0.", f".blocks.{i}."): shape for name, shape in first.items()}
    for group, blocks in told.get("blocks", {}).items():
        each = blocks["each"].items()
        keys |= {f"{group}.{i}.{name}": tuple(shape) for i in range(blocks["count"]) for name, shape in each}
    return keys


def t5() -> dict[str, tuple[int, ...]]:
    """Wan's names of umT5-xxl."""
    width, inner, hidden = 4096, 4096, 10240
    keys = {"token_embedding.weight": (256384, width), "norm.weight": (width,)}
    for i in range(24):
        block = {f"attn.{x}.weight": (inner, width) for x in "qkv"} | {"attn.o.weight": (width, inner)}
        block |= {"norm1.weight": (width,), "norm2.weight": (width,), "pos_embedding.embedding.weight": (32, 64)}
        block |= {"ffn.gate.0.weight": (hidden, width), "ffn.fc1.weight": (hidden, width)}
        keys |= {f"blocks.{i}.{name}": shape for name, shape in (block | {"ffn.fc2.weight": (width, hidden)}).items()}
    return keys


def words(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer_config.json", "tokenizer.json", "spiece.model", "special_tokens_map.json"):
        (folder / name).write_text("{}")
    return folder


@pytest.fixture(scope="module")
def ovi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ovi as its own downloader leaves it, in full size."""
    folder = tmp_path_factory.mktemp("ovi")
    sparse(folder / "Ovi" / "model_960x960_10s.safetensors", recorded("ovi", "ovi_fusion"))
    pickled(folder / "MMAudio" / "ext_weights" / "v1-16.pth", recorded("ovi", "mmaudio_vae_16k"))
    pickled(folder / "MMAudio" / "ext_weights" / "best_netG.pt", recorded("ovi", "bigvgan_16k"), "generator")
    wan = folder / "Wan2.2-TI2V-5B"
    pickled(wan / "Wan2.2_VAE.pth", recorded("ovi", "wan22_vae"))
    pickled(wan / "models_t5_umt5-xxl-enc-bf16.pth", t5())
    words(wan / "google" / "umt5-xxl")
    return folder


def wan(folder: Path, model: str, count: int = 2) -> Path:
    """A Wan2.1 denoiser in shards, full size; its other files empty but named."""
    keys = recorded("vace", model)
    names = list(keys)
    stem = "diffusion_pytorch_model"
    where = {}
    for i in range(count):
        shard = f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors"
        mine = names[i::count]
        sparse(folder / shard, {name: keys[name] for name in mine}, "F32", 4)
        where |= dict.fromkeys(mine, shard)
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


def test_the_table_is_sound() -> None:
    assert list(zoo.MODELS)[:2] == ["ovi", "ovi-960x960-10s"]
    wanted = {"ovi-720x720-5s", "wan2.2-5b", "wan2.1-t2v-1.3b", "wan2.1-t2v-14b", "wan2.1-i2v-14b-480p"}
    assert wanted < set(zoo.MODELS)
    for name, model in zoo.MODELS.items():
        assert name == model.name
        roles = [part.role for part in model.parts]
        assert len(set(roles)) == len(roles)
        assert roles[0].endswith("denoiser")
        assert all(part.files and part.forms for part in model.parts)
        for part in model.parts:  # what fetch leaves is what find looks for
            found = zoo.search(part, [Path("weights", file.to) for file in part.files], ())
            assert found is not None, (name, part.role)
    restricted = {
        (name, part.role) for name, model in zoo.MODELS.items() for part in model.parts if part.non_commercial
    }
    assert {role for _, role in restricted} == {"sound autoencoder", "vocoder"}
    assert all(name.startswith("ovi") for name, _ in restricted)


def test_what_the_table_names_in_the_code_is_there() -> None:
    references = {model.loader for model in zoo.MODELS.values()}
    for model in zoo.MODELS.values():
        for part in model.parts:
            references |= {part.build, *(name for form in part.forms for name in (form.keys, form.ignored))} - {None}
    for reference in references:
        module, _, attribute = reference.partition(":")
        assert getattr(importlib.import_module(module), attribute) is not None


def test_the_sizes_are_those_of_the_recorded_parameters() -> None:
    sizes = {part.role: part.bytes for part in zoo.MODELS["ovi"].parts}
    assert sizes["video+audio denoiser"] == 2 * sum(map(math.prod, recorded("ovi", "ovi_fusion").values()))
    assert sizes["video autoencoder"] == 4 * sum(map(math.prod, recorded("ovi", "wan22_vae").values()))
    assert sizes["sound autoencoder"] == 4 * sum(map(math.prod, recorded("ovi", "mmaudio_vae_16k").values()))
    assert sizes["vocoder"] == 4 * sum(map(math.prod, recorded("ovi", "bigvgan_16k").values()))
    assert sizes["text encoder"] == 2 * sum(map(math.prod, t5().values()))


def test_an_unknown_name_names_the_near_one() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'wan2\.2-5b'"):
        zoo.published("wan2.2-5")


def test_ovi_is_found_as_its_downloader_leaves_it_and_flat(ovi: Path, tmp_path: Path) -> None:
    found = zoo.find("ovi", ovi)
    below = {role: str(path.relative_to(ovi)) for role, path in found.items()}
    assert below == {
        "video+audio denoiser": "Ovi/model_960x960_10s.safetensors",
        "text encoder": "Wan2.2-TI2V-5B/models_t5_umt5-xxl-enc-bf16.pth",
        "tokenizer": "Wan2.2-TI2V-5B/google/umt5-xxl",
        "video autoencoder": "Wan2.2-TI2V-5B/Wan2.2_VAE.pth",
        "sound autoencoder": "MMAudio/ext_weights/v1-16.pth",
        "vocoder": "MMAudio/ext_weights/best_netG.pt",
    }
    for path in found.values():
        for file in path.iterdir() if path.is_dir() else [path]:
            (tmp_path / file.name).symlink_to(file)
    flat = zoo.find("ovi", tmp_path)
    assert flat["tokenizer"] == tmp_path
    assert {role: path.name for role, path in flat.items() if role != "tokenizer"} == {
        role: path.name for role, path in found.items() if role != "tokenizer"
    }


@pytest.mark.parametrize("seconds", ["960x960-10s", "960x960-5s", "720x720-5s"])
def test_plain_ovi_is_whichever_variant_is_there(seconds: str, ovi: Path, tmp_path: Path) -> None:
    for each in ("MMAudio", "Wan2.2-TI2V-5B"):
        (tmp_path / each).symlink_to(ovi / each)
    file = zoo.OVI_FILES[seconds]
    (tmp_path / file).symlink_to(ovi / "Ovi" / "model_960x960_10s.safetensors")
    assert zoo.find("ovi", tmp_path)["video+audio denoiser"] == tmp_path / file
    assert zoo.find(f"ovi-{seconds}", tmp_path)["video+audio denoiser"] == tmp_path / file
    other = next(name for name in zoo.OVI_FILES if name != seconds)
    with pytest.raises(WeightsError, match=rf"holds ovi-{seconds}'s files; of ovi-{other} it lacks Ovi/"):
        zoo.find(f"ovi-{other}", tmp_path)


@pytest.mark.slow
def test_a_full_size_ovi_folder_checks_whole(ovi: Path) -> None:
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    assert zoo.recognise(ovi) == "ovi"
    rows = zoo.check("ovi", ovi)
    assert [row.state for row in rows] == ["whole"] * 6, [row.problem for row in rows]
    loaded = {row.part.role: row.report.loaded for row in rows if row.report is not None}
    assert loaded["video+audio denoiser"] == 2073
    assert loaded["video autoencoder"] == 196
    assert loaded["text encoder"] == 24 * 10 + 2
    assert rows[0].bytes == pytest.approx(2 * 11_660_753_108, rel=1e-4)


def test_a_check_names_what_is_wrong_with_each_part(ovi: Path, tmp_path: Path) -> None:
    for each in ("MMAudio", "Wan2.2-TI2V-5B"):
        (tmp_path / each).symlink_to(ovi / each)
    keys = recorded("ovi", "ovi_fusion")
    gone = keys.pop("audio_model.blocks.7.cross_attn.k_fusion.weight")
    keys |= {"lora.up": (3,), "audio_model.head.head.bias": (21,)}
    denoiser = sparse(tmp_path / "model.safetensors", keys)
    row = zoo.check("ovi", tmp_path, ["video+audio denoiser"])[0]
    assert (row.state, gone) == ("other", (3072, 3072))
    assert row.report is not None
    assert (row.report.loaded, row.report.missing) == (2071, ("blocks.7.audio.cross_attn.k_fusion.weight",))
    assert row.report.unexpected == ("lora.up",)
    assert row.report.wrong_shape == (("audio.head.head.bias", (21,), (20,)),)
    assert "fits ovi's video+audio denoiser in part only, 2071 of 2073" in str(row.problem)
    whole = denoiser.stat().st_size
    with denoiser.open("r+b") as file:
        file.truncate(10**9)
    row = zoo.check("ovi", tmp_path, ["video+audio denoiser"])[0]
    assert row.state == "damaged"
    assert f"truncated, 1000000000 of {whole} bytes" in str(row.problem)
    assert zoo.recognise(tmp_path) == "ovi"
    denoiser.rename(tmp_path / "model.safetensors.abc.incomplete")
    row = zoo.check("ovi", tmp_path)[0]
    assert row.state == "missing"
    assert "Ovi/model_960x960_10s.safetensors (video+audio denoiser)" in str(row.problem)
    assert "model.safetensors.abc.incomplete is half downloaded" in str(row.problem)
    assert f"`soundstage models fetch ovi {tmp_path}`" in str(row.problem)


@pytest.mark.parametrize(
    ("model", "name"),
    [("t2v_1.3b", "wan2.1-t2v-1.3b"), ("t2v_14b", "wan2.1-t2v-14b"), ("i2v_14b", "wan2.1-i2v-14b-480p")],
)
def test_wan_models_of_equal_file_names_are_told_apart(model: str, name: str, tmp_path: Path) -> None:
    folder = wan(tmp_path, model)
    assert zoo.recognise(folder) == name
    row = zoo.check(name, folder, ["video denoiser"])[0]
    assert row.whole, row.problem
    assert row.report is not None
    assert row.report.loaded == {"t2v_1.3b": 825, "t2v_14b": 1095, "i2v_14b": 1303}[model]
    asked = "wan2.1-t2v-14b" if name != "wan2.1-t2v-14b" else "wan2.2-5b"
    with pytest.raises(WeightsError, match=rf"this folder holds {name}'s files; of {asked} it lacks diffusion_pytorch"):
        zoo.find(asked, folder)
    missing = "parts of .* are missing: models_t5_umt5-xxl-enc-bf16.pth"
    with pytest.raises(WeightsError, match=missing):
        zoo.find(name, folder)


def test_the_picture_size_of_an_image_to_video_model_is_told_by_its_folder(tmp_path: Path) -> None:
    assert zoo.recognise(wan(tmp_path / "Wan2.1-I2V-14B-720P", "i2v_14b")) == "wan2.1-i2v-14b-720p"
    assert zoo.find("wan2.1-i2v-14b-480p", rest(tmp_path / "Wan2.1-I2V-14B-720P"))["image encoder"].suffix == ".pth"


def rest(folder: Path) -> Path:
    """The other files of an original Wan2.1 folder, empty."""
    for name in ("Wan2.1_VAE.pth", zoo.T5, zoo.CLIP):
        (folder / name).touch()
    words(folder / "google" / "umt5-xxl")
    return folder


def test_missing_shards_are_told(tmp_path: Path) -> None:
    folder = wan(tmp_path, "t2v_14b", count=6)
    (folder / "diffusion_pytorch_model-00004-of-00006.safetensors").unlink()
    row = zoo.check("wan2.1-t2v-14b", folder, ["video denoiser"])[0]
    assert row.state == "damaged"
    assert "1 of 6 shards are missing (diffusion_pytorch_model-00004-of-00006.safetensors)" in str(row.problem)
    assert peek(folder / "diffusion_pytorch_model.safetensors.index.json")


def test_a_diffusers_folder_is_found_with_its_own_key_maps(tmp_path: Path) -> None:
    shapes = {"patch_embedding.weight": (8, 16, 1, 2, 2), "scale_shift_table": (1, 2, 8)}
    sparse(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors", shapes)
    sparse(tmp_path / "vae" / "diffusion_pytorch_model.safetensors", {"decoder.conv_in.weight": (4, 4)})
    sparse(tmp_path / "text_encoder" / "model.safetensors", {"shared.weight": (4, 4)})
    words(tmp_path / "tokenizer")
    found: dict[str, Found] = zoo.locate(zoo.published("wan2.1-t2v-1.3b"), tmp_path)
    places = {role: str(each.path.relative_to(tmp_path)) for role, each in found.items()}
    assert places == {
        "video denoiser": "transformer/diffusion_pytorch_model.safetensors",
        "text encoder": "text_encoder/model.safetensors",
        "tokenizer": "tokenizer",
        "video autoencoder": "vae/diffusion_pytorch_model.safetensors",
    }
    from soundstage.models.wan import WAN_DIFFUSERS_KEYS

    assert found["video denoiser"].keys is WAN_DIFFUSERS_KEYS
    assert found["video denoiser"].shapes() == shapes


def test_tensors_of_the_wrong_model_in_a_right_name_are_not_taken(tmp_path: Path) -> None:
    sparse(tmp_path / "model.safetensors", {"denoiser.blocks.0.weight": (2, 2)})
    assert zoo.recognise(tmp_path) is None
    with pytest.raises(WeightsError, match="6 of 6 parts of ovi are missing"):
        zoo.find("ovi", tmp_path)


def test_no_folder_is_one_sentence(tmp_path: Path) -> None:
    for call in (zoo.find, zoo.check):
        with pytest.raises(WeightsError, match="there is no such folder; `soundstage models fetch ovi "):
            call("ovi", tmp_path / "absent")
    assert zoo.recognise(tmp_path / "absent") is None
