"""The twin model: full-size names, modalities, times, batches of several sizes, memo, skipping, checkpointing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from soundstage.core import (
    AV,
    Conditions,
    ConfigError,
    Guided,
    Isolated,
    Known,
    ModalityError,
    ShapeError,
    WeightsError,
)
from soundstage.core.attention import Memo, Precise
from soundstage.models.twin import (
    OVI,
    RATES,
    TWIN_KEYS,
    TWIN_WAN_KEYS,
    TWIN_WAN_OPTIONAL,
    Twin,
    TwinConfig,
    flops,
    twin_published,
)
from soundstage.models.wan import WAN22_TI2V_5B, Wan, WanConfig
from soundstage.models.weights import check_weights, load_weights, save_weights

DATA = Path(__file__).parents[1] / "data"
VIDEO = WanConfig(32, 56, 2, 3, in_channels=6, out_channels=6, frequencies=32, text_width=24, text_length=12)
CONFIG = TwinConfig(VIDEO, replace(VIDEO, in_channels=5, out_channels=5, patch=(1,)))


def randomised(model: Twin | Wan) -> Twin | Wan:
    """The model with random values in its zero-initialised layers, so that nothing is trivially zero."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.eval()


@pytest.fixture(scope="module")
def built() -> Twin:
    torch.manual_seed(0)
    return randomised(CONFIG.build())


@pytest.fixture
def model(built: Twin) -> Iterator[Twin]:
    """The same weights for every test, its switches put back."""
    yield built
    built.checkpointing = False
    for part in built.modules():
        if isinstance(part, Memo):
            part.enabled = False
            part.forget()


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def latents(batch: int = 2, frames: int = 3, steps: int = 11, seed: int = 1) -> AV[Tensor]:
    return AV(video=noise(batch, 6, frames, 4, 6, seed=seed), audio=noise(batch, 5, steps, seed=seed + 1))


def text(batch: int = 2, rows: int = 7, seed: int = 5) -> Conditions:
    return Conditions(text=AV(video=noise(batch, rows, 24, seed=seed), audio=noise(batch, rows, 24, seed=seed + 1)))


X, COND = latents(), text()
T = AV(video=torch.tensor([0.2, 0.9]), audio=torch.tensor([0.2, 0.9]))


def close(mine: AV[Tensor], other: AV[Tensor], **tolerance: float) -> None:
    assert mine.modalities == other.modalities
    for name, value in mine.items():
        torch.testing.assert_close(value, other[name], **(tolerance or {"rtol": 1e-5, "atol": 2e-6}))


