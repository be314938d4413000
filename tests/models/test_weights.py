"""Weights into modules: every format, a strict report, one sentence for a bad file, and bounded memory."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from soundstage.core.errors import WeightsError
from soundstage.models.weight_files import Mapped
from soundstage.models.weights import (
    Source,
    check_weights,
    check_whole,
    headers,
    identity,
    load_weights,
    renamed,
    save_weights,
    shapes,
)


class Small(nn.Module):
    """Parameters, a buffer that is stored, a whole number, and a buffer that is not stored."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(5, 7), nn.Linear(7, 3)])
        self.norm = nn.LayerNorm(3)
        self.register_buffer("mean", torch.randn(3))
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("table", torch.arange(4.0), persistent=False)


@pytest.fixture
def model() -> Small:
    torch.manual_seed(0)
    small = Small()
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.normal_()
    return small


def empty() -> Small:
    with torch.device("meta"):
        return Small()


def equal(one: nn.Module, other: nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(
        torch.equal(mine[name], theirs[name]) and mine[name].dtype == theirs[name].dtype for name in mine
    )


def stored(kind: str, model: nn.Module, folder: Path) -> Path:
    """The model in one of the formats that are read."""
    state = model.state_dict()
    if kind == "safetensors":
        save_file(state, folder / "a.safetensors")
        return folder / "a.safetensors"
    if kind in ("pth", "pt", "bin", "legacy"):
        path = folder / f"a.{kind if kind != 'legacy' else 'pth'}"
        torch.save(state, path, _use_new_zipfile_serialization=kind != "legacy")
        return path
    if kind == "numbered":
        for i, name in enumerate(state, 1):
            save_file({name: state[name]}, folder / f"m-{i:05d}-of-{len(state):05d}.safetensors")
        return folder
    save_weights(model, folder / "m.safetensors", shard_bytes=100)
    return {"index": folder / "m.safetensors.index.json", "folder": folder, "name": folder / "m.safetensors"}[kind]


KINDS = ("safetensors", "pth", "pt", "bin", "legacy", "numbered", "index", "folder", "name")


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_gives_back_the_same_tensors(kind: str, model: Small, tmp_path: Path) -> None:
    path = stored(kind, model, tmp_path)
    found = headers(path)
    assert found == {name: (tuple(x.shape), x.dtype) for name, x in model.state_dict().items()}
    assert shapes(path)["blocks.0.weight"] == (7, 5)
    check_whole(path)
    loaded = empty()
    assert check_weights(loaded, path) == load_weights(loaded, path)
    assert equal(loaded, model)
    assert loaded.blocks[0].weight.requires_grad
    assert isinstance(loaded.blocks[0].weight, nn.Parameter)
    assert dict(loaded.named_buffers())["mean"].device.type == "cpu"


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_with_a_point_take_the_type_asked_for(kind: str, model: Small, tmp_path: Path) -> None:
    loaded = empty()
    load_weights(loaded, stored(kind, model, tmp_path), dtype=torch.bfloat16)
    for name, value in loaded.state_dict().items():
        wanted = model.state_dict()[name]
        assert torch.equal(value, wanted.to(torch.bfloat16) if name != "count" else wanted)
        assert value.dtype == (torch.int64 if name == "count" else torch.bfloat16)


def test_a_module_with_memory_of_its_own_keeps_what_is_not_stored(model: Small, tmp_path: Path) -> None:
    other = Small().requires_grad_(False)
    load_weights(other, stored("safetensors", model, tmp_path))
    assert equal(other, model)
    assert torch.equal(other.table, torch.arange(4.0))
    assert not other.norm.weight.requires_grad


def test_a_mapped_tensor_can_be_written_to_and_the_file_stays(model: Small, tmp_path: Path) -> None:
    for kind in ("safetensors", "pth"):
        path = stored(kind, model, tmp_path)
        before = path.read_bytes()
        loaded = empty()
        load_weights(loaded, path)
        with torch.no_grad():
            loaded.blocks[0].weight.zero_()
        assert loaded.blocks[0].weight.sum() == 0
        assert path.read_bytes() == before


def test_tensors_larger_than_a_piece_are_converted_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("soundstage.models.weights.PIECE", 64)
    monkeypatch.setattr("soundstage.models.weight_files.WINDOW", 100)
    torch.manual_seed(0)
    tensors = {"a": torch.randn(37, 5), "b": torch.randn(1), "c": torch.zeros(0, 4), "d": torch.randn(6, 4).t()}
    module = nn.Module()
    for name, value in tensors.items():
        module.register_parameter(name, nn.Parameter(torch.empty(value.shape, device="meta")))
    torch.save(tensors, tmp_path / "a.pth")
    save_weights(tensors, tmp_path / "a.safetensors")
    for path in tmp_path.iterdir():
        load_weights(module, path, dtype=torch.float64)
        assert all(torch.equal(getattr(module, name), value.double()) for name, value in tensors.items())


def test_key_maps_rename_join_and_split(tmp_path: Path) -> None:
    torch.manual_seed(0)
    stored_ = {
        "net.q": torch.randn(2, 3),
        "net.k": torch.randn(2, 3),
        "net.g": torch.rand(4, 1),
        "net.v": torch.randn(4, 3),
    }
    save_file(stored_, tmp_path / "a.safetensors")

    def keys(names: object) -> dict[str, Source]:
        assert list(names) == sorted(stored_)  # type: ignore[call-overload]
        return {
            "qk": Source(("net.q", "net.k"), lambda q, k: torch.cat([q, k])),
            "v": Source(("net.g", "net.v"), lambda g, v: g * v),
            "flat": Source(("net.q",), lambda q: q.reshape(-1)),
        }

    for dtype in (None, torch.bfloat16):
        module = nn.Module()
        for name, shape in {"qk": (4, 3), "v": (4, 3), "flat": (6,)}.items():
            module.register_buffer(name, torch.empty(shape, device="meta"))
        report = load_weights(module, tmp_path / "a.safetensors", keys, dtype=dtype)
        assert (report.loaded, report.fits) == (3, True)
        assert torch.equal(module.qk, torch.cat([stored_["net.q"], stored_["net.k"]]).to(dtype or torch.float32))
        assert torch.equal(module.v, (stored_["net.g"] * stored_["net.v"]).to(dtype or torch.float32))
        assert torch.equal(module.flat, stored_["net.q"].reshape(-1).to(dtype or torch.float32))


def test_renamed_applies_its_rules_in_turn_and_refuses_two_of_one_name() -> None:
    keys = renamed((r"^model\.", ""), (r"blocks\.(\d+)\.w$", r"blocks.\1.weight"))
    assert keys(["model.blocks.3.w", "b"]) == {"blocks.3.weight": Source(("model.blocks.3.w",)), "b": Source(("b",))}
    with pytest.raises(WeightsError, match=r"model\.b and b are both 'b'"):
        keys(["b", "model.b"])
    assert identity(["a"]) == {"a": Source(("a",))}


def test_the_report_lists_every_kind_and_its_demand_the_first_names(model: Small, tmp_path: Path) -> None:
    state = model.state_dict()
    del state["blocks.0.weight"], state["norm.weight"]
    state |= {"blocks.1.bias": torch.zeros(9), "extra.a": torch.zeros(1), "extra.b": torch.zeros(1)}
    save_file(state, tmp_path / "a.safetensors")
    report = check_weights(empty(), tmp_path / "a.safetensors")
    assert report.loaded == 5
    assert set(report.missing) == {"blocks.0.weight", "norm.weight"}
    assert set(report.unexpected) == {"extra.a", "extra.b"}
    assert report.wrong_shape == (("blocks.1.bias", (9,), (3,)),)
    said = (
        r"a.safetensors: fits a small model in part only, 5 of 8 tensors; 2 missing \(blocks.0.weight, norm.weight\), "
        r"2 unexpected \(extra.a, extra.b\), 1 of wrong shape \(blocks.1.bias is \[9\] in the file and \[3\] in the "
        r"model\); is this file of another model\?"
    )
    with pytest.raises(WeightsError, match=said):
        report.demand("a small model")
    untouched = empty()
    with pytest.raises(WeightsError, match="fits Small in part only"):
        load_weights(untouched, tmp_path / "a.safetensors")
    assert all(value.is_meta for value in untouched.state_dict().values())
    some = empty()
    assert load_weights(some, tmp_path / "a.safetensors", strict=False) == report
    assert torch.equal(some.mean, model.mean)
    assert some.blocks[0].weight.is_meta
    assert some.blocks[1].bias.is_meta


def test_names_may_be_optional_on_either_side(model: Small, tmp_path: Path) -> None:
    state = model.state_dict()
    del state["mean"]
    save_file(state | {"textual.a": torch.zeros(1)}, tmp_path / "a.safetensors")
    assert not check_weights(empty(), tmp_path / "a.safetensors", optional=["textual"]).fits
    report = load_weights(empty(), tmp_path / "a.safetensors", optional=["mean", r"textual\..*"])
    assert (report.loaded, report.missing, report.unexpected) == (7, (), ())


def test_a_file_of_another_model_says_so(tmp_path: Path) -> None:
    save_file({"unet.a": torch.zeros(1), "unet.b": torch.zeros(1)}, tmp_path / "a.safetensors")
    said = (
        r"is no file of Ovi's denoiser: none of its 2 names \(unet.a, unet.b\) is one of the 8 asked for \(mean, count"
    )
    with pytest.raises(WeightsError, match=said):
        load_weights(empty(), tmp_path / "a.safetensors", what="Ovi's denoiser")


def test_nested_dicts_are_opened_by_name(model: Small, tmp_path: Path) -> None:
    path = tmp_path / "g.pth"
    torch.save({"generator": model.state_dict(), "epoch": 3, "optim": {"lr": 0.1}}, path)
    loaded = empty()
    load_weights(loaded, path, inside="generator")
    assert equal(loaded, model)
    with pytest.raises(WeightsError, match=r"holds no tensors by name but 'generator', 'epoch', 'optim'; open one"):
        headers(path)
    with pytest.raises(WeightsError, match="holds no 'state_dict'; it has 'generator'"):
        headers(path, "state_dict")
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match="hold no nested dict 'generator'"):
        headers(tmp_path / "a.safetensors", "generator")


