"""Ovi and Wan as systems, from a folder with their published files: checked at once, loaded as late as possible.

Headers alone tell whether the files fit, so a wrong folder is refused before anything large is read. The text encoder
is loaded for the prompts of a request and goes before the denoiser comes; the autoencoders come when they are needed.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from soundstage.core.av import AV
from soundstage.core.conditions import Conditions
from soundstage.core.denoiser import Denoiser, StreamGeometry
from soundstage.core.errors import Caution, RequestError
from soundstage.core.system import Deferred, DeferredCausal, Prepare, Sampling, System
from soundstage.models.codecs.mmaudio import MMAudioConfig
from soundstage.models.codecs.wan_vae import WanVAE, WanVAEConfig
from soundstage.models.codecs.wan_vae_memory import fit_tile
from soundstage.models.ovi_forms import RECOMMENDED, VARIANTS, Sizes, Variant, check_prompt, snap
from soundstage.models.published import IMAGE, PICTURE, SOUND, TEXT, TOKENIZER, VOCODER, Found
from soundstage.models.student import Student, read_student
from soundstage.models.text.umt5 import UMT5Config, UMT5Text
from soundstage.models.twin import TwinConfig
from soundstage.models.vision import ClipVision, image_control, image_then_gray
from soundstage.models.wan import WanConfig
from soundstage.models.zoo import locate, published

START = 0.999  # first level of the published grids, before the shift
SMALLEST_TILE = 4  # latent cells per side
SLG = 11  # the block that Ovi leaves out of its negative prediction
UNTRAINED = (
    "the released weights were trained to make both modalities together from noise at one level, so this is out of "
    "distribution: look and listen before you use it"
)
OVI_NEGATIVE = AV("jitter, bad hands, blur, distortion", "robotic, muffled, echo, distorted")
WAN_NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，"  # noqa: RUF001
    "低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，"  # noqa: RUF001
    "毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"  # noqa: RUF001
)
"""The published one: garish, overexposed, static, blurred, subtitles, worst quality, extra fingers and so on."""


def load_ovi(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype | None = None,
    *,
    name: str = "ovi",
    prepare: Prepare | None = None,
) -> System:
    """Ovi from a folder laid out as its own downloader leaves it, or flat. dtype: of the denoiser, default bfloat16.

    Raises WeightsError, before anything large is read, for a file that is missing, partial or another model's.
    """
    found = locate(published(name), folder)
    denoiser = next(iter(found.values()))
    variant = next(each for each in VARIANTS.values() if each.file == denoiser.path.name)
    config = TwinConfig.of(denoiser.shapes())
    codec = LateCodec(AV(video=_picture(found[PICTURE], device), audio=_sound(found, device)))
    student = read_student(denoiser.path)
    backbone = _backbone(config, denoiser, device, dtype or torch.bfloat16, prepare, student, codec.geometry)
    stride = codec.geometry["video"].spatial_stride
    height, width = snap(1, 1, variant.area)
    own = AV(
        video=(config.video.out_channels, variant.video_latents, height // stride, width // stride),
        audio=(config.audio.out_channels, variant.audio_latents),
    )
    cautious = ("t2v", "t2a", "a2v", "v2a", "extension", "inpaint", "edit")
    system = System(
        name=f"ovi-{variant.name.replace('_', '-')}",
        denoiser=WholeTimesteps(backbone),
        codec=codec,
        encode_text=_text(found, device, ("video", "audio")),
        sampling=Sampling(
            "unipc",
            50,
            AV(5.0, 5.0),
            AV(4.0, 3.0),
            start=START,
            negative=OVI_NEGATIVE,
            skip_layer=SLG if config.video.depth > SLG else None,
        ),
        modalities=("video", "audio"),
        shape=own,
        info={"name": name, "variant": variant.name, "audio_channels": 1},
        form=_Form(variant),
        skipping=_skipping(backbone, config.video.depth),
        sizes=Sizes(variant.area, recommended=RECOMMENDED[variant.name]),
        other_lengths=_others(variant),
        cautions=dict.fromkeys(cautious, UNTRAINED),
        activation_bytes=lambda shape: sum(
            _activations(each, config.towers[modality]) for modality, each in shape.items()
        ),
    )
    return _student(system, student, backbone)


def load_wan(
    folder: Path, device: torch.device, dtype: torch.dtype | None = None, *, name: str, prepare: Prepare | None = None
) -> System:
    """Wan2.1 or Wan2.2 5B from its original files or a diffusers folder. dtype: of the denoiser, default bfloat16.

    Raises WeightsError, before anything large is read, for a file that is missing, partial or another model's.
    """
    found = locate(published(name), folder)
    denoiser = next(iter(found.values()))
    config = WanConfig.of(denoiser.shapes())
    codec = LateCodec(AV(video=_picture(found[PICTURE], device)))
    student = read_student(denoiser.path)
    backbone = _backbone(config, denoiser, device, dtype or torch.bfloat16, prepare, student, codec.geometry)
    geometry = codec.geometry["video"]
    rules = WAN_RULES[name]
    height, width = rules.size
    told = IMAGE in found
    system = System(
        name=name,
        denoiser=WholeTimesteps(backbone),
        codec=codec,
        encode_text=_text(found, device, ("video",)),
        sampling=Sampling(
            "unipc",
            rules.steps,
            AV(video=rules.shift, audio=rules.shift),
            AV(video=rules.guidance, audio=1.0),
            start=START,
            negative=AV(WAN_NEGATIVE, ""),
        ),
        modalities=("video",),
        shape=AV(
            video=(
                config.out_channels,
                geometry.steps(rules.frames),
                height // geometry.spatial_stride,
                width // geometry.spatial_stride,
            )
        ),
        info={"name": name},
        skipping=_skipping(backbone, config.depth),
        sizes=Sizes(height * width, 2 * geometry.spatial_stride),
        needs=("image",) if told else (),
        encode_image=_first_frame(found[IMAGE], codec, device) if told else None,
        activation_bytes=lambda shape: _activations(shape["video"], config),
    )
    return _student(system, student, backbone)


def _student(system: System, student: Student | None, backbone: Denoiser) -> System:
    """The system with a student's way of sampling; a student knows fractions of thousandths, as it was trained."""
    if student is None:
        return system
    info = {**system.info, "student": student.name, "base": student.base}
    return replace(system, name=student.name, denoiser=backbone, sampling=student.sampling, skipping=None, info=info)


