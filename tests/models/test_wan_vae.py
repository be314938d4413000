"""The Wan video autoencoders: names, exact tiles and streams, counted memory and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from math import inf
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from soundstage.core.errors import ConfigError, RequestError, ShapeError, WeightsError
from soundstage.models.codecs.tiled import split
from soundstage.models.codecs.wan_vae import WAN21_VAE, WAN22_VAE, WAN_VAE_KEYS, WanVAE, WanVAEConfig
from soundstage.models.codecs.wan_vae_memory import decode_bytes, encode_bytes, fit_tile
from soundstage.models.weights import headers, load_weights, save_weights

DATA = Path(__file__).resolve().parents[1] / "data"
VERSIONS = {"wan21": WAN21_VAE, "wan22": WAN22_VAE}
SMALL = {name: replace(config, width=4, decoder_width=4) for name, config in VERSIONS.items()}
CLOSE = {"rtol": 0.0, "atol": 2e-5}  # of results of size 1: other shapes add up in another order
GIB = 2**30


def small(version: str) -> WanVAE:
    """Random weights at width 4, none of them zero."""
    torch.manual_seed(0)
    module = SMALL[version].build()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return module.requires_grad_(False)


@pytest.fixture(scope="module")
def codecs() -> dict[str, WanVAE]:
    return {version: small(version) for version in VERSIONS}


def clip(config: WanVAEConfig, length: int, rows: int, columns: int, seed: int = 1) -> Tensor:
    side, make = config.geometry.spatial_stride, torch.Generator().manual_seed(seed)
    return torch.rand(1, 3, length, rows * side, columns * side, generator=make) * 2 - 1


def latents_of(config: WanVAEConfig, steps: int, rows: int, columns: int, seed: int = 2) -> Tensor:
    return torch.randn(1, config.channels, steps, rows, columns, generator=torch.Generator().manual_seed(seed))


def as_asked(codec: WanVAE, tile: int | None, stream: bool = True) -> WanVAE:
    """The same weights with other settings."""
    with torch.device("meta"):
        other = WanVAE(codec.config, tile, stream)
    other.load_state_dict(codec.state_dict(), assign=True)
    return other.requires_grad_(False)


# Names and files


def full_size(version: str) -> dict[str, tuple[int, ...]]:
    file, key = ("vace", "wan21_vae") if version == "wan21" else ("ovi", "wan22_vae")
    told = json.loads((DATA / f"{file}_full_size_keys.json").read_text(encoding="utf-8"))[key]
    return {name: tuple(shape) for name, shape in told.get("keys", told).items()}


@pytest.mark.parametrize(
    ("version", "tensors", "parameters"), [("wan21", 194, 126_892_531), ("wan22", 196, 704_688_668)]
)
def test_full_size_names(version: str, tensors: int, parameters: int) -> None:
    published = full_size(version)
    config = VERSIONS[version]
    with torch.device("meta"):
        module = config.build()
    ours = {name: tuple(x.shape) for name, x in module.state_dict().items()}
    sources = WAN_VAE_KEYS(list(published))
    assert {name: published[source.names[0]] for name, source in sources.items()} == ours
    assert all(source.build is None for source in sources.values())
    assert len(published) == len(ours) == tensors
    assert sum(x.numel() for x in module.parameters()) == parameters
    assert WanVAEConfig.of(published) == WanVAEConfig.of(ours) == config


@pytest.mark.parametrize("version", VERSIONS)
def test_published_and_diffusers_files_load_to_equal_modules(version: str, tmp_path: Path) -> None:
    recorded = load_file(DATA / f"{version}_vae_public.safetensors")
    state = {name.removeprefix("sd."): x for name, x in recorded.items() if name.startswith("sd.")}
    first, second = tmp_path / "published.pth", tmp_path / "diffusers.safetensors"
    torch.save(state, first)

    def loaded(path: Path) -> WanVAE:
        with torch.device("meta"):
            module = WanVAEConfig.of({name: shape for name, (shape, _) in headers(path).items()}).build()
        report = load_weights(module, path, WAN_VAE_KEYS)
        assert (report.loaded, report.missing, report.unexpected) == (len(state), (), ())
        return module

    one = loaded(first)
    save_weights(one, second)
    other = loaded(second)
    assert one.config == other.config
    mine, theirs = one.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert sum(float(x.double().sum()) for x in mine.values()) == pytest.approx(
        sum(float(x.double().sum()) for x in state.values())
    )


def test_files_of_other_models_are_refused() -> None:
    with pytest.raises(WeightsError, match="not those of a Wan video autoencoder; give its file"):
        WanVAEConfig.of({"blocks.0.weight": (3, 3)})
    with pytest.raises(WeightsError, match="video autoencoder"):
        WanVAEConfig.of({name: shape for name, shape in full_size("wan22").items() if "decoder" not in name})
    with pytest.raises(WeightsError):
        WAN_VAE_KEYS(["conv1.weight", "quant_conv.weight"])


def test_config_is_checked() -> None:
    with pytest.raises(ConfigError, match="give one each"):
        replace(WAN21_VAE, mean=(0.0,))
    with pytest.raises(ConfigError, match="4 stages need 3"):
        replace(WAN21_VAE, temporal=(True,))


def test_geometry() -> None:
    for config, stride, rate in ((WAN21_VAE, 8, 16), (WAN22_VAE, 16, 24)):
        geometry = config.geometry
        assert (geometry.stride, geometry.spatial_stride, geometry.rate) == (4, stride, rate)
        assert (geometry.steps(1), geometry.steps(121), geometry.length(31)) == (1, 31, 121)
        assert config.halo == (75 * config.patch, 13)


# Streams and tiles


@dataclass(frozen=True)
class Whole:
    """A narrow clip, longer on one side than the margins of a tile in its middle, coded on whole frames."""

    codec: WanVAE
    frames: Tensor
    encoded: Tensor
    latents: Tensor
    decoded: Tensor


@pytest.fixture(scope="module", params=VERSIONS)
def whole(codecs: dict[str, WanVAE], request: pytest.FixtureRequest) -> Whole:
    codec = codecs[request.param]
    frames, latents = clip(codec.config, 5, 14, 1), latents_of(codec.config, 2, 29, 1)
    return Whole(codec, frames, codec.encode(frames), latents, codec.decode(latents, clamp=False))


@pytest.mark.parametrize(("tile", "stream"), [(None, False), (3, True), (5, False)])
def test_pieces_equal_the_whole(whole: Whole, tile: int | None, stream: bool) -> None:
    other = as_asked(whole.codec, tile, stream)
    torch.testing.assert_close(other.encode(whole.frames), whole.encoded, **CLOSE)
    assert 0.1 < float(whole.decoded.std()) < 10
    torch.testing.assert_close(other.decode(whole.latents, clamp=False), whole.decoded, **CLOSE)


def test_a_smaller_margin_would_show(whole: Whole, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pictures above are long enough, and the margins as narrow as may be, for an error of one cell to be seen."""
    for path in ("up", "down"):
        layers = getattr(whole.codec.config, path)
        less = tuple(replace(layer, margin=max(0, layer.margin - 1)) for layer in layers)
        monkeypatch.setattr(WanVAEConfig, path, less)
    other = as_asked(whole.codec, 3)
    for made, expected in (
        (other.encode(whole.frames), whole.encoded),
        (other.decode(whole.latents, clamp=False), whole.decoded),
    ):
        assert float((made - expected).abs().max()) > 10 * CLOSE["atol"]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("tile", [1, 2])