class Harm:
    """Runs code when it is unpickled without care."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("legacy", [False, True])
def test_pickled_code_is_refused_and_not_run(legacy: bool, tmp_path: Path) -> None:
    path, mark = tmp_path / "bad.pth", tmp_path / "mark"
    torch.save({"a": torch.zeros(3), "b": Harm(mark)}, path, _use_new_zipfile_serialization=not legacy)
    said = r"bad.pth: refused, since it holds pickled Python objects \(posix.system\).* such as .safetensors"
    with pytest.raises(WeightsError, match=said):
        headers(path)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 10)
    with pytest.raises(WeightsError):
        headers(path)
    assert not mark.exists()


def half(path: Path, keep: float) -> tuple[int, int]:
    whole = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(int(whole * keep))
    return int(whole * keep), whole


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.99])
@pytest.mark.parametrize("kind", ["safetensors", "pth", "legacy"])
def test_a_truncated_file_is_one_sentence_with_its_bytes(kind: str, keep: float, tmp_path: Path) -> None:
    path = stored(kind, nn.Linear(100, 100), tmp_path)
    size, whole = half(path, keep)
    for call in (headers, lambda p: load_weights(nn.Linear(100, 100), p)):
        with pytest.raises(WeightsError) as caught:
            call(path)
        said = str(caught.value)
        assert said.startswith(f"{path}: ")
        assert said.endswith("; fetch or copy the file again")
        assert f"{size} " in said
        assert "\n" not in said
        if keep == 0.5 and kind == "safetensors":
            assert f"truncated, {size} of {whole} bytes" in said
        if keep == 0.5 and kind == "pth":
            told = re.search(r"truncated, \d+ of at least (\d+) bytes", said)
            assert told is not None
            assert 40_400 <= int(told[1]) <= whole


def test_what_is_no_weight_file_is_told(tmp_path: Path) -> None:
    page = tmp_path / "model.safetensors"
    page.write_text("<!doctype html><title>not found</title>")
    with pytest.raises(WeightsError, match="39 bytes that are not safetensors, or a truncated file; fetch or copy"):
        headers(page)
    page = page.rename(tmp_path / "model.pth")
    with pytest.raises(WeightsError, match="39 bytes that are no weights of torch, or a truncated file; fetch or copy"):
        headers(page)
    torch.save([1, 2], page)
    with pytest.raises(WeightsError, match="holds no tensors by name but a list"):
        headers(page)


def test_missing_and_half_downloaded_files_are_told(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(WeightsError, match=r"a.safetensors: the weights are missing"):
        headers(path)
    (tmp_path / "a.safetensors.incomplete").write_bytes(b"0" * 12)
    with pytest.raises(WeightsError, match=r"half downloaded, 12 bytes are in a.safetensors.incomplete"):
        headers(path)
    with pytest.raises(WeightsError, match=r"holds no weights"):
        headers(tmp_path)


def test_shards_that_lack_and_folders_that_are_not_clear_are_told(model: Small, tmp_path: Path) -> None:
    index = stored("index", model, tmp_path)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 3
    shards[1].unlink()
    said = rf"1 of {len(shards)} shards are missing \({shards[1].name}\)"
    for path in (index, tmp_path, tmp_path / "m.safetensors"):
        with pytest.raises(WeightsError, match=said):
            headers(path)
    index.unlink()
    with pytest.raises(WeightsError, match=said):
        headers(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match=r"holds several weight files .* name the one to read"):
        headers(tmp_path)
    index.write_text("{}")
    with pytest.raises(WeightsError, match="is no index of shards"):
        headers(index)
    index.write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))
    with pytest.raises(WeightsError, match="names shards outside its folder"):
        headers(index)


def test_writing_renames_shards_and_leaves_nothing_half(model: Small, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    total = sum(value.nbytes for value in model.state_dict().values())
    path = tmp_path / "out" / "m.safetensors"
    files = save_weights(model, path, "net.{}".format, metadata={"step": "3"}, on_bytes=lambda *at: seen.append(at))
    assert files == (path,)
    assert seen[-1] == (total, total)
    assert {name: value.dtype for name, value in load_file(path).items()} == {
        f"net.{name}": value.dtype for name, value in model.state_dict().items()
    }
    assert all(torch.equal(load_file(path)[f"net.{name}"], value) for name, value in model.state_dict().items())
    shards = save_weights(model, path, shard_bytes=100)
    assert len(shards) > 3
    assert not path.exists()
    assert max(sum(value.nbytes for value in load_file(shard).values()) for shard in shards) <= 140
    index = json.loads((tmp_path / "out" / "m.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == total
    assert set(index["weight_map"]) == set(model.state_dict())
    save_weights(model, path, shard_bytes=10**9)
    assert headers(path) == headers(tmp_path / "out" / "m.safetensors")
    assert not list(path.parent.glob("*.part"))
    assert not list(path.parent.glob("*.json"))


def test_writing_takes_every_type_and_refuses_what_cannot_be(tmp_path: Path) -> None:
    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.bool)
    tensors: dict[str, Tensor] = {str(kind): torch.tensor([[1, 0, 1]]).to(kind) for kind in kinds}
    tensors["one"], tensors["none"] = torch.tensor(2.5), torch.zeros(0, 3)
    tensors["turned"] = torch.arange(6.0).view(2, 3).t()
    save_weights(tensors, tmp_path / "a.safetensors")
    read = load_file(tmp_path / "a.safetensors")
    for name, value in tensors.items():
        assert torch.equal(read[name].float(), value.float()), name
        assert (read[name].dtype, read[name].shape) == (value.dtype, value.shape)
    with pytest.raises(WeightsError, match="two tensors would be named 'x'"):
        save_weights(tensors, tmp_path / "a.safetensors", lambda _: "x")
    with pytest.raises(WeightsError, match="complex128, which safetensors cannot hold"):
        save_weights({"a": torch.zeros(1, dtype=torch.complex128)}, tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match="name the file so"):
        save_weights(tensors, tmp_path / "a.pth")


def test_loading_tells_how_far_it_is(model: Small, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    path = stored("safetensors", model, tmp_path)
    load_weights(empty(), path, dtype=torch.float16, on_bytes=lambda *at: seen.append(at))
    total = sum(value.nbytes for value in model.state_dict().values())
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert len(seen) == 8


MEASURE = """
import sys
from pathlib import Path
import safetensors, torch
from torch import nn
from soundstage.models.weights import load_weights

