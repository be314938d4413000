"""Ovi (arXiv:2510.01284): two Wan towers, video and audio, that read each other in every block.

A block of both towers is one module, so that sharding, compiling and checkpointing can wrap it. Names therefore differ
from the published ones: `video_model.blocks.0.ffn` is `blocks.0.video.ffn` here (TWIN_KEYS, twin_published).
Shape letters: B batch, L tokens, F latent frames, H, W, C, A audio latent steps, D width.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING

from torch import Tensor, nn

from soundstage.core.av import AV
from soundstage.core.causal import Chunking
from soundstage.core.conditions import Conditions
from soundstage.core.denoiser import StreamGeometry
from soundstage.core.errors import ConfigError, ModalityError, ShapeError, WeightsError
from soundstage.models.layers.wan_block import Other, Skipping, Stream, TextKV, WanBlock, skipping, through
from soundstage.models.layers.wan_ends import Ends, Latents, Order, initialise
from soundstage.models.wan import WAN22_TI2V_5B, Flops, Shapes, WanConfig, check
from soundstage.models.wan import flops as tower_flops
from soundstage.models.weights import renamed

if TYPE_CHECKING:
    from soundstage.models.causal_wan import CausalTwinConfig

RATES = AV(video=Fraction(24, 4), audio=Fraction(16000, 512))
"""Latent steps per second of the Wan2.2 and MMAudio 16 kHz autoencoders."""
OVI_ROPE_SCALE = 0.19676
"""The released constant, for clips of 5 s and 10 s alike: 31 video latents over the 157.552 of audio in 121/24 s."""


@dataclass(frozen=True)
class TwinConfig:
    """Two towers of one width and depth. rates: latent steps per second of each.

    audio_rope_scale: video latent steps per audio latent step in rotary positions; None = exactly those of the rates.
    """

    video: WanConfig
    audio: WanConfig
    audio_rope_scale: float | None = None
    rates: AV[Fraction] = RATES

    def __post_init__(self) -> None:
        if (self.video.modality, self.audio.modality) != ("video", "audio"):
            raise ConfigError("TwinConfig: video needs a patch of three axes and audio one of one axis")
        for name in ("width", "num_heads", "depth", "two_times"):
            ours, theirs = getattr(self.video, name), getattr(self.audio, name)
            if ours != theirs:
                raise ConfigError(f"{name}: {ours} in the video tower and {theirs} in the audio tower; make them equal")
        if self.video.image_width is not None or self.audio.image_width is not None:
            raise ConfigError("image_width: the twin model reads no reference image; leave it None")

    @property
    def towers(self) -> AV[WanConfig]:
        """Config of each tower, the audio tower's rotary scale filled in."""
        exact = float(self.rates["video"] / self.rates["audio"])
        scale = exact if self.audio_rope_scale is None else self.audio_rope_scale
        return AV(video=self.video, audio=replace(self.audio, time_scale=scale))

    @classmethod
    def of(
        cls,
        shapes: Shapes,
        *,
        num_heads: int | None = None,
        text_length: int = 512,
        eps: float = 1e-6,
        audio_rope_scale: float | None = OVI_ROPE_SCALE,
    ) -> TwinConfig:
        """The config of published Ovi tensors, from their names and shapes.

        num_heads: None means heads of width 128. Raises WeightsError when the names are not Ovi's.
        """
        towers = {}
        for name in ("video", "audio"):
            prefix = f"{name}_model."
            own = {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}
            fused = any(".cross_attn.k_fusion." in key for key in own)
            if not fused:
                raise WeightsError(
                    f"these are not Ovi's weights: {prefix}blocks.0.cross_attn.k_fusion.weight is missing; give Ovi's "
                    "model.safetensors"
                )
            towers[name] = WanConfig.of(own, num_heads=num_heads, text_length=text_length, eps=eps)
        return cls(**towers, audio_rope_scale=audio_rope_scale)

    def as_flow_map(self) -> TwinConfig:
        """The same told two times."""
        return replace(self, video=self.video.as_flow_map(), audio=self.audio.as_flow_map())

    def as_causal(self, chunking: Chunking, geometry: AV[StreamGeometry]) -> CausalTwinConfig:
        """The same made block-causal; geometry: of its codecs."""
        from soundstage.models.causal_wan import CausalTwinConfig

        return CausalTwinConfig(**{**vars(self), "geometry": geometry, "chunking": chunking})

    def build(self) -> Twin:
        """The module, randomly initialised (for free under `torch.device("meta")`)."""
        return Twin(self)


OVI = TwinConfig(
    video=WAN22_TI2V_5B,
    audio=replace(WAN22_TI2V_5B, in_channels=20, out_channels=20, patch=(1,)),
    audio_rope_scale=OVI_ROPE_SCALE,
)

TWIN_KEYS = renamed(
    (r"\.modulation\.modulation$", ".modulation"),
    (r"^(video|audio)_model\.blocks\.(\d+)\.", r"blocks.\2.\1."),
    (r"^(video|audio)_model\.", r"\1."),
)
"""Published Ovi names to ours."""

TWIN_WAN_KEYS = renamed((r"^(?!blocks\.)", "video."), (r"^blocks\.(\d+)\.", r"blocks.\1.video."))
"""Published Wan2.2 names to the video tower; `TWIN_WAN_OPTIONAL` is what such a file lacks."""