@dataclass(frozen=True)
class WanRules:
    """How a Wan model is sampled by its publishers: (height, width), frames, steps, time shift and guidance."""

    size: tuple[int, int]
    frames: int
    steps: int
    shift: float
    guidance: float


_480P, _720P = (480, 832), (720, 1280)
WAN_RULES: Mapping[str, WanRules] = {
    "wan2.2-5b": WanRules((704, 1280), 121, 50, 5.0, 5.0),
    "wan2.1-t2v-1.3b": WanRules(_480P, 81, 50, 5.0, 5.0),
    "wan2.1-t2v-14b": WanRules(_720P, 81, 50, 5.0, 5.0),
    "wan2.1-i2v-14b-480p": WanRules(_480P, 81, 40, 3.0, 5.0),
    "wan2.1-i2v-14b-720p": WanRules(_720P, 81, 40, 5.0, 5.0),
}


@dataclass(frozen=True, eq=False)
class WholeTimesteps:
    """A denoiser told its time in whole thousandths, rounded down, as the published samplers tell Wan and Ovi.

    The sampler's own levels stay as they are (Wan's UniPC truncates the timestep and not the sigma).
    """

    denoiser: Denoiser

    def __call__(self, x_t: AV[Tensor], t: AV[Tensor], cond: Conditions, *, r: AV[Tensor] | None = None) -> AV[Tensor]:
        whole = t.map(lambda level: torch.floor(level.double() * 1000 + 1e-6).div(1000).to(level.dtype))
        return self.denoiser(x_t, whole, cond, r=whole if r is t else r)


