"""Loading a system: names, folders, and what is said when one is missing or partial."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch

from soundstage.core import system as systems
from soundstage.core.errors import ConfigError, WeightsError
from soundstage.core.system import load_system, model_folder


def _folder(path: Path, loader: str = "soundstage.core.av:AV", data: int = 16, kept: int = 16) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "model.json").write_text(json.dumps({"loader": loader}), encoding="utf-8")
    header = json.dumps({"w": {"dtype": "F32", "shape": [data // 4], "data_offsets": [0, data]}}).encode()
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(kept))
    return path


def test_an_unknown_name_lists_the_known_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(systems, "WEIGHTS", tmp_path)
    _folder(tmp_path / "world-tiny")
    _folder(tmp_path / "world-small")
    with pytest.raises(ConfigError, match=r"'world-tiney' is not one of .*world-small, world-tiny; did you mean"):
        load_system("world-tiney")
    assert model_folder(None) == model_folder("world-tiny") == tmp_path / "world-tiny"


def test_missing_default_weights_say_how_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(systems, "WEIGHTS", tmp_path)
    with pytest.raises(WeightsError, match=r"soundstage train soundstage\.recipes\.world:tiny"):
        load_system()


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="there is no folder"):
        load_system(tmp_path / "nothing")
    with pytest.raises(WeightsError, match="there is no folder"):
        load_system("some/where")


def test_partial_folders(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"holds no model\.json"):
        load_system(tmp_path)
    (tmp_path / "model.json").write_text("{", encoding="utf-8")
    with pytest.raises(WeightsError, match="is not JSON"):
        load_system(tmp_path)
    (tmp_path / "model.json").write_text("{}", encoding="utf-8")
    with pytest.raises(WeightsError, match='has no "loader"'):
        load_system(tmp_path)
    (tmp_path / "model.json").write_text('{"loader": "soundstage.core.av:AV"}', encoding="utf-8")
    with pytest.raises(WeightsError, match=r"no \*\.safetensors"):
        load_system(tmp_path)


def test_truncated_and_foreign_weights(tmp_path: Path) -> None:
    folder = _folder(tmp_path, data=400, kept=100)
    with pytest.raises(WeightsError, match=r"truncated, \d+ of \d+ bytes"):
        load_system(folder)
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(WeightsError, match="not safetensors"):
        load_system(folder)
    described = {"loader": "soundstage.core.av:AV", "files": ["model.safetensors", "codec.safetensors"]}
    _folder(tmp_path)
    (folder / "model.json").write_text(json.dumps(described), encoding="utf-8")
    with pytest.raises(WeightsError, match=r"codec\.safetensors: the weights are missing"):
        load_system(folder)


@pytest.mark.parametrize("loader", ["os:system", "soundstage_evil:run", "soundstage.models", "torch.hub:load"])
def test_only_loaders_of_this_package_are_run(tmp_path: Path, loader: str) -> None:
    with pytest.raises(ConfigError, match="only loaders of this package"):
        load_system(_folder(tmp_path, loader))


def test_a_loader_of_another_version(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not in this version of soundstage"):
        load_system(_folder(tmp_path, "soundstage.core.av:Nothing"))
    with pytest.raises(ConfigError, match="not in this version of soundstage"):
        load_system(_folder(tmp_path, "soundstage.nowhere:load"))


def test_the_loader_gets_folder_device_and_dtype(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[object, ...]] = []

    def load(*arguments: object) -> systems.System:
        calls.append(arguments)
        empty = systems.AV()
        return systems.System("m", None, None, None, systems.Sampling(), (), empty, {"license": "x"})  # type: ignore[arg-type]

    monkeypatch.setattr("soundstage.core.av.load_here", load, raising=False)
    loaded = load_system(_folder(tmp_path, "soundstage.core.av:load_here"), dtype=torch.bfloat16)
    assert calls == [(tmp_path, torch.device("cpu"), torch.bfloat16)]
    assert loaded.info == {"license": "x", "folder": str(tmp_path)}
