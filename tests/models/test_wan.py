"""One Wan tower: published names and sizes, diffusers' model, times, text, control, errors."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from soundstage.core import AV, Conditions, ConfigError, Guided, ModalityError, ShapeError, WeightsError
from soundstage.core.attention import Precise
from soundstage.models.wan import (
    WAN21_I2V_14B,
    WAN21_T2V_1_3B,
    WAN21_T2V_14B,
    WAN_DIFFUSERS_KEYS,
    WAN_KEYS,
    Wan,
    WanConfig,
    flops,
)

DATA = Path(__file__).parents[1] / "data"
CONFIG = WanConfig(32, 56, 2, 3, in_channels=6, out_channels=6, frequencies=32, text_width=24, text_length=12)
IMAGE = replace(CONFIG, in_channels=10, image_width=20)


def randomised(config: WanConfig) -> Wan:
    """A tower whose zero-initialised layers are random, so that nothing is trivially zero."""
    torch.manual_seed(0)
    model = config.build().eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    return model


@pytest.fixture(scope="module")
def model() -> Wan:
    return randomised(CONFIG)


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def video(*shape: int, seed: int = 1) -> AV[Tensor]:
    return AV(video=torch.randn(*shape, generator=torch.Generator().manual_seed(seed)))


def text(batch: int = 2, rows: int = 7) -> Conditions:
    return Conditions(text=video(batch, rows, 24, seed=2))


T = AV(video=torch.tensor([0.2, 0.9]))
X = video(2, 6, 3, 4, 6)


# Names and sizes


def published(name: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a full-size model."""
    listed = json.loads((DATA / "vace_full_size_keys.json").read_text())[name]
    found = dict(listed["keys"])
    for group, blocks in listed["blocks"].items():
        for i in range(blocks["count"]):
            found |= {f"{group}.{i}.{key}": shape for key, shape in blocks["each"].items()}
    return {key: tuple(shape) for key, shape in found.items()}


@pytest.mark.parametrize(
    ("name", "config"), [("t2v_1.3b", WAN21_T2V_1_3B), ("t2v_14b", WAN21_T2V_14B), ("i2v_14b", WAN21_I2V_14B)]
)
def test_the_full_size_names(name: str, config: WanConfig) -> None:
    shapes = published(name)
    assert WanConfig.of(shapes) == config
    with torch.device("meta"):
        model = config.build()
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == shapes
    assert {ours: source.names[0] for ours, source in WAN_KEYS(list(shapes)).items()} == {key: key for key in shapes}


def test_weights_of_another_model_are_refused() -> None:
    with pytest.raises(WeightsError, match=r"patch_embedding.weight is missing"):
        WanConfig.of({f"video_model.{name}": shape for name, shape in published("t2v_1.3b").items()})
    shapes = {name: tuple(value.shape) for name, value in CONFIG.build().state_dict().items()}
    with pytest.raises(WeightsError, match="say num_heads"):
        WanConfig.of(shapes)
    assert WanConfig.of(shapes, num_heads=2, text_length=12) == CONFIG


@pytest.mark.parametrize(
    "change", [{"num_heads": 3}, {"num_heads": 32}, {"patch": (1, 2)}, {"patch": (2, 2, 2)}], ids=str
)
def test_impossible_configs(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        replace(CONFIG, **change)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("image_width", [None, 20], ids=["t2v", "i2v"])
def test_equal_to_diffusers(image_width: int | None) -> None:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    theirs = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=6 if image_width is None else 10,
        out_channels=6,
        text_dim=24,
        freq_dim=32,
        ffn_dim=56,
        num_layers=2,
        image_dim=image_width,
        added_kv_proj_dim=None if image_width is None else 32,
    ).eval()
    for parameter in theirs.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    state = theirs.state_dict()
    config = WanConfig.of({name: tuple(value.shape) for name, value in state.items()}, num_heads=2)
    ours = config.build()
    ours.load_state_dict({name: state[source.names[0]] for name, source in WAN_DIFFUSERS_KEYS(list(state)).items()})
    cond = Conditions(text=video(2, 512, 24, seed=2))
    x, image = X["video"], None
    if image_width is not None:
        image = torch.randn(2, 5, image_width)
        cond = replace(cond, control=video(2, 4, 3, 4, 6, seed=3), reference=image)
        x = torch.cat([x, cond.control["video"]], dim=1)  # type: ignore[index]
    (expected,) = theirs(x, 1000 * T["video"], cond.text["video"], image, return_dict=False)  # type: ignore[index]
    torch.testing.assert_close(ours(X, T, cond)["video"], expected, rtol=1e-4, atol=1e-5)
    if image is None:
        frames = torch.tensor([[0.0, 0.3, 0.3], [0.0, 0.8, 0.8]])
        (expected,) = theirs(x, 1000 * frames.repeat_interleave(6, 1), cond.text["video"], return_dict=False)  # type: ignore[index]
        torch.testing.assert_close(ours(X, AV(video=frames), cond)["video"], expected, rtol=1e-4, atol=1e-5)