Tile = int | str | None
"""Latent cells per side of the tiles in which pictures are coded; None = whole, "auto" = by the memory there is."""


class Late:
    """One modality's autoencoder, loaded when it is first used. tune: what to do to it before it codes media."""

    def __init__(
        self,
        geometry: StreamGeometry,
        load: Callable[[], nn.Module],
        tune: Callable[[Any, Sequence[int], Tile], None] = lambda *_: None,
    ) -> None:
        self.geometry, self._load, self._tune = geometry, load, tune
        self._loaded: nn.Module | None = None

    def ready(self, shape: Sequence[int], tile: Tile) -> Any:  # noqa: ANN401
        """The autoencoder itself, for media of that shape."""
        if self._loaded is None:
            self._loaded = self._load().eval().requires_grad_(False)
        self._tune(self._loaded, shape, tile)
        return self._loaded

    def media_shape(self, latents: Sequence[int]) -> tuple[int, ...]:
        """Shape of the media that latents (B, C, steps, ...) stand for, the channels aside."""
        side = self.geometry.spatial_stride
        return latents[0], 3, self.geometry.length(latents[2]), *(side * n for n in latents[3:])


class LateCodec:
    """A Codec of autoencoders that are loaded when first used; see Tile."""

    def __init__(self, streams: AV[Late]) -> None:
        self.streams = streams
        self.geometry = streams.map(lambda stream: stream.geometry)
        self.tile: Tile = "auto"

    @torch.no_grad()
    def encode(self, media: AV[Tensor]) -> AV[Tensor]:
        """Media to latents."""
        streams = self.streams.only(*media.modalities)
        return media.map(lambda x, stream: stream.ready(x.shape, self.tile).encode(x), streams)

    @torch.no_grad()
    def decode(self, latents: AV[Tensor]) -> AV[Tensor]:
        """Latents to media in host memory, piece by piece; sound in whole latent steps, to be cut by the clock."""

        def pieces(x: Tensor, stream: Late) -> Tensor:
            ready = stream.ready(stream.media_shape(x.shape), self.tile)
            return torch.cat([piece.cpu() for piece in ready.decode_stream(x)], dim=2)

        return latents.map(pieces, self.streams.only(*latents.modalities))


def _backbone(
    config: Any,  # noqa: ANN401
    found: Found,
    device: torch.device,
    dtype: torch.dtype,
    prepare: Prepare | None,
    student: Student | None,
    geometry: AV[StreamGeometry],
) -> Deferred:
    """The denoiser to come, a causal student's in its causal form; the file is held against the config now."""
    if student is not None and student.causal is not None:
        config = config.as_causal(student.causal, geometry)
    with torch.device("meta"):
        found.check(config.build()).demand(f"the {found.part.role}")

    def build() -> Denoiser:
        with torch.device("meta"):
            module = config.build()
        found.load(module, dtype=dtype)
        module = module.eval().requires_grad_(False)
        return module.to(device) if prepare is None else prepare(module, device)

    if student is not None and student.causal is not None:
        chunking = student.causal
        return DeferredCausal(build, lambda steps: chunking.chunks(geometry, steps))  # type: ignore[arg-type]
    return Deferred(build)


def _skipping(backbone: Deferred, depth: int) -> Callable[[tuple[int, ...]], Denoiser]:
    def without(blocks: tuple[int, ...]) -> Denoiser:
        for block in blocks:
            if not 0 <= block < depth:
                raise RequestError(f"skip_layer: {block} is not from 0 to {depth - 1}, the blocks of this model")
        return WholeTimesteps(Deferred(lambda: backbone.get().skipping(blocks)))  # type: ignore[attr-defined]

    return without