def equal(mine: AV[Tensor], other: AV[Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in mine.items())


def differs(mine: AV[Tensor], other: AV[Tensor], name: str) -> float:
    return float((mine[name] - other[name]).abs().max())


# Names and sizes


def published() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the full-size model."""
    listed = json.loads((DATA / "ovi_full_size_keys.json").read_text())["ovi_fusion"]
    found = {}
    for key, shape in listed["keys"].items():
        for i in range(listed["num_layers"] if ".blocks.0." in key else 1):
            found[key.replace(".blocks.0.", f".blocks.{i}.")] = tuple(shape)
    return found


def test_the_full_size_names() -> None:
    shapes = published()
    assert len(shapes) == 2073
    assert TwinConfig.of(shapes) == OVI
    with torch.device("meta"):
        model = OVI.build()
    ours = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    keys = TWIN_KEYS(list(shapes))
    assert {name: shapes[source.names[0]] for name, source in keys.items()} == ours
    assert {name: twin_published(name) for name in ours} == {name: source.names[0] for name, source in keys.items()}
    counts = {"video": 0, "audio": 0}
    for name, parameter in model.named_parameters():
        counts[twin_published(name).split("_")[0]] += parameter.numel()
    assert counts == {"video": 5_566_479_552, "audio": 6_094_273_556}
    assert sum(counts.values()) == 11_660_753_108


def test_a_wan_checkpoint_is_the_video_tower() -> None:
    with torch.device("meta"):
        ours, theirs = OVI.build().state_dict(), WAN22_TI2V_5B.build().state_dict()
    keys = TWIN_WAN_KEYS(list(theirs))
    assert {name: theirs[source.names[0]].shape for name, source in keys.items()} == {
        name: ours[name].shape for name in keys
    }
    video = [name for name in ours if name.startswith("video.") or ".video." in name]
    missing = [name for name in video if name not in keys]
    assert len(missing) == 210
    assert all(".cross_attn." in name and "fusion" in name for name in missing)


def test_files_load_and_are_written_back(model: Twin, tmp_path: Path) -> None:
    """In the published names; a Wan checkpoint fills the video tower alone, and either tower equals that model."""
    path = save_weights(model, tmp_path / "ovi.safetensors", twin_published)[0]
    with torch.device("meta"):
        again = CONFIG.build()
    load_weights(again, path, TWIN_KEYS)
    assert equal(again(X, T, COND), model(X, T, COND))
    wan = randomised(VIDEO.build())
    (path,) = save_weights(wan, tmp_path / "wan.safetensors")
    assert check_weights(again, path, TWIN_WAN_KEYS, TWIN_WAN_OPTIONAL).fits
    load_weights(again, path, TWIN_WAN_KEYS, optional=TWIN_WAN_OPTIONAL)
    alone = X.only("video"), T.only("video"), COND.only("video")
    assert equal(again(*alone), wan(*alone))


def test_weights_of_another_model_are_refused() -> None:
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in WAN22_TI2V_5B.build().state_dict().items()}
    with pytest.raises(WeightsError, match="these are not Ovi's weights"):
        TwinConfig.of(shapes)


def test_the_rotary_scale_follows_the_clock() -> None:
    assert OVI.towers["audio"].time_scale == 0.19676
    assert CONFIG.towers["audio"].time_scale == pytest.approx(6 / 31.25)
    faster = replace(CONFIG, rates=RATES.replace(audio=Fraction(44100, 1024)))
    assert faster.towers["audio"].time_scale == pytest.approx(6 * 1024 / 44100)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"audio": VIDEO}, "patch of three axes"),
        ({"audio": replace(CONFIG.audio, depth=2)}, "depth: 3 in the video tower and 2"),
        ({"video": replace(VIDEO, image_width=4)}, "image_width"),
    ],
)
def test_impossible_configs(change: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        replace(CONFIG, **change)


@pytest.mark.parametrize(
    ("video", "audio", "total", "attention"),
    [
        (15004, 157, 238, 88),
        (15810, 157, 255, 97),
        (27280, 157, 553, 283),
        (27900, 157, 572, 295),
        (54900, 314, 1678, 1134),
    ],
)
def test_flops_of_the_full_size(video: int, audio: int, total: int, attention: int) -> None:
    counted = flops(OVI, AV(video=video, audio=audio))
    assert counted.total / 1e12 == pytest.approx(total, rel=0.005)
    assert counted.attention / 1e12 == pytest.approx(attention, rel=0.006)


# Modalities and times


def test_the_towers_read_each_other_and_either_runs_alone(model: Twin) -> None:
    out = model(X, T, COND)
    assert {name: value.shape for name, value in out.items()} == {name: value.shape for name, value in X.items()}
    for name, other in (("video", "audio"), ("audio", "video")):
        changed = model(X.replace(**{other: X[other] + 1}), T, COND)
        assert differs(changed, out, name) > 1e-4
        alone = model(X.only(name), T.only(name), COND)
        assert alone.modalities == (name,)
        assert differs(alone, out, name) > 1e-4
        assert equal(alone, Isolated(model)(X, T, COND).only(name))
    with pytest.raises(ModalityError, match="no modality"):
        model(AV(), AV(), COND)
    with pytest.raises(ShapeError, match="as many of each"):
        one = AV(video=X["video"], audio=[X["audio"][0]])
        model.run(one, T.replace(audio=T["audio"][:1]), COND.only("video"))


def test_each_modality_has_its_own_time(model: Twin) -> None:
    out = model(X, T, COND)
    held = model(X, T.replace(audio=torch.zeros(2)), COND)
    assert min(differs(held, out, name) for name in ("video", "audio")) > 1e-4
    per_step = AV(video=T["video"][:, None].repeat(1, 3), audio=T["audio"][:, None].repeat(1, 11))
    close(model(X, per_step, COND), out)


def test_a_known_first_frame_is_a_time_per_frame(model: Twin) -> None:
    clean = latents(seed=8)
    mask = AV(video=torch.ones(2, 3), audio=torch.ones(2, 11))
    mask["video"][:, 0] = 0
    out = Known(model, clean, mask)(X, T, COND)
    x = X.replace(video=torch.cat([clean["video"][:, :, :1], X["video"][:, :, 1:]], dim=2))
    t = T.replace(video=torch.cat([torch.zeros(2, 1), T["video"][:, None].repeat(1, 2)], dim=1))
    plain = model(x, t, COND)
    torch.testing.assert_close(out["video"][:, :, 1:], plain["video"][:, :, 1:])
    torch.testing.assert_close(out["audio"], plain["audio"])


# Batches


def test_a_batch_equals_single_samples(model: Twin) -> None:
    out = model(X, T, COND)
    for i in range(2):
        one = model(
            X.map(lambda x, i=i: x[i : i + 1]),
            T.map(lambda t, i=i: t[i : i + 1]),
            COND.map(lambda x, i=i: x[i : i + 1]),
        )
        close(one, out.map(lambda x, i=i: x[i : i + 1]))


def test_guidance_in_one_call_equals_two(model: Twin) -> None:
    negative = text(1, rows=4, seed=9)
    guided = Guided(model, negative, AV(video=4.0, audio=3.0))(X, T, COND)
    strong, weak = model(X, T, COND), model(X, T, negative.map(lambda x: x.expand(2, *x.shape[1:])))
    close(guided, strong + AV(video=3.0, audio=2.0) * (strong - weak), rtol=1e-4, atol=1e-5)


def test_padding_changes_nothing(model: Twin) -> None:
    padded = model.run(X, T, COND, lengths=AV(video=23, audio=14))
    close(padded, model(X, T, COND))
    per_step = AV(video=torch.tensor([[0.0, 0.3, 0.3], [0.0, 0.8, 0.8]]), audio=T["audio"])
    close(model.run(X, per_step, COND, lengths=AV(video=23, audio=14)), model(X, per_step, COND))


def test_several_sizes_in_one_batch(model: Twin) -> None:
    """With a time per sample, and with one per frame."""
    samples = [latents(1), AV(video=noise(1, 6, 2, 6, 4, seed=3), audio=noise(1, 5, 7, seed=4))]
    x = AV(**{name: [sample[name][0] for sample in samples] for name in ("video", "audio")})
    for t in (T, T.replace(video=torch.tensor([[0.0, 0.3, 0.4], [0.0, 0.8, 0.0]]))):
        out = model.run(x, t, COND)
        for i, sample in enumerate(samples):
            own = t.map(lambda v, i=i: v[i : i + 1])
            if own["video"].ndim == 2:
                own = own.replace(video=own["video"][:, : sample["video"].shape[2]])
            alone = model(sample, own, COND.map(lambda v, i=i: v[i : i + 1]))
            close(AV(**{name: value[i][None] for name, value in out.items()}), alone)


def test_several_sizes_each_token_with_its_time(model: Twin) -> None:
    x = AV(video=[X["video"][0], noise(6, 2, 6, 4, seed=3)], audio=[X["audio"][0], X["audio"][1, :, :7]])
    t = AV(video=torch.rand(2, 18), audio=torch.rand(2, 11))
    out = model.run(x, t, COND, per_token=True)
    for i, (video, audio) in enumerate(zip(x["video"], x["audio"], strict=True)):
        one = AV(video=[video], audio=[audio])
        own = AV(video=t["video"][i : i + 1, : video.numel() // 24], audio=t["audio"][i : i + 1, : audio.shape[1]])
        alone = model.run(one, own, COND.map(lambda v, i=i: v[i : i + 1]), per_token=True)
        close(
            AV(**{name: value[i] for name, value in out.items()}),
            AV(**{name: value[0] for name, value in alone.items()}),
        )


def test_nothing_waits_for_the_device() -> None:
    """On the meta device there is no value to wait for."""
    with torch.device("meta"):
        empty = CONFIG.build()
    meta = AV(video=[torch.empty(6, 3, 4, 6, device="meta"), torch.empty(6, 2, 4, 4, device="meta")])
    t = torch.empty(2, 3, device="meta")
    out = empty.run(meta, AV(video=t), COND.only("video").to("meta"))
    assert [tuple(value.shape) for value in out["video"]] == [(6, 3, 4, 6), (6, 2, 4, 4)]
    mask = AV(video=torch.ones(2, 7, dtype=torch.bool), audio=torch.ones(2, 7, dtype=torch.bool))
    cond = replace(COND, text_mask=mask)
    dense = empty(X.to("meta"), T.replace(video=T["video"][:, None].repeat(1, 3)).to("meta"), cond.to("meta"))
    assert dense.map(lambda x: tuple(x.shape)).as_dict() == X.map(lambda x: tuple(x.shape)).as_dict()


# Switches


def test_the_memo_changes_nothing_but_the_work(model: Twin) -> None:
    counted: list[str] = []
    hooks = [
        part.register_forward_hook(lambda _m, _i, _o, name=name: counted.append(name))
        for name, part in model.named_modules()
        if name.endswith(("text_embedding", "cross_attn.k"))
    ]
    plain = model(X, T, COND)
    assert len(counted) == 2 + 2 * 3
    for part in model.modules():
        if isinstance(part, Memo):
            part.enabled = True
    counted.clear()
    outs = [model(X, T, COND) for _ in range(3)]
    assert len(counted) == 2 + 2 * 3
    weak = model.skipping((1,))
    other = text(seed=20)
    assert equal(weak(X, T, other), weak(X, T, other))
    assert equal(model(X, T, other), unmemoised(model, X, T, other))
    assert all(equal(out, plain) for out in outs)
    with torch.enable_grad():
        counted.clear()
        model(X, T, COND)
        assert len(counted) == 2 + 2 * 3, "off where gradients are recorded"
    for hook in hooks:
        hook.remove()


def unmemoised(model: Twin, x: AV[Tensor], t: AV[Tensor], cond: Conditions) -> AV[Tensor]:
    """The call on the same texts in other tensors, which no memo holds."""
    return model(x, t, cond.map(torch.clone))


def test_a_skipped_block_is_not_there(model: Twin) -> None:
    fewer = CONFIG.build().eval()
    fewer.load_state_dict(model.state_dict())
    for blocks in ((0,), (1, 2)):
        weak = model.skipping(blocks)
        fewer.blocks = nn.ModuleList(block for i, block in enumerate(model.blocks) if i not in blocks)
        assert equal(weak(X, T, COND), fewer(X, T, COND))
    guided = Guided(model, text(2, seed=9), AV(video=4.0, audio=3.0), weak=model.skipping((1,)))(X, T, COND)
    assert differs(guided, model(X, T, COND), "audio") > 1e-3
    with pytest.raises(ConfigError, match="there is no block 3; the blocks are 0 to 2"):
        model.skipping((1, 3))


def test_checkpointing_computes_again_and_gives_the_same_gradients(model: Twin) -> None:
    calls: list[int] = []
    hook = model.blocks[0].video.ffn.register_forward_hook(lambda *_: calls.append(1))  # type: ignore[union-attr]
    grads = []
    for on in (False, True):
        model.checkpointing = on
        model.zero_grad()
        with torch.enable_grad():
            sum(value.square().mean() for value in model(X, T, COND).values()).backward()  # type: ignore[union-attr]
        grads.append([p.grad.clone() for p in model.parameters()])  # type: ignore[union-attr]
    hook.remove()
    model.zero_grad()
    assert len(calls) == 3
    assert all(float(g.abs().max()) > 0 for g in grads[0])
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("fp32", [True, False])
def test_bfloat16_is_near_float32(model: Twin, fp32: bool) -> None:
    half = CONFIG.build().eval()
    half.load_state_dict(model.state_dict())
    half.bfloat16()
    for part in half.modules():
        if isinstance(part, Precise):
            part.fp32 = fp32
    exact, out = model(X, T, COND), half(X, T, COND)
    for name, value in out.items():
        assert value.dtype == torch.float32, "as the latents"
        assert float((value - exact[name]).norm() / exact[name].norm()) < (0.02 if fp32 else 0.04)


def test_fusion_begins_small_in_both_towers() -> None:
    torch.manual_seed(0)
    model = CONFIG.build()
    for block in model.blocks:
        for tower in (block.video, block.audio):
            bound = (6 / 64) ** 0.5
            assert float(tower.cross_attn.v.weight.abs().max()) == pytest.approx(bound, rel=0.02)
            for layer in (tower.cross_attn.k_fusion, tower.cross_attn.v_fusion):
                assert float(layer.weight.abs().max()) == pytest.approx(bound / 10, rel=0.02)
                assert float(layer.bias.abs().max()) == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_blocks_compile_whole(model: Twin) -> None:
    """One graph serves every block: no break, and no graph per block."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    plain = model(X, T, COND)
    compiled = CONFIG.build().eval()
    compiled.load_state_dict(model.state_dict())
    for block in compiled.blocks:
        block.compile(fullgraph=True)
    close(compiled(X, T, COND), plain, rtol=1e-5, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1
    close(compiled(X, T, COND), plain, rtol=1e-5, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.gpu
def test_nothing_waits_for_a_real_device(model: Twin) -> None:
    """Where CUDA itself reports every wait; numbers are the CPU's."""
    cuda = CONFIG.build().eval()
    cuda.load_state_dict(model.state_dict())
    cuda.cuda()
    mask = AV(video=torch.ones(2, 7, dtype=torch.bool), audio=torch.ones(2, 7, dtype=torch.bool))
    per_frame = T.replace(video=torch.tensor([[0.0, 0.3, 0.3], [0.0, 0.8, 0.8]]))
    cond, ragged = replace(COND, text_mask=mask), X.map(lambda x: [x[0], x[1, :, :2]])
    there = X.to("cuda"), per_frame.to("cuda"), cond.to("cuda")
    there_ragged = ragged.map(lambda xs: [x.cuda() for x in xs])
    cuda(*there)
    torch.cuda.set_sync_debug_mode("error")
    try:
        out, several = cuda(*there), cuda.run(there_ragged, *there[1:])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    close(out.to("cpu"), model(X, per_frame, cond), rtol=1e-3, atol=1e-4)
    for name, parts in model.run(ragged, per_frame, cond).items():
        for mine, expected in zip(several[name], parts, strict=True):
            torch.testing.assert_close(mine.cpu(), expected, rtol=1e-3, atol=1e-4)
