"""What Wan2.1 image-to-video is told of its first frame: tokens of CLIP's image tower, and the control latents.

The published tower is the visual half of OpenCLIP's xlm-roberta-large ViT-H/14: 32 blocks of width 1280, exact GELU,
images of 224 x 224, 257 tokens. The denoiser (arXiv:2503.20314) reads the tokens that leave the last block but one,
without the final norm. The last block is therefore neither built nor read.

Files: Wan's `models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth` (names `visual.*`; its text half is left alone),
or a hub folder `image_encoder` (names `vision_model.*`, heads and activation from its config.json).
Not checked: the published file itself was never at hand. The names, and the order query, key, value inside `to_qkv`,
were read in Wan's public source; the arithmetic is checked against formulas on a tiny tower. Wan runs it in float16.
Shape letters: B batch, R image tokens, D width, C latent channels, F latent frames, H, W pixels, h, w latent cells.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from soundstage.core.errors import ShapeError, WeightsError
from soundstage.core.extras import optional
from soundstage.models.weights import KeyMap, Source, load_weights, shapes, weight_files

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
IGNORED = (
    r"textual\..*",
    r"log_scale",
    r"visual\.head",
    r"text_model\..*",
    r"(visual|text)_projection\.weight",
    r"logit_scale",
    r"(visual|vision_model)\.post_.*",
    r"post_layernorm\..*",
    r"(vision_model\.)?embeddings\.position_ids",
)
"""Patterns of what a file holds beside the tower; the last block of the tower is left out by `load_clip`."""
HEAD_WIDTH = 80
_BLOCK = re.compile(r"(?:visual\.transformer|(?:vision_model\.)?encoder\.layers)\.(\d+)\..+")
_BLOCK_PARTS = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.proj": "self_attn.out_proj",
    "mlp.0": "mlp.fc1",
    "mlp.2": "mlp.fc2",
}


@dataclass(frozen=True)
class ClipVisionConfig:
    """Widths of a tower. depth: blocks of the published tower, of which the last is not built."""

    width: int = 1280
    depth: int = 32
    num_heads: int = 16
    ffn: int = 5120
    patch: int = 14
    size: int = 224
    activation: str = "gelu"

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, ...]]) -> ClipVisionConfig:
        """The widths that tensor names and shapes tell, in Wan's names or the hub's; heads are 80 wide, as in ViT-H.

        Raises WeightsError where they are not a CLIP image tower.
        """
        found = {ours: (source, shapes[source.names[0]]) for ours, source in CLIP_KEYS(list(shapes)).items()}
        depth = 1 + max((int(m[1]) for name in shapes if (m := _BLOCK.fullmatch(name))), default=-1)
        try:
            width, _, patch, _ = found["embeddings.patch_embedding.weight"][1]
            ffn = found["encoder.layers.0.mlp.fc1.weight"][1][0]
            tokens = found["embeddings.position_embedding.weight"][1][-2]
        except (KeyError, ValueError, IndexError) as error:
            some = ", ".join(list(shapes)[:3]) or "no tensor at all"
            raise WeightsError(
                f"image encoder: the file holds {some}, which is no CLIP image tower; give "
                "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth or a folder image_encoder"
            ) from error
        return cls(width, depth, max(1, width // HEAD_WIDTH), ffn, patch, patch * round((tokens - 1) ** 0.5))

    @property
    def num_tokens(self) -> int:
        """Tokens of one image: the class token and one per patch."""
        return 1 + (self.size // self.patch) ** 2

    def build(self) -> ClipTower:
        """The tower, randomly initialised; under `torch.device("meta")` it takes no memory."""
        return ClipTower(self)


VIT_H = ClipVisionConfig()


class ClipTower(nn.Module):
    """Images (B, 3, size, size), normalised -> tokens (B, R, D) before the last block. Names are transformers'."""

    def __init__(self, config: ClipVisionConfig) -> None:
        super().__init__()
        self.config = config
        transformers = optional("transformers", "models", "CLIPVisionModel")
        tower = transformers.CLIPVisionModel(
            transformers.CLIPVisionConfig(
                hidden_size=config.width,
                intermediate_size=config.ffn,
                num_hidden_layers=config.depth - 1,
                num_attention_heads=config.num_heads,
                image_size=config.size,
                patch_size=config.patch,
                hidden_act=config.activation,
            )
        )
        self.embeddings, self.pre_layrnorm, self.encoder = tower.embeddings, tower.pre_layrnorm, tower.encoder

    def forward(self, images: Tensor) -> Tensor:
        """The tokens that leave the last block but one."""
        return self.encoder(inputs_embeds=self.pre_layrnorm(self.embeddings(images))).last_hidden_state


def _keys(names: Sequence[str]) -> dict[str, Source]:
    found: dict[str, Source] = {}
    for name in names:
        if name.startswith("visual."):
            found |= _published(name)
        elif re.match(r"(vision_model\.)?(embeddings|pre_layrnorm|encoder)\.", name):
            found[name.removeprefix("vision_model.")] = Source((name,))
    return found


CLIP_KEYS: KeyMap = _keys
"""Key map of Wan's published names, and of the hub's, to `ClipTower`; a file may hold names in `IGNORED` besides."""