# Time


def test_one_time_or_one_per_frame(model: Wan) -> None:
    cond = text()
    out = model(X, T, cond)["video"]
    for steps in (1, 3):
        per_step = T["video"][:, None].repeat(1, steps)
        torch.testing.assert_close(model(X, AV(video=per_step), cond)["video"], out, rtol=1e-5, atol=1e-6)
    first_clean = T["video"][:, None].repeat(1, 3)
    first_clean[:, 0] = 0
    clean = model(X, AV(video=first_clean), cond)["video"]
    assert float((clean - out).abs().max()) > 1e-3
    tokens = first_clean.repeat_interleave(6, dim=1)
    torch.testing.assert_close(model.run(X["video"], tokens, cond, per_token=True), clean, rtol=1e-5, atol=1e-6)


def test_modulation_is_computed_once_per_row(model: Wan) -> None:
    rows = []
    hook = model.time_projection.register_forward_hook(lambda _m, _i, out: rows.append(tuple(out.shape)))
    model(X, T, text())
    model(X, AV(video=T["video"][:, None].repeat(1, 3)), text())
    hook.remove()
    assert rows == [(2, 1, 6 * 32), (2, 3, 6 * 32)]


# Text


def test_text_is_padded_with_zero_rows_that_are_read(model: Wan) -> None:
    cond = text()
    padded = Conditions(text=cond.text.map(lambda x: torch.cat([x, torch.zeros(2, 5, 24)], dim=1)))  # type: ignore[union-attr]
    assert torch.equal(model(X, T, cond)["video"], model(X, T, padded)["video"])
    noisy = padded.text.map(lambda x: torch.cat([x[:, :7], torch.full((2, 5, 24), math.nan)], dim=1))  # type: ignore[union-attr]
    mask = AV(video=(torch.arange(12) < 7).expand(2, 12))
    assert torch.equal(model(X, T, cond)["video"], model(X, T, Conditions(noisy, mask))["video"])
    nothing = Conditions(text=AV(video=torch.zeros(2, 12, 24)))
    assert torch.equal(model(X, T, Conditions())["video"], model(X, T, nothing)["video"])


def test_guidance_in_one_call_equals_two(model: Wan) -> None:
    cond, negative = text(), Conditions(text=video(1, 4, 24, seed=5))
    guided = Guided(model, negative, AV(video=4.0))(X, T, cond)["video"]
    strong = model(X, T, cond)["video"]
    weak = model(X, T, negative.map(lambda x: x.expand(2, *x.shape[1:])))["video"]
    torch.testing.assert_close(guided, strong + 3 * (strong - weak), rtol=1e-4, atol=1e-5)


# Image to video


def test_image_to_video_reads_control_and_reference() -> None:
    model = randomised(IMAGE)
    cond = replace(text(), control=video(2, 4, 3, 4, 6, seed=3), reference=torch.randn(2, 9, 20))
    out = model(X, T, cond)["video"]
    assert out.shape == X["video"].shape
    for change in ({"control": cond.control + 1}, {"reference": cond.reference[:, :5]}):  # type: ignore[operator, index]
        assert float((model(X, T, replace(cond, **change))["video"] - out).abs().max()) > 1e-4
    for group in ("control", "reference"):
        with pytest.raises(ConfigError, match=rf"Conditions\.{group}: this .*needs"):
            model(X, T, cond.drop(group))
    with pytest.raises(ConfigError, match="'video': 3"):
        model(X, T, replace(cond, control=video(2, 3, 3, 4, 6)))
    with pytest.raises(ShapeError, match="does not fit latents"):
        model(X, T, replace(cond, control=video(2, 4, 2, 4, 6)))
    with pytest.raises(ShapeError, match=r"is not \(B, R, 20\)"):
        model(X, T, replace(cond, reference=torch.randn(2, 9, 21)))


# Precision