def test_tiles_in_both_directions(codecs: dict[str, WanVAE], version: str, tile: int) -> None:
    codec = codecs[version]
    other = as_asked(codec, tile)
    frames = clip(codec.config, 5, 3, 2)
    latents = codec.encode(frames)
    torch.testing.assert_close(other.encode(frames), latents, **CLOSE)
    decoded = codec.decode(latents, clamp=False)
    torch.testing.assert_close(other.decode(latents, clamp=False), decoded, **CLOSE)
    assert torch.equal(codec.decode(latents), decoded.clamp(-1, 1))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("tile", [None, 2])
def test_chunks_come_as_frames_of_one_then_four(codecs: dict[str, WanVAE], version: str, tile: int | None) -> None:
    codec = as_asked(codecs[version], tile)
    latents = latents_of(codec.config, 3, 3, 2)
    pieces = list(codec.decode_stream(latents))
    assert [piece.shape[2] for piece in pieces] == [1, 4, 4]
    assert all(piece.device.type == "cpu" and piece.dtype == torch.float32 for piece in pieces)
    assert torch.equal(torch.cat(pieces, dim=2), codec.decode(latents))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("length", [1, 5, 9])
def test_the_past_alone_decides(codecs: dict[str, WanVAE], version: str, length: int) -> None:
    """A frame alone, and a shorter clip, give what the longer clip gives there."""
    codec = codecs[version]
    frames = clip(codec.config, 9, 2, 3)
    steps = codec.config.geometry.steps(length)
    latents = codec.encode(frames)
    assert latents.shape == (1, codec.config.channels, 3, 2, 3)
    assert torch.equal(codec.encode(frames[:, :, :length]), latents[:, :, :steps])
    assert torch.equal(codec.decode(latents[:, :, :steps]), codec.decode(latents)[:, :, :length])


