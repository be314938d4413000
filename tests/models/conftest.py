"""Folders with every file of a published model, each under its own name and in its own format, at tiny widths."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

DATA = Path(__file__).resolve().parents[1] / "data"
WORDS = "a man says hello drums rain calm voice red ball rolls waves on the shore jitter bad hands robotic muffled"
T5, CLIP = "models_t5_umt5-xxl-enc-bf16.pth", "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"


def recorded(stem: str) -> dict[str, Tensor]:
    """The state dict of a recorded model, under its published names."""
    tensors = load_file(DATA / f"{stem}_public.safetensors")
    return {name.removeprefix("sd."): value for name, value in tensors.items() if name.startswith("sd.")}


def scattered(module: nn.Module, scale: float = 0.05) -> nn.Module:
    """The module with weights of which none is zero, so that every part of it is heard."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=scale)
    return module


def write_text_encoder(folder: Path) -> None:
    """umT5 under Wan's names and a tokenizer folder of whole words, for the 61 words of the recorded encoder."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    torch.save(recorded("umt5"), folder / T5)
    words = {word: index for index, word in enumerate(dict.fromkeys(["<pad>", "</s>", "<unk>", *WORDS.split()]))}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])  # type: ignore[assignment]
    tokenizer = folder / "google" / "umt5-xxl"
    tokenizer.mkdir(parents=True)
    made.save(str(tokenizer / "tokenizer.json"))
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "eos_token": "</s>"}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps({**described, "unk_token": "<unk>"}))


def write_clip(path: Path) -> None:
    """CLIP's image tower of 16 + 1 tokens, 160 wide, under Wan's names."""
    make = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embedding.weight": (160, 3, 14, 14),
        "cls_embedding": (1, 1, 160),
        "pos_embedding": (1, 17, 160),
        "head": (160, 24),
        **{f"{norm}.{kind}": (160,) for norm in ("pre_norm", "post_norm") for kind in ("weight", "bias")},
    }
    for block in ("transformer.0", "transformer.1"):
        shapes |= {f"{block}.{norm}.{kind}": (160,) for norm in ("norm1", "norm2") for kind in ("weight", "bias")}
        for part, (out, inner) in {"attn.to_qkv": (480, 160), "attn.proj": (160, 160), "mlp.0": (48, 160)}.items():
            shapes |= {f"{block}.{part}.weight": (out, inner), f"{block}.{part}.bias": (out,)}
        shapes |= {f"{block}.mlp.2.weight": (160, 48), f"{block}.mlp.2.bias": (160,)}
    torch.save({f"visual.{n}": torch.randn(*shape, generator=make) * 0.2 for n, shape in shapes.items()}, path)


@pytest.fixture(scope="session")
def ovi_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ovi, as its own downloader leaves it: the 5 s variant."""
    from soundstage.models.twin import OVI_ROPE_SCALE, TwinConfig, twin_published
    from soundstage.models.wan import WanConfig
    from soundstage.models.weights import save_weights

    root = tmp_path_factory.mktemp("ovi")
    for name in ("Ovi", "MMAudio/ext_weights", "Wan2.2-TI2V-5B"):
        (root / name).mkdir(parents=True)

    def tower(channels: int, patch: tuple[int, ...]) -> WanConfig:
        return WanConfig(128, 64, 1, 3, channels, channels, patch, text_width=24)

    twin = scattered(TwinConfig(tower(6, (1, 2, 2)), tower(5, (1,)), OVI_ROPE_SCALE).build())
    save_weights(twin.to(torch.bfloat16), root / "Ovi" / "model.safetensors", twin_published)
    torch.save(recorded("mmaudio_vae"), root / "MMAudio" / "ext_weights" / "v1-16.pth")
    torch.save({"generator": recorded("bigvgan")}, root / "MMAudio" / "ext_weights" / "best_netG.pt")
    torch.save(recorded("wan22_vae"), root / "Wan2.2-TI2V-5B" / "Wan2.2_VAE.pth")
    write_text_encoder(root / "Wan2.2-TI2V-5B")
    return root


@pytest.fixture(scope="session")
def wan_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """(published autoencoder's file, its record, denoiser's config) -> the folder of an original Wan repository."""
    from soundstage.models.wan import WanConfig
    from soundstage.models.weights import save_weights

    def write(vae: str, record: str, channels: int, **config: Any) -> Path:  # noqa: ANN401
        root = tmp_path_factory.mktemp("wan")
        model = scattered(WanConfig(128, 64, 1, 2, out_channels=channels, text_width=24, **config).build())
        save_weights(model, root / "diffusion_pytorch_model.safetensors", shard_bytes=300_000)
        torch.save(recorded(record), root / vae)
        write_text_encoder(root)
        if "image_width" in config:
            write_clip(root / CLIP)
        return root

    return write
