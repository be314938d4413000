"""Folders with the files of Ovi and Wan at tiny widths, prompts and clips."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

DATA = Path(__file__).resolve().parents[1] / "data"
WORDS = "a man says hello drums rain calm voice red ball rolls waves on the shore jitter bad hands robotic muffled"


def _recorded(stem: str) -> dict[str, Tensor]:
    """The state dict of a recorded model, under its published names."""
    tensors = load_file(DATA / f"{stem}_public.safetensors")
    return {name.removeprefix("sd."): value for name, value in tensors.items() if name.startswith("sd.")}


def _scattered(module: nn.Module) -> nn.Module:
    """The module with weights of which none is zero, so that every part of it is heard."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return module


def _write_text_encoder(folder: Path) -> None:
    """umT5 under Wan's names and a tokenizer of whole words, for the 61 words of the recorded encoder."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    torch.save(_recorded("umt5"), folder / "models_t5_umt5-xxl-enc-bf16.pth")
    words = {word: index for index, word in enumerate(dict.fromkeys(["<pad>", "</s>", "<unk>", *WORDS.split()]))}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])  # type: ignore[assignment]
    tokenizer = folder / "google" / "umt5-xxl"
    tokenizer.mkdir(parents=True)
    made.save(str(tokenizer / "tokenizer.json"))
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "eos_token": "</s>"}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps({**described, "unk_token": "<unk>"}))


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
        return WanConfig(128, 64, 1, 2, channels, channels, patch, text_width=24)

    twin = _scattered(TwinConfig(tower(6, (1, 2, 2)), tower(5, (1,)), OVI_ROPE_SCALE).build())
    save_weights(twin.to(torch.bfloat16), root / "Ovi" / "model.safetensors", twin_published)
    torch.save(_recorded("mmaudio_vae"), root / "MMAudio" / "ext_weights" / "v1-16.pth")
    torch.save({"generator": _recorded("bigvgan")}, root / "MMAudio" / "ext_weights" / "best_netG.pt")
    torch.save(_recorded("wan22_vae"), root / "Wan2.2-TI2V-5B" / "Wan2.2_VAE.pth")
    _write_text_encoder(root / "Wan2.2-TI2V-5B")
    return root


@pytest.fixture(scope="session")
def wan_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wan2.1 for text, in its original layout, its weights in shards."""
    from soundstage.models.codecs.wan_vae import WanVAEConfig
    from soundstage.models.wan import WanConfig
    from soundstage.models.weights import save_weights

    root = tmp_path_factory.mktemp("wan")
    vae = _recorded("wan21_vae")
    channels = WanVAEConfig.of({name: tuple(value.shape) for name, value in vae.items()}).channels
    model = _scattered(WanConfig(128, 64, 1, 2, channels, channels, text_width=24).build())
    save_weights(model, root / "diffusion_pytorch_model.safetensors", shard_bytes=300_000)
    torch.save(vae, root / "Wan2.1_VAE.pth")
    _write_text_encoder(root)
    return root


@pytest.fixture(scope="session")
def clips_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clips of five frames of 16 x 16, with captions."""
    from soundstage.media.clip import Clip

    root = tmp_path_factory.mktemp("clips")
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        frames = rng.integers(0, 255, (5, 16, 16, 3), dtype=np.uint8)
        Clip(frames=frames, fps=Fraction(16)).save(root / f"{name}.mp4")
        (root / f"{name}.txt").write_text("red ball rolls")
    return root


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("a man says <S>hello<E> <AUDCAP>calm voice<ENDAUDCAP>\n\ndrums rain <AUDCAP>drums<ENDAUDCAP>\n")
    return file


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Work in an empty folder, where caches of relative paths then lie."""
    before = Path.cwd()
    os.chdir(tmp_path)
    yield lambda name: tmp_path / name
    os.chdir(before)