def test_batches_are_independent(codecs: dict[str, WanVAE]) -> None:
    codec = codecs["wan22"]
    frames = torch.cat([clip(codec.config, 5, 2, 2, seed) for seed in (1, 2)])
    latents = codec.encode(frames)
    for i in range(2):
        torch.testing.assert_close(codec.encode(frames[i : i + 1]), latents[i : i + 1], **CLOSE)
        torch.testing.assert_close(codec.decode(latents[i : i + 1]), codec.decode(latents)[i : i + 1], **CLOSE)


@pytest.mark.parametrize("version", VERSIONS)
def test_threads_share_one_module(codecs: dict[str, WanVAE], version: str) -> None:
    codec = codecs[version]
    clips = [clip(codec.config, length, 2, 3, seed) for seed, length in enumerate((5, 9, 5, 1))]

    def there_and_back(frames: Tensor) -> tuple[Tensor, Tensor]:
        latents = codec.encode(frames)
        return latents, codec.decode(latents)

    alone = [there_and_back(frames) for frames in clips]
    with ThreadPoolExecutor(len(clips)) as pool:
        together = list(pool.map(there_and_back, clips))
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


def test_gradients_pass_through_tiles(codecs: dict[str, WanVAE]) -> None:
    config = SMALL["wan22"]
    found = []
    for tile in (None, 2):
        codec = as_asked(codecs["wan22"], tile)
        frames = clip(config, 5, 3, 2).requires_grad_()
        codec.decode(codec.encode(frames), clamp=False).square().mean().backward()
        assert frames.grad is not None
        found.append(frames.grad)
    assert float(found[0].abs().max()) > 0
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-7)


def test_weights_of_two_bytes_give_float32(codecs: dict[str, WanVAE]) -> None:
    codec = codecs["wan21"]
    half = as_asked(codec, None).to(torch.bfloat16)
    frames = clip(codec.config, 5, 2, 2)
    latents, expected = half.encode(frames), codec.encode(frames)
    assert latents.dtype == half.decode(latents).dtype == torch.float32
    assert float((latents - expected).norm() / expected.norm()) < 0.05


# Memory