TWIN_WAN_OPTIONAL = (
    r"audio\..*",
    r"blocks\.\d+\.audio\..*",
    r"blocks\.\d+\.video\.cross_attn\.(k_fusion|v_fusion|pre_attn_norm_fusion|norm_k_fusion)\..*",
)
"""Patterns of our names that a Wan2.2 checkpoint does not hold: the audio tower and 7 fusion tensors a block."""


def twin_published(name: str) -> str:
    """The published name of one of ours; the inverse of TWIN_KEYS."""
    name = re.sub(r"^blocks\.(\d+)\.(video|audio)\.", r"\2_model.blocks.\1.", name)
    name = re.sub(r"^(video|audio)\.", r"\1_model.", name)
    return re.sub(r"(\.blocks\.\d+\.modulation)$", r"\1.modulation", name)


class FusedBlock(nn.Module):
    """One block of both towers. The video reads the audio, and the audio the video, as each is after self-attention."""

    def __init__(self, config: TwinConfig) -> None:
        super().__init__()
        self.video = config.video.block(fused=True)
        self.audio = config.audio.block(fused=True)

    def forward(
        self, x: dict[str, Tensor], streams: dict[str, Stream], kv: dict[str, TextKV | None]
    ) -> tuple[dict[str, Tensor], dict[str, TextKV]]:
        """Tokens of the modalities present after the block, and the keys and values of their texts.

        A tower that is alone runs without fusion. kv: as in WanBlock, None where not yet computed.
        """
        sides: dict[str, WanBlock] = {"video": self.video, "audio": self.audio}
        sides = {name: block for name, block in sides.items() if name in x}
        rows, among, out, used = {}, {}, {}, {}
        for name, block in sides.items():
            entered, rows[name] = block.enter(x[name], streams[name])
            among[name] = block.among(entered, rows[name], streams[name])
        for name, block in sides.items():
            reads = streams[name].reads_other
            others = [Other(among[n], streams[n].rotation, streams[n].lengths, reads) for n in sides if n != name]
            read, used[name] = block.across(among[name], streams[name], kv[name], *others)
            out[name] = block.think(read, rows[name], streams[name])
        return out, used


class Twin(nn.Module):
    """A Denoiser of video (B, C, F, H, W) and audio (B, C, A); either may be absent, and its tower then rests.

    checkpointing: compute blocks again in the backward pass, in training and in evaluation mode alike.
    """

    def __init__(self, config: TwinConfig) -> None:
        super().__init__()
        self.config = config
        towers = config.towers
        self.video, self.audio = Ends(towers["video"]), Ends(towers["audio"])
        self.blocks = nn.ModuleList(FusedBlock(config) for _ in range(config.video.depth))
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
        """Velocity noise - x0 of the present modalities; t per modality (B,) or (B, steps). skip: blocks left out."""
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
        two_times = self.config.video.two_times
        check(cond, t, None if two_times else r, control=0)
        return self.run(x_t, t, cond, r=r if two_times else None, skip=skip, orders=orders)

    @property
    def ends(self) -> AV[Ends]:
        """Both ends of each tower."""
        return AV(self.video, self.audio)

    def run(
        self,
        x: AV[Latents],
        t: AV[Tensor],
        cond: Conditions,
        *,
        r: AV[Tensor] | None = None,
        skip: tuple[int, ...] = (),
        lengths: AV[int] | None = None,
        per_token: bool = False,
        orders: AV[Order] | None = None,
    ) -> AV[Latents]:
        """The towers on latents, or on lists of unbatched latents of several sizes.

        t, and r of a flow map: per modality (B,), (B, steps), or (B, L) with per_token. lengths: tokens to pad each
        sequence to. orders: run in chunks.
        """
        if not x.modalities:
            raise ModalityError("x_t has no modality; give video, audio or both")
        ends = self.ends
        tokens, sides = {}, {}
        for name, latents in x.items():
            length = None if lengths is None else lengths[name]
            to = None if r is None else r[name]
            order = None if orders is None else orders[name]
            tokens[name], sides[name] = ends[name].enter(latents, t[name], cond, length, per_token, to, order)
        batches = {name: side.layout.batch for name, side in sides.items()}
        if len(set(batches.values())) > 1:
            raise ShapeError(f"samples of x_t: {batches}; give as many of each modality")
        for number, block in enumerate(self.blocks):
            if number not in skip:
                streams = {name: side.told(number) for name, side in sides.items()}
                held = {name: side.kv[number] for name, side in sides.items()}
                tokens, used = through(block, self.checkpointing, tokens, streams, held)
                for name, kv in used.items():
                    sides[name].keep(number, kv)
        return AV(**{name: ends[name].leave(tokens[name], sides[name], x[name]) for name in sides})

    def skipping(self, blocks: Iterable[int]) -> Skipping:
        """The same model without these blocks in both towers, on the same weights."""
        return skipping(self, len(self.blocks), blocks)


def flops(config: TwinConfig, tokens: AV[int], rows: int = 1) -> Flops:
    """Of one forward pass of one sample with so many tokens per modality (absent = that tower rests)."""
    parts = {}
    for name, count in tokens.items():
        other = sum(n for key, n in tokens.items() if key != name)
        parts[name] = tower_flops(config.towers[name], count, other, rows=rows)
    return Flops(sum(part.total for part in parts.values()), sum(part.attention for part in parts.values()))