def _picture(found: Found, device: torch.device) -> Late:
    """The video autoencoder: float32 on a CPU, bfloat16 on a GPU."""
    config = WanVAEConfig.of(found.shapes())
    with torch.device("meta"):
        found.check(config.build()).demand(f"the {found.part.role}")

    def load() -> nn.Module:
        with torch.device("meta"):
            module = config.build()
        found.load(module, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
        return module

    return Late(config.geometry, load, _tiles)


def _tiles(module: WanVAE, shape: Sequence[int], tile: Tile) -> None:
    if tile != "auto":
        module.tile = int(tile) if tile is not None else None
        return
    weight = module.post_quant_conv.weight
    free = torch.cuda.mem_get_info(weight.device)[0] if weight.is_cuda else _free_memory()
    batch, _, length, height, width = shape
    try:
        module.tile = fit_tile(
            module.config, free // 2, length, height, width, itemsize=weight.element_size(), batch=batch
        )
    except RequestError:  # an estimate: what was made is not thrown away for it
        module.tile = SMALLEST_TILE


def _free_memory() -> int:
    """Bytes of host memory that nothing uses."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return 4 * 2**30


def _sound(found: Mapping[str, Found], device: torch.device) -> Late:
    """The sound autoencoder with its vocoder, in float32."""
    config = MMAudioConfig.of(found[SOUND].shapes(), found[VOCODER].shapes())
    with torch.device("meta"):
        module = config.build()
    found[SOUND].check(module.vae).demand(f"the {SOUND}")
    found[VOCODER].check(module.vocoder).demand(f"the {VOCODER}")

    def load() -> nn.Module:
        with torch.device("meta"):
            module = config.build()
        found[SOUND].load(module.vae, device=device, dtype=torch.float32)
        found[VOCODER].load(module.vocoder, device=device, dtype=torch.float32)
        return module

    return Late(config.geometry, load)


def _text(found: Mapping[str, Found], device: torch.device, modalities: tuple[str, ...]) -> UMT5Text:
    """The text encoder, with its answers kept on disk where that is possible."""
    with torch.device("meta"):
        found[TEXT].check(UMT5Config.of(found[TEXT].shapes()).build()).demand(f"the {TEXT}")
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    cache: Path | None = Path(home).expanduser() / "soundstage" / "text"
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError:
        cache = None
    return UMT5Text(found[TEXT].path, found[TOKENIZER].path, device=device, cache=cache, modalities=modalities)


def _first_frame(
    found: Found, codec: LateCodec, device: torch.device
) -> Callable[[Tensor, AV[tuple[int, ...]]], Conditions]:
    """What Wan2.1 is told of a first frame: CLIP's tokens, and latents of the frame before gray ones."""
    look = ClipVision(found.path, device=device)

    def told(frame: Tensor, shape: AV[tuple[int, ...]]) -> Conditions:
        clip = image_then_gray(frame, codec.geometry["video"].length(shape["video"][1]))
        control = image_control(codec.encode(AV(video=clip))["video"])
        return Conditions(reference=look(frame), control=AV(video=control))

    return told


@dataclass(frozen=True)
class _Form:
    """A prompt in the form of a variant, with a warning for each thing that may disappoint."""

    variant: Variant

    def __call__(self, prompt: str) -> str:
        converted, told = check_prompt(prompt, self.variant.form)
        for sentence in told:
            warnings.warn(f"prompt: {sentence}", Caution, stacklevel=2)
        return converted


def _others(variant: Variant) -> str:
    """Where clips of another length are to be had."""
    other = [each for each in VARIANTS.values() if each.frames != variant.frames]
    seconds = [min(each.frames, each.samples * 24 // 16000) / 24 for each in other]
    named = zip(other, seconds, strict=True)
    return " and ".join(f"ovi-{each.name.replace('_', '-')} makes {length:.2f} s" for each, length in named)


def _activations(shape: tuple[int, ...], config: WanConfig) -> int:
    """Bytes of one call on latents of that shape: the widest block in flight.

    Per token: the residual stream, its norm and what attention and the MLP hold at once, in float32 and bfloat16.
    """
    tokens = math.prod(shape[1:]) // math.prod(config.patch)
    return tokens * (4 * 3 * config.width + 2 * (6 * config.width + 2 * config.hidden))