class Peak(TorchDispatchMode):
    """The most bytes that tensors made under it held at once, those known before aside."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known = {each.untyped_storage()._cdata for each in known}
        self.held: dict[int, tuple[StorageWeakRef, int]] = {}
        self.total = self.bytes = 0

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        made = func(*args, **(kwargs or {}))
        for each in [made] if isinstance(made, Tensor) else tree_leaves(made):
            if isinstance(each, Tensor):
                self._count(each.untyped_storage())
        if self.total > self.bytes:
            for key in [key for key, (reference, _) in self.held.items() if reference.expired()]:
                self.total -= self.held.pop(key)[1]
            self.bytes = max(self.bytes, self.total)
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        address = storage._cdata  # of no other storage as long as there is a reference to this one
        if address not in self.known and address not in self.held:
            self.held[address] = (StorageWeakRef(storage), storage.nbytes())
            self.total += storage.nbytes()


@dataclass(frozen=True)
class Call:
    """One encode or decode; size: frames, and rows and columns of latent cells."""

    way: str
    config: WanVAEConfig
    size: tuple[int, int, int]
    tile: int | None = None
    stream: bool = True
    dtype: torch.dtype = torch.bfloat16

    def counted(self) -> int:
        length, *cells = self.size
        height, width = (side * self.config.geometry.spatial_stride for side in cells)
        count = encode_bytes if self.way == "encode" else decode_bytes
        itemsize = self.dtype.itemsize
        return count(self.config, length, height, width, tile=self.tile, stream=self.stream, itemsize=itemsize)

    def measured(self, at: str = "meta") -> int:
        """On the meta device, where tensors have sizes and no numbers, in the time of a small picture."""
        length, *cells = self.size
        geometry = self.config.geometry
        if self.way == "encode":
            shape = (1, 3, length, *(side * geometry.spatial_stride for side in cells))
        else:
            shape = (1, geometry.channels, geometry.steps(length), *cells)
        with torch.device(at):
            codec = WanVAE(self.config, self.tile, self.stream).to(self.dtype).requires_grad_(False)
            x = torch.zeros(shape)
        with Peak(x, *codec.parameters()) as peak:
            result = getattr(codec, self.way)(x)
        return peak.bytes - result.nbytes


@pytest.mark.parametrize(("version", "way"), [("wan21", "encode"), ("wan22", "decode")])
def test_memory_of_numbers_is_that_of_sizes(version: str, way: str) -> None:
    call = Call(way, SMALL[version], (5, 2, 3), dtype=torch.float32)
    assert call.measured("cpu") == call.measured()


SETTINGS = (
    pytest.param(None, True, torch.bfloat16, id="whole"),
    pytest.param(20, True, torch.bfloat16, id="tiles", marks=pytest.mark.slow),
    pytest.param(20, False, torch.bfloat16, id="tiles-at-once", marks=pytest.mark.slow),
    pytest.param(50, True, torch.bfloat16, id="one-tile", marks=pytest.mark.slow),
    pytest.param(None, False, torch.float32, id="whole-at-once-float32", marks=pytest.mark.slow),
)


@pytest.mark.parametrize("way", ["encode", "decode"])
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("tile", "stream", "dtype"), SETTINGS)
def test_counted_memory_bounds_the_measured(
    version: str, way: str, tile: int | None, stream: bool, dtype: torch.dtype
) -> None:
    """At the published widths."""
    call = Call(way, VERSIONS[version], (9, 40, 12), tile, stream, dtype)
    measured = call.measured()
    assert measured <= call.counted() <= 1.3 * measured


@pytest.mark.parametrize("way", ["encode", "decode"])
def test_memory_falls_with_tiles(way: str) -> None:
    calls = [Call(way, WAN21_VAE, (1, 64, 4), tile) for tile in (None, 32, 16, 8)]
    counted = [call.counted() for call in calls]
    assert counted == sorted(counted, reverse=True)
    assert counted[-1] < 0.6 * counted[0]
    assert calls[1].measured() < 0.8 * calls[0].measured()


def test_memory_of_a_stream_does_not_grow_with_the_clip() -> None:
    sizes = [decode_bytes(WAN22_VAE, length, 704, 704) for length in (9, 121, 1201)]
    assert sizes[0] == sizes[1] == sizes[2]
    short, long = (decode_bytes(WAN22_VAE, length, 704, 704, stream=False) for length in (9, 121))
    assert short < long
    assert decode_bytes(WAN22_VAE, 121, 704, 704, batch=2) == pytest.approx(2 * sizes[0], abs=2)
    assert decode_bytes(WAN22_VAE, 121, 704, 704, itemsize=4) < 2 * sizes[0]
    assert 5.5 * GIB < sizes[0] < 5.9 * GIB
    assert 1.6 * GIB < decode_bytes(WAN22_VAE, 121, 704, 704, tile=22) < 1.9 * GIB


@pytest.mark.parametrize("config", VERSIONS.values(), ids=VERSIONS)
def test_a_larger_budget_gives_no_smaller_tile(config: WanVAEConfig) -> None:
    size = (121, 704, 1280)
    tiles = []
    for tenths in range(10, 200, 5):
        budget = tenths * GIB // 10
        tile = fit_tile(config, budget, *size)
        assert max(count(config, *size, tile=tile) for count in (encode_bytes, decode_bytes)) <= budget
        tiles.append(inf if tile is None else tile)
    assert all(one <= other for one, other in pairwise(tiles))
    assert tiles[0] < 40 < tiles[-1] == inf


def test_a_budget_that_nothing_fits_is_refused() -> None:
    with pytest.raises(RequestError) as caught:
        fit_tile(WAN22_VAE, GIB // 10, 121, 704, 1280)
    said = re.fullmatch(
        r"121 frames of 704 x 1280 need (\d\.\d\d) GiB in the video codec and there are 0\.10; "
        r"ask for a smaller or shorter clip",
        str(caught.value),
    )
    assert said is not None
    assert fit_tile(WAN22_VAE, int((float(said[1]) + 0.01) * GIB), 121, 704, 1280) is not None


# What is refused


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((1, 3, 2, 32, 32), "2 frames: the codec takes 1 + 4k; give 1 or 5"),
        ((1, 3, 0, 32, 32), "0 frames: the codec takes 1 + 4k; give 1"),
        ((1, 3, 120, 32, 32), "120 frames: the codec takes 1 + 4k; give 117 or 121"),
        ((1, 3, 5, 40, 50), "frames of 40 x 50: sides must be multiples of 16; give 32 x 48"),
        ((1, 3, 5, 0, 16), "frames of 0 x 16: sides must be multiples of 16; give 16 x 16"),
        ((1, 4, 5, 32, 32), "frames of shape [1, 4, 5, 32, 32]: the codec takes (B, 3, F, H, W)"),
        ((3, 5, 32, 32), "frames of shape [3, 5, 32, 32]: the codec takes (B, 3, F, H, W)"),
    ],
)
def test_frames_that_do_not_fit(codecs: dict[str, WanVAE], shape: tuple[int, ...], words: str) -> None:
    with pytest.raises(ShapeError) as caught:
        codecs["wan22"].encode(torch.zeros(shape))
    assert str(caught.value) == words


@pytest.mark.parametrize("shape", [(1, 16, 2, 3, 3), (48, 2, 3, 3), (1, 48, 0, 3, 3), (1, 48, 2, 0, 3)])
def test_latents_that_do_not_fit(codecs: dict[str, WanVAE], shape: tuple[int, ...]) -> None:
    words = f"latents of shape {list(shape)}: the codec takes (B, 48, G, h, w)"
    for call in (codecs["wan22"].decode, lambda x: next(codecs["wan22"].decode_stream(x))):
        with pytest.raises(ShapeError) as caught:
            call(torch.zeros(shape))
        assert str(caught.value) == words


def test_tiles_of_nothing_are_refused(codecs: dict[str, WanVAE]) -> None:
    codec = as_asked(codecs["wan21"], 0)
    for call, x in ((codec.encode, clip(codec.config, 1, 1, 1)), (codec.decode, latents_of(codec.config, 1, 1, 1))):
        with pytest.raises(ConfigError, match="tile: 0 latent cells per side; give 1 or more"):
            call(x)


@pytest.mark.parametrize(("size", "tile"), [(44, 22), (44, 7), (1, 5), (13, 1), (90, None)])
def test_parts_of_a_side(size: int, tile: int | None) -> None:
    parts = split(size, tile)
    assert [cell for start, stop in parts for cell in range(start, stop)] == list(range(size))
    lengths = [stop - start for start, stop in parts]
    assert max(lengths) <= (tile or size)
    assert max(lengths) - min(lengths) <= 1
