"""Wan2.1 and Wan2.2 (arXiv:2503.20314): one tower of Wan blocks as a Denoiser, under the published names.

The same class holds Ovi's audio tower where the patch of its config has one axis.
Shape letters: B batch, L tokens, F latent frames, H, W, C, A audio latent steps, D width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from soundstage.core.av import AV
from soundstage.core.causal import Chunking
from soundstage.core.conditions import Conditions
from soundstage.core.denoiser import StreamGeometry
from soundstage.core.errors import ConfigError, ModalityError, ShapeError, WeightsError
from soundstage.models.layers.wan_block import Skipping, WanBlock, skipping, through
from soundstage.models.layers.wan_ends import Ends, Latents, Order, initialise
from soundstage.models.weights import renamed

if TYPE_CHECKING:
    from soundstage.models.causal_wan import CausalWanConfig

HEAD = 128
"""Head width of every published model."""

SPAN = r"(.*\.)?span_embedding\..*"
"""Pattern of the names that a flow map has beside the published ones."""

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class WanConfig:
    """One tower. hidden: of the MLP. patch: latent cells per token, (F, H, W) for video, (A,) for audio.

    in_channels beyond out_channels are control latents (image-to-video: 4 of mask, 16 of image). frequencies: of the
    time embedding. text_length: rows of text, padded with zeros. image_width: of the reference image's features, None =
    the model reads none. time_scale: rotary positions per latent step. two_times: a flow map, also told r by an
    embedding of t - r, which published files lack (SPAN) and which starts at 0.
    """

    width: int
    hidden: int
    num_heads: int
    depth: int
    in_channels: int
    out_channels: int
    patch: tuple[int, ...] = (1, 2, 2)
    frequencies: int = 256
    text_width: int = 4096
    text_length: int = 512
    image_width: int | None = None
    eps: float = 1e-6
    time_scale: float = 1.0
    two_times: bool = False

    def __post_init__(self) -> None:
        if self.width % (2 * self.num_heads):
            raise ConfigError(
                f"num_heads: {self.num_heads} do not divide a width of {self.width} into even head widths"
            )
        if len(self.patch) not in (1, 3) or self.patch[0] != 1:
            raise ConfigError(f"patch: {self.patch} is neither (1, height, width) for video nor (1,) for audio")

    @property
    def modality(self) -> str:
        """The modality the tower denoises."""
        return "audio" if len(self.patch) == 1 else "video"

    @property
    def conv_hidden(self) -> int:
        """Channels inside the audio tower's gated convolution: 8/3 of the width, a multiple of 256."""
        return -(-(8 * self.width // 3) // 256) * 256

    @classmethod
    def of(
        cls,
        shapes: Shapes,
        *,
        num_heads: int | None = None,
        text_length: int = 512,
        eps: float = 1e-6,
        time_scale: float = 1.0,
    ) -> WanConfig:
        """The config of published tensors, from their names and shapes; diffusers' names are understood too.

        num_heads: None means heads of width 128. Raises WeightsError when the names are not Wan's.
        """
        if "condition_embedder.text_embedder.linear_1.weight" in shapes:
            keys = WAN_DIFFUSERS_KEYS(list(shapes))
            shapes = {ours: shapes[source.names[0]] for ours, source in keys.items()}
        audio = "patch_embedding.0.weight" in shapes
        first = "patch_embedding.0.weight" if audio else "patch_embedding.weight"
        ends = ("head.head.weight", "text_embedding.0.weight", "time_embedding.0.weight")
        needed = (first, *ends, "blocks.0.ffn.0.weight")
        absent = [name for name in needed if name not in shapes]
        if absent:
            raise WeightsError(f"these are not Wan's weights: {absent[0]} is missing; give a Wan checkpoint")
        width, in_channels, *kernel = shapes[first]
        patch = (1,) if audio else tuple(kernel)
        if num_heads is None and width % HEAD:
            raise WeightsError(f"a width of {width} is no multiple of heads of {HEAD}; say num_heads")
        image = shapes.get("img_emb.proj.0.weight")
        return cls(
            width=width,
            hidden=shapes["blocks.0.ffn.0.weight"][0],
            num_heads=num_heads or width // HEAD,
            depth=1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("blocks.")),
            in_channels=in_channels,
            out_channels=shapes["head.head.weight"][0] // math.prod(patch),
            patch=patch,
            frequencies=shapes["time_embedding.0.weight"][1],
            text_width=shapes["text_embedding.0.weight"][1],
            text_length=text_length,
            image_width=None if image is None else image[0],
            eps=eps,
            time_scale=time_scale,
            two_times="span_embedding.0.weight" in shapes,
        )

    def build(self) -> Wan:
        """The module, randomly initialised (for free under `torch.device("meta")`)."""
        return Wan(self)

    def as_flow_map(self) -> WanConfig:
        """The same told two times."""
        return replace(self, two_times=True)

    def as_causal(self, chunking: Chunking, geometry: AV[StreamGeometry]) -> CausalWanConfig:
        """The same made block-causal; geometry: of its codec."""
        from soundstage.models.causal_wan import CausalWanConfig

        return CausalWanConfig(**{**vars(self), "geometry": geometry, "chunking": chunking})

    def block(self, *, fused: bool = False) -> WanBlock:
        """One block; fused: it also reads another tower."""
        image = self.image_width is not None
        return WanBlock(self.width, self.hidden, self.num_heads, self.eps, image=image, fused=fused)


WAN21_T2V_1_3B = WanConfig(1536, 8960, 12, 30, in_channels=16, out_channels=16)
WAN21_T2V_14B = WanConfig(5120, 13824, 40, 40, in_channels=16, out_channels=16)
WAN21_I2V_14B = WanConfig(5120, 13824, 40, 40, in_channels=36, out_channels=16, image_width=1280)
WAN22_TI2V_5B = WanConfig(3072, 14336, 24, 30, in_channels=48, out_channels=48)

WAN_KEYS = renamed((r"\.modulation\.modulation$", ".modulation"))
"""Published Wan names, and those of one of Ovi's towers by itself, to ours."""

WAN_DIFFUSERS_KEYS = renamed(
    (r"^condition_embedder\.(time|text)_embedder\.linear_1\.", r"\1_embedding.0."),
    (r"^condition_embedder\.(time|text)_embedder\.linear_2\.", r"\1_embedding.2."),
    (r"^condition_embedder\.time_proj\.", "time_projection.1."),
    (r"^condition_embedder\.image_embedder\.norm1\.", "img_emb.proj.0."),
    (r"^condition_embedder\.image_embedder\.ff\.net\.0\.proj\.", "img_emb.proj.1."),
    (r"^condition_embedder\.image_embedder\.ff\.net\.2\.", "img_emb.proj.3."),
    (r"^condition_embedder\.image_embedder\.norm2\.", "img_emb.proj.4."),
    (r"^proj_out\.", "head.head."),
    (r"^scale_shift_table$", "head.modulation"),
    (r"\.scale_shift_table$", ".modulation"),
    (r"\.norm2\.", ".norm3."),
    (r"\.ffn\.net\.0\.proj\.", ".ffn.0."),
    (r"\.ffn\.net\.2\.", ".ffn.2."),
    (r"\.attn1\.", ".self_attn."),
    (r"\.attn2\.", ".cross_attn."),
    (r"_attn\.to_([qkv])\.", r"_attn.\1."),
    (r"_attn\.to_out\.0\.", "_attn.o."),
    (r"_attn\.add_([kv])_proj\.", r"_attn.\1_img."),
    (r"_attn\.norm_added_k\.", "_attn.norm_k_img."),
)
"""Names of diffusers' WanTransformer3DModel to ours."""


class Wan(Ends):
    """A Denoiser of one modality: video latents (B, C, F, H, W), or audio (B, C, A) by the config's patch.

    checkpointing: compute blocks again in the backward pass, in training and in evaluation mode alike.
    """

    def __init__(self, config: WanConfig) -> None:
        super().__init__(config)
        self.blocks = nn.ModuleList(config.block() for _ in range(config.depth))
        self.checkpointing = False
        initialise(self)

    def forward(
        self,
        x_t: AV[Tensor],
        t: AV[Tensor],
        cond: Conditions,
        *,
        r: AV[Tensor] | None = None,
        skip: tuple[int, ...] = (),
    ) -> AV[Tensor]:
        """Velocity noise - x0, from t to r the mean one; both (B,) or (B, F). skip: blocks left out (`skipping`)."""
        return self._denoise(x_t, t, cond, r, skip)

    def _denoise(
        self,
        x_t: AV[Tensor],
        t: AV[Tensor],
        cond: Conditions,
        r: AV[Tensor] | None,
        skip: tuple[int, ...],
        orders: AV[Order] | None = None,
    ) -> AV[Tensor]:
        """`forward`; orders: in chunks."""
        name = self.config.modality
        if x_t.modalities != (name,):
            given = " and ".join(x_t.modalities) or "nothing"
            raise ModalityError(f"this model denoises {name} alone, and was given {given}; use x_t.only({name!r})")
        check(cond, t, None if self.config.two_times else r, self.config.in_channels - self.config.out_channels)
        x = with_control(x_t[name], cond)
        ends = None if r is None else r[name]
        order = None if orders is None else orders[name]
        return AV(**{name: self.run(x, t[name], cond, r=ends, skip=skip, order=order).to(x_t[name].dtype)})

    @property
    def ends(self) -> AV[Ends]:
        """Both ends of its one tower."""
        return AV(**{self.config.modality: self})

    def run(
        self,
        x: Latents,
        t: Tensor,
        cond: Conditions,
        *,
        r: Tensor | None = None,
        skip: tuple[int, ...] = (),
        length: int | None = None,
        per_token: bool = False,
        order: Order | None = None,
    ) -> Latents:
        """The tower on latents with `in_channels` channels, or on a list of unbatched latents of several sizes.

        t, and r of a flow map: (B,), (B, F), or (B, L) with per_token. length: tokens to pad the sequence to. order:
        run in chunks.
        """
        tokens, side = self.enter(x, t, cond, length, per_token, r, order)
        for number, block in enumerate(self.blocks):
            if number not in skip:
                tokens, kv = through(block, self.checkpointing, tokens, side.told(number), side.kv[number])
                side.keep(number, kv)
        return self.leave(tokens, side, x)

    def skipping(self, blocks: Iterable[int]) -> Skipping:
        """The same model without these blocks, on the same weights."""
        return skipping(self, len(self.blocks), blocks)


def check(cond: Conditions, t: AV[Tensor], r: AV[Tensor] | None, control: int) -> None:
    """Raise ConfigError for what the model cannot be told; control: channels of control latents that it reads."""
    if r is not None and r is not t and any(r[name] is not t[name] for name in t.modalities):
        raise ConfigError("r: this model knows one time, not two; leave r out, or distil it into a flow map first")
    if cond.positions is not None:
        raise ConfigError('Conditions.positions: this model counts latent steps; take them out: cond.drop("positions")')
    if cond.control is None and control:
        raise ConfigError(
            f"Conditions.control: this image-to-video model needs {control} channels of control latents for the video "
            "(the mask, then the image's latents); give an image"
        )
    given = {} if cond.control is None else {name: x.shape[1] for name, x in cond.control.items()}
    if given != ({"video": control} if control else {}):
        takes = f"{control} channels of them for the video" if control else "none"
        raise ConfigError(
            f"Conditions.control: channels of control latents are {given}, and this model takes {takes}; "
            'take them out (cond.drop("control")) or load a model that reads them'
        )


def with_control(x: Tensor, cond: Conditions) -> Tensor:
    """Video latents with the control latents behind them on the channels."""
    if cond.control is None:
        return x
    control = cond.control["video"]
    if control.shape[0] != x.shape[0] or control.shape[2:] != x.shape[2:]:
        raise ShapeError(f"Conditions.control: {tuple(control.shape)} does not fit latents {tuple(x.shape)}")
    return torch.cat([x, control.to(x.dtype)], dim=1)


class Flops(NamedTuple):
    """Floating-point operations, two per multiply-add; attention: the part that is Q K and its product with V."""

    total: int
    attention: int


def flops(config: WanConfig, tokens: int, other: int = 0, image_tokens: int = 257, rows: int = 1) -> Flops:
    """Of one forward pass of one sample.

    other: tokens of the other tower that fused attention reads. rows: distinct time steps.
    """
    d, cells = config.width, math.prod(config.patch)
    embed = cells * config.in_channels * d
    if config.modality == "audio":
        embed = 7 * (config.in_channels * d + 3 * d * config.conv_hidden)
    seen = image_tokens if config.image_width is not None else 0
    keys = config.text_length + seen + other
    layer = tokens * (6 * d * d + 2 * d * config.hidden) + 2 * keys * d * d
    attention = 2 * d * tokens * (tokens + keys)
    ends = tokens * (embed + d * cells * config.out_channels) + config.text_length * d * (config.text_width + d)
    ends += rows * d * (config.frequencies + 7 * d) + seen * (config.image_width or 0) * ((config.image_width or 0) + d)
    total = ends + config.depth * (layer + attention)
    return Flops(2 * total, 2 * config.depth * attention)