def _published(name: str) -> dict[str, Source]:
    """Where one of Wan's tensors goes."""
    block = re.fullmatch(r"visual\.transformer\.(\d+)\.(.+)\.(weight|bias)", name)
    if block is None:
        whole = {
            "visual.patch_embedding.weight": ("embeddings.patch_embedding.weight", None),
            "visual.cls_embedding": ("embeddings.class_embedding", torch.flatten),
            "visual.pos_embedding": ("embeddings.position_embedding.weight", partial(torch.squeeze, dim=0)),
            "visual.pre_norm.weight": ("pre_layrnorm.weight", None),
            "visual.pre_norm.bias": ("pre_layrnorm.bias", None),
        }
        return {whole[name][0]: Source((name,), whole[name][1])} if name in whole else {}
    layer, part, kind = f"encoder.layers.{block[1]}", block[2], block[3]
    if part == "attn.to_qkv":
        return {
            f"{layer}.self_attn.{letter}_proj.{kind}": Source((name,), partial(_third, index=index))
            for index, letter in enumerate("qkv")
        }
    return {f"{layer}.{_BLOCK_PARTS[part]}.{kind}": Source((name,))} if part in _BLOCK_PARTS else {}


def _third(joined: Tensor, index: int) -> Tensor:
    return joined.chunk(3)[index]


def prepare(images: Tensor, size: int = VIT_H.size) -> Tensor:
    """(B, 3, H, W) in [-1, 1] -> (B, 3, size, size) as CLIP takes it: bicubic, without antialiasing or cropping."""
    small = F.interpolate(images.float(), (size, size), mode="bicubic", align_corners=False)
    mean, std = (small.new_tensor(values)[:, None, None] for values in (MEAN, STD))
    return (small / 2 + 0.5 - mean) / std


class ClipVision:
    """Images (B, 3, H, W) or first frames (B, 3, 1, H, W) in [-1, 1] -> tokens (B, R, D), published 257 x 1280.

    weights: Wan's .pth, or a hub folder. keep: hold the tower for the next call; otherwise it goes as soon as its call
    is answered. Raises WeightsError where the weights are missing, partial or another model's.
    """

    def __init__(
        self,
        weights: Path,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        keep: bool = False,
    ) -> None:
        self.weights, self.device, self.dtype, self.keep = Path(weights), torch.device(device), dtype, keep
        self._model: ClipTower | None = None
        weight_files(self.weights)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """The tokens of each image, on this device and in this type. Raises ShapeError for another shape."""
        if images.ndim == 5 and images.shape[2] == 1:
            images = images[:, :, 0]
        if images.ndim != 4 or images.shape[1] != 3:
            raise ShapeError(f"image encoder: {tuple(images.shape)} is not (B, 3, H, W); give images without frames")
        if self._model is None:
            self._model = load_clip(self.weights, device=self.device, dtype=self.dtype)
        try:
            return self._model(prepare(images.to(self.device), self._model.config.size).to(self.dtype))
        finally:
            if not self.keep:
                self._model = None
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()


def load_clip(weights: Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> ClipTower:
    """The tower at a path, frozen. Raises WeightsError where it is missing, partial or of another model."""
    there = shapes(weights)
    config = _described(weights, ClipVisionConfig.of(there))
    with torch.device("meta"):
        model = config.build()
    last = (re.escape(name) for name in there if (m := _BLOCK.fullmatch(name)) and int(m[1]) == config.depth - 1)
    load_weights(model, weights, CLIP_KEYS, device=device, dtype=dtype, optional=(*IGNORED, *last), what="CLIP's tower")
    model.embeddings.position_ids = torch.arange(config.num_tokens, device=device)[None]
    return model.eval().requires_grad_(False)


def _described(weights: Path, config: ClipVisionConfig) -> ClipVisionConfig:
    """The heads and the activation of a hub folder's config.json, which no tensor tells."""
    path = (weights if weights.is_dir() else weights.parent) / "config.json"
    if not path.is_file():
        return config
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        heads, activation = told["num_attention_heads"], told["hidden_act"]
    except (ValueError, KeyError, TypeError):
        return config
    return replace(config, num_heads=int(heads), activation=str(activation))


def image_then_gray(image: Tensor, num_frames: int) -> Tensor:
    """(B, 3, H, W) or (B, 3, 1, H, W) in [-1, 1] -> (B, 3, num_frames, H, W): the image, then frames of value 0.

    The clip that the video autoencoder encodes for `image_control`.
    """
    first = image[:, :, None] if image.ndim == 4 else image
    return F.pad(first, (0, 0, 0, 0, 0, num_frames - 1))


def image_control(latents: Tensor) -> Tensor:
    """Latents (B, C, F, h, w) of `image_then_gray` -> control (B, 4 + C, F, h, w) of Wan2.1 image-to-video.

    The four channels before the latents are a mask, one per frame of a latent step: 1 on the first latent frame.
    """
    batch, _, length, height, width = latents.shape
    mask = latents.new_zeros(batch, 4, length, height, width)
    mask[:, :, 0] = 1
    return torch.cat([mask, latents], dim=1)