def held(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

path, layers = Path(sys.argv[1]), int(sys.argv[2])
with torch.device("meta"):
    module = nn.Sequential(*(nn.Linear(1280, 1280) for _ in range(layers)))
torch.ones(4).bfloat16().float()
before = held("VmRSS")
load_weights(module, path, dtype=torch.bfloat16)
assert module[0].weight.dtype == torch.bfloat16
print(held("VmHWM") - before)
print(module[-1].bias.float().sum().item())
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from the Linux kernel")
@pytest.mark.parametrize(
    ("kind", "most"), [("kept", 0.1), ("kept-pth", 0.1), ("fp32", 1.0), ("pth", 1.0), ("shards", 1.0), ("legacy", 1.2)]
)
def test_the_peak_of_memory_is_bounded(kind: str, most: float, tmp_path: Path) -> None:
    """Of about 200 MB: what keeps its type stays mapped; what is halved peaks at half and a window of 64 MB.

    Only the older format of torch is read whole, and each tensor let go once it is converted.
    """
    dtype = torch.bfloat16 if kind.startswith("kept") else torch.float32
    layers = 64 if dtype == torch.bfloat16 else 32
    with torch.device("meta"):
        module = nn.Sequential(*(nn.Linear(1280, 1280, dtype=dtype) for _ in range(layers)))
    module.to_empty(device="cpu").requires_grad_(False)
    for i, parameter in enumerate(module.parameters()):
        parameter.fill_(i / 64)
    path = tmp_path / ("a.pth" if kind in ("pth", "kept-pth", "legacy") else "a.safetensors")
    if path.suffix == ".pth":
        torch.save(module.state_dict(), path, _use_new_zipfile_serialization=kind != "legacy")
    else:
        save_weights(module, path, shard_bytes=60 * 10**6 if kind == "shards" else None)
    size = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert size > 2e8
    command = [sys.executable, "-c", MEASURE, str(path), str(layers)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, total = done.stdout.split()
    assert float(total) == pytest.approx(module[-1].bias.to(torch.bfloat16).float().sum().item(), abs=1e-3)
    assert int(peak) / size < most


def test_a_window_of_the_file_passes_through_memory(
    model: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("soundstage.models.weight_files.WINDOW", 8)
    mapped = Mapped(stored("safetensors", model, tmp_path))
    first = mapped.passing("blocks.0.weight").data_ptr()
    assert mapped.passing("blocks.0.weight").data_ptr() == first
    kept = mapped.keep("mean")
    mapped.spent(8)
    again = mapped.passing("mean")
    assert torch.equal(again, kept)
    assert again.data_ptr() != kept.data_ptr()
