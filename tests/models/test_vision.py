"""CLIP's image tower against its formulas in Wan's published names, and the control latents of image-to-video."""

from __future__ import annotations

import gc
import json
import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from soundstage.core.errors import ShapeError, WeightsError
from soundstage.models import vision
from soundstage.models.vision import (
    CLIP_KEYS,
    VIT_H,
    ClipVision,
    ClipVisionConfig,
    image_control,
    image_then_gray,
    load_clip,
    prepare,
)
from soundstage.models.weights import shapes

WIDTH, HEADS, FFN, PATCH, SIZE, DEPTH = 160, 2, 48, 14, 42, 3


@pytest.fixture
def published() -> dict[str, Tensor]:
    """A tiny file in the published names, text half included."""
    make = torch.Generator().manual_seed(0)

    def normal(*shape: int, by: float = 0.1) -> Tensor:
        return torch.randn(*shape, generator=make) * by

    state = {
        "visual.patch_embedding.weight": normal(WIDTH, 3, PATCH, PATCH),
        "visual.cls_embedding": normal(1, 1, WIDTH, by=1.0),
        "visual.pos_embedding": normal(1, 1 + (SIZE // PATCH) ** 2, WIDTH, by=1.0),
        "visual.head": normal(WIDTH, 24),
        "textual.token_embedding.weight": normal(50, 8),
        "textual.head.0.weight": normal(8, 8),
        "log_scale": torch.tensor(2.0),
    }
    for norm in ("pre_norm", "post_norm"):
        state[f"visual.{norm}.weight"], state[f"visual.{norm}.bias"] = 1 + normal(WIDTH), normal(WIDTH)
    for i in range(DEPTH):
        block = f"visual.transformer.{i}"
        for norm in ("norm1", "norm2"):
            state[f"{block}.{norm}.weight"], state[f"{block}.{norm}.bias"] = 1 + normal(WIDTH), normal(WIDTH)
        rows = {"attn.to_qkv": (3 * WIDTH, WIDTH), "attn.proj": (WIDTH, WIDTH), "mlp.0": (FFN, WIDTH)}
        for part, (out, inner) in {**rows, "mlp.2": (WIDTH, FFN)}.items():
            state[f"{block}.{part}.weight"], state[f"{block}.{part}.bias"] = normal(out, inner), normal(out)
    return state


def by_formula(state: dict[str, Tensor], images: Tensor) -> Tensor:
    """The tokens that leave the last block but one, written out on the published names."""

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        unit = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return unit * state[f"{name}.weight"] + state[f"{name}.bias"]

    patches = images.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    x = patches @ state["visual.patch_embedding.weight"].flatten(1).T
    x = torch.cat([state["visual.cls_embedding"].expand(len(x), -1, -1), x], dim=1) + state["visual.pos_embedding"]
    x = norm(x, "visual.pre_norm")
    for i in range(DEPTH - 1):
        block = f"visual.transformer.{i}"
        joined = linear(norm(x, f"{block}.norm1"), f"{block}.attn.to_qkv").unflatten(-1, (3, HEADS, WIDTH // HEADS))
        q, k, v = (part.transpose(1, 2) for part in joined.unbind(2))
        weights = (q @ k.transpose(-1, -2) / (WIDTH / HEADS) ** 0.5).softmax(-1)
        x = x + linear((weights @ v).transpose(1, 2).flatten(2), f"{block}.attn.proj")
        h = linear(norm(x, f"{block}.norm2"), f"{block}.mlp.0")
        x = x + linear(h * (1 + torch.erf(h / 2**0.5)) / 2, f"{block}.mlp.2")
    return x


@pytest.fixture
def file(published: dict[str, Tensor], tmp_path: Path) -> Path:
    path = tmp_path / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
    torch.save(published, path)
    return path


def test_the_published_tower_has_its_size() -> None:
    with torch.device("meta"):
        tower = VIT_H.build()
    block = 4 * (1280 * 1280 + 1280) + 2 * 1280 * 5120 + 5120 + 1280 + 4 * 1280
    assert sum(p.numel() for p in tower.parameters()) == 31 * block + (3 * 14 * 14 + 1 + 257 + 2) * 1280
    assert VIT_H.num_tokens == 257


@torch.no_grad()
def test_tokens_are_those_of_the_formulas(published: dict[str, Tensor], file: Path) -> None:
    images = torch.rand(2, 3, 50, 70, generator=torch.Generator().manual_seed(1)) * 2 - 1
    made = ClipVision(file)(images)
    assert made.shape == (2, 1 + 9, WIDTH)
    torch.testing.assert_close(made, by_formula(published, prepare(images, SIZE)), rtol=2e-4, atol=2e-5)
    torch.testing.assert_close(ClipVision(file)(images[1:, :, None]), made[1:], rtol=1e-5, atol=1e-5)
    half = ClipVision(file, dtype=torch.bfloat16)(images)
    assert half.dtype == torch.bfloat16
    assert float((half.float() - made).norm() / made.norm()) < 0.03


def test_what_a_file_tells(published: dict[str, Tensor]) -> None:
    found = ClipVisionConfig.of({name: tuple(value.shape) for name, value in published.items()})
    assert found == ClipVisionConfig(WIDTH, DEPTH, HEADS, FFN, PATCH, SIZE)
    with pytest.raises(WeightsError, match=r"holds blocks\.0\.q, which is no CLIP image tower; give models_clip"):
        ClipVisionConfig.of({"blocks.0.q": (3, 4)})


def test_every_name_is_used_or_ignored(published: dict[str, Tensor]) -> None:
    used = {name for source in CLIP_KEYS(list(published)).values() for name in source.names}
    left = [name for name in published if name not in used]
    assert all(any(re.fullmatch(pattern, name) for pattern in vision.IGNORED) for name in left)
    assert {name.split(".")[0] for name in left} == {"visual", "textual", "log_scale"}
    assert [name for name in left if name.startswith("visual")] == [
        "visual.head",
        "visual.post_norm.weight",
        "visual.post_norm.bias",
    ]


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["vision_model.", ""], ids=["of a model", "bare"])
def test_a_hub_folder_is_the_same_tower(file: Path, tmp_path: Path, prefix: str) -> None:
    """A folder `image_encoder` as transformers writes it, its heads told by config.json."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=FFN,
        num_hidden_layers=DEPTH,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=PATCH,
        hidden_act="quick_gelu",
    )
    torch.manual_seed(0)
    whole = CLIPVisionModel(config).eval()
    folder = tmp_path / "image_encoder"
    folder.mkdir()
    told = {"num_attention_heads": 4, "hidden_act": "quick_gelu"}
    (folder / "config.json").write_text(json.dumps(told))
    save_file({prefix + name: value for name, value in whole.state_dict().items()}, folder / "model.safetensors")
    images = torch.rand(1, 3, 60, 40) * 2 - 1
    recorded = whole(prepare(images, SIZE), output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(ClipVision(folder)(images), recorded, rtol=1e-5, atol=1e-5)
    assert ClipVisionConfig.of(shapes(folder)) == ClipVisionConfig.of(shapes(file))


def test_prepare_is_a_plain_bicubic_resize() -> None:
    images = torch.full((1, 3, 30, 20), 0.5)
    wanted = [(0.75 - mean) / std for mean, std in zip(vision.MEAN, vision.STD, strict=True)]
    torch.testing.assert_close(prepare(images).mean((0, 2, 3)), torch.tensor(wanted))
    assert prepare(images).shape == (1, 3, 224, 224)
    ramp = torch.rand(1, 3, 224, 224) * 2 - 1
    mean, std = (torch.tensor(values)[:, None, None] for values in (vision.MEAN, vision.STD))
    torch.testing.assert_close(prepare(ramp), ((ramp + 1) / 2 - mean) / std)
    torch.testing.assert_close(
        prepare(ramp, 56), ((F.interpolate(ramp, (56, 56), mode="bicubic") + 1) / 2 - mean) / std
    )


def test_the_tower_goes_when_its_work_is_done(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = []

    def watched(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        model = load_clip(*args, **kwargs)
        built.append(weakref.ref(model))
        return model

    monkeypatch.setattr(vision, "load_clip", watched)
    image = torch.zeros(1, 3, 8, 8)
    gc.disable()
    try:
        ClipVision(file)(image)
        keeps = ClipVision(file, keep=True)
        assert torch.equal(keeps(image), keeps(image))
    finally:
        gc.enable()
    assert len(built) == 2
    assert built[0]() is None


def test_bad_input_is_one_sentence(file: Path, published: dict[str, Tensor], tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"none\.pth"):
        ClipVision(tmp_path / "none.pth")
    with pytest.raises(ShapeError, match=r"\(1, 3, 4, 8, 8\) is not \(B, 3, H, W\)"):
        ClipVision(file)(torch.zeros(1, 3, 4, 8, 8))
    torch.save({name: x for name, x in published.items() if "1.attn.to_qkv.bias" not in name}, file)
    with pytest.raises(WeightsError, match=r"3 missing \(encoder\.layers\.1\.self_attn"):
        ClipVision(file)(torch.zeros(1, 3, 8, 8))


def test_the_control_of_a_first_frame() -> None:
    image = torch.rand(2, 3, 6, 4)
    clip = image_then_gray(image, 9)
    assert clip.shape == (2, 3, 9, 6, 4)
    assert torch.equal(clip[:, :, 0], image)
    assert clip[:, :, 1:].abs().max() == 0
    assert torch.equal(image_then_gray(image[:, :, None], 9), clip)
    assert torch.equal(image_then_gray(image, 1)[:, :, 0], image)
    latents = torch.randn(2, 16, 3, 3, 2)
    control = image_control(latents)
    assert control.shape == (2, 20, 3, 3, 2)
    assert torch.equal(control[:, 4:], latents)
    assert control[:, :4].mean((0, 1, 3, 4)).tolist() == [1, 0, 0]