@pytest.mark.parametrize("fp32", [True, False])
def test_bfloat16_is_near_float32(fp32: bool) -> None:
    exact, model = randomised(CONFIG), randomised(CONFIG).bfloat16()
    for part in model.modules():
        if isinstance(part, Precise):
            part.fp32 = fp32
    kinds = set()
    for block in model.blocks:
        block.register_forward_hook(lambda _m, _i, out: kinds.add(out[0].dtype))
    cond = text()
    out, expected = model(X, T, cond)["video"], exact(X, T, cond)["video"]
    assert out.dtype == torch.float32, "as the latents"
    assert model(X.to(torch.bfloat16), T, cond)["video"].dtype == torch.bfloat16
    assert kinds == {torch.float32 if fp32 else torch.bfloat16}
    assert float((out - expected).norm() / expected.norm()) < (0.02 if fp32 else 0.04)


# Training


def test_training_from_scratch_starts_at_zero_and_finite() -> None:
    torch.manual_seed(0)
    model = replace(CONFIG, width=128, hidden=256).build()
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    with torch.enable_grad():
        out = model(X, T, text())["video"]
        assert float(out.detach().abs().max()) == 0.0, "the head begins at zero"
        (out - X["video"]).square().mean().backward()
    assert float(model.head.head.weight.grad.abs().max()) > 0  # type: ignore[union-attr]
    assert float(model.text_embedding[0].weight.std()) == pytest.approx(0.02, rel=0.05)
    linear = model.blocks[0].ffn[0]  # type: ignore[union-attr, index]
    bound = math.sqrt(6 / (128 + 256))
    assert float(linear.weight.abs().max()) == pytest.approx(bound, rel=0.01)
    kernel = model.patch_embedding.weight
    assert float(kernel.abs().max()) == pytest.approx(math.sqrt(6 / (128 + 24)), rel=0.01)
    assert float(model.blocks[0].modulation.std()) == pytest.approx(128**-0.5, rel=0.1)  # type: ignore[arg-type]
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert all(float(m.bias.abs().max()) == 0 for m in linears)


# Errors


def test_what_the_model_cannot_be_told(model: Wan) -> None:
    cond = text()
    with pytest.raises(ModalityError, match="video alone, and was given video and audio"):
        model(X.replace(audio=torch.zeros(2, 5, 4)), T, cond)
    with pytest.raises(ConfigError, match="one time, not two"):
        model(X, T, cond, r=T * 0.5)
    model(X, T, cond, r=T)
    with pytest.raises(ConfigError, match=r'cond.drop\("positions"\)'):
        model(X, T, replace(cond, positions=AV(video=torch.zeros(2, 3))))
    with pytest.raises(ConfigError, match="takes none"):
        model(X, T, replace(cond, control=X))
    with pytest.raises(ConfigError, match=r'cond.drop\("reference"\)'):
        model(X, T, replace(cond, reference=torch.zeros(2, 3, 4)))
    with pytest.raises(ShapeError, match="have 5 channels and the model takes 6"):
        model(video(2, 5, 3, 4, 6), T, cond)
    with pytest.raises(ShapeError, match="do not divide into patches"):
        model(video(2, 6, 3, 5, 6), T, cond)
    with pytest.raises(ShapeError, match=r"latents are \(B, C, F, H, W\)"):
        model(video(2, 6, 3), T, cond)
    with pytest.raises(ShapeError, match=r"t.video: \(2, 4\) fits neither \(2,\) nor \(2, 3\)"):
        model(X, AV(video=torch.zeros(2, 4)), cond)
    with pytest.raises(ShapeError, match="up to 12 rows of 24 numbers"):
        model(X, T, text(rows=13))
    with pytest.raises(ShapeError, match="1 samples, and the latents have 2"):
        model(X, T, text(batch=1))
    with pytest.raises(ShapeError, match="does not hold 18"):
        model.run(X["video"], T["video"], cond, length=17)


def test_flops_of_a_plain_tower() -> None:
    """Counted by hand for one block: 6 square and 2 MLP products per token, 2 per row of text, and the attention."""
    one, two = (replace(CONFIG, depth=depth) for depth in (1, 2))
    layer = 2 * (10 * (6 * 32 * 32 + 2 * 32 * 56) + 12 * 2 * 32 * 32) + 4 * 32 * 10 * (10 + 12)
    assert flops(two, 10).total - flops(one, 10).total == layer
    assert flops(one, 10).attention == 4 * 32 * 10 * (10 + 12)
    counter = FlopCounterMode(display=False)
    x = video(1, 6, 3, 4, 6)
    with counter:
        CONFIG.build()(x, AV(video=torch.tensor([0.5])), text(1))
    counted = flops(CONFIG, 18)
    assert counter.get_total_flops() == counted.total - counted.attention, "the counter knows no attention on a CPU"
