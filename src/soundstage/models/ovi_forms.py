"""Ovi's prompt forms, its variants, and the picture sizes of Ovi and Wan.

A prompt holds the scene in plain words, spoken text as `<S>words<E>`, and a description of the sound. The 720x720 model
was trained with that description as `<AUDCAP>...<ENDAUDCAP>` (form "audcap"), the 960x960 models with `Audio: ...` at
the end (form "audio"); text outside the tags may be spoken where the form is not kept.

Sizes are (height, width) in pixels. `dims_from_area` reads an aspect as Ovi does, "height:width"; `Sizes.of_aspect` as
everybody else does, "width:height".
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from soundstage.core.errors import Caution, RequestError, one_of

Size = tuple[int, int]

FORMS: Mapping[str, str] = MappingProxyType({"audcap": "<AUDCAP>...<ENDAUDCAP>", "audio": "Audio: ..."})
"""Form to how a sound is described in it."""
_AUDIO = re.compile(r"Audio:\s*(.*)", re.S)
_AUDCAP = re.compile(r"<AUDCAP>(.*?)<ENDAUDCAP>", re.S)
_SPEECH = re.compile(r"<S>(.*?)<E>", re.S)
_TAG = re.compile(r"<\s*(/?)\s*(S|E|AUDCAP|ENDAUDCAP)\s*>", re.I)
_QUOTED = re.compile(r"[\"\u201c][^\"\u201c\u201d]{2,}[\"\u201d]")
_CLOSES = {"S": "E", "AUDCAP": "ENDAUDCAP"}
_OPENS = {close: tag for tag, close in _CLOSES.items()}
_NAME_LENGTH = 50


@dataclass(frozen=True)
class Variant:
    """One published checkpoint. area: pixels of its pictures. form: how its prompts describe the sound."""

    name: str
    file: str
    video_latents: int
    audio_latents: int
    area: int
    form: str

    @property
    def frames(self) -> int:
        """Frames of a clip at 24 per second."""
        return 1 + 4 * (self.video_latents - 1)

    @property
    def samples(self) -> int:
        """Samples of a clip at 16 kHz."""
        return 512 * self.audio_latents


VARIANTS: Mapping[str, Variant] = MappingProxyType(
    {
        variant.name: variant
        for variant in (
            Variant("720x720_5s", "model.safetensors", 31, 157, 720 * 720, "audcap"),
            Variant("960x960_5s", "model_960x960.safetensors", 31, 157, 960 * 960, "audio"),
            Variant("960x960_10s", "model_960x960_10s.safetensors", 61, 314, 960 * 960, "audio"),
        )
    }
)

# The published list also names 720x720, which is no multiple of 32: Ovi makes it 704x704.
_SMALL = ((704, 704), (512, 992), (992, 512), (960, 512), (512, 960), (448, 1120))
_LARGE = ((960, 960), (704, 1280), (1280, 704))
RECOMMENDED: Mapping[str, tuple[Size, ...]] = MappingProxyType(
    {name: _SMALL if variant.area == 720 * 720 else _LARGE for name, variant in VARIANTS.items()}
)
"""Variant to the sizes its authors recommend."""


# Prompts


def to_form(prompt: str, form: str) -> str:
    """The prompt with its description of the sound in that form, by the published rule; raises ConfigError."""
    if form not in FORMS:
        raise one_of("form", form, FORMS)
    if form == "audcap":
        return _AUDIO.sub(r"<AUDCAP>\1<ENDAUDCAP>", prompt)
    return _AUDCAP.sub(r"Audio: \1", prompt)


def check_prompt(prompt: str, form: str) -> tuple[str, tuple[str, ...]]:
    """The prompt in a model's form, and what may disappoint in it: sentences that each name the fix.

    An empty prompt has nothing to check. Raises ConfigError for an unknown form.
    """
    converted = to_form(prompt, form)
    if not prompt.strip():
        return converted, ()
    told = [*_misspelt(prompt), *_unpaired(prompt), *_speech(prompt), *_sound(prompt, form)]
    if converted != prompt:
        other = next(kind for kind in FORMS if kind != form)
        told.append(
            f"the sound was described as `{FORMS[other]}`; this model reads `{FORMS[form]}`, so it was rewritten"
        )
    return converted, tuple(told)


def text_for_image_model(prompt: str) -> str:
    """The scene alone, for a text-to-image model: speech and description of the sound left out."""
    return _AUDIO.sub("", _AUDCAP.sub("", _SPEECH.sub("", prompt))).strip()


def file_name(prompt: str) -> str:
    """The published file name of a prompt: its first 50 letters without tags; it may hold line breaks."""
    return re.sub(r"<.*?>", "", prompt).translate(str.maketrans(" /", "__"))[:_NAME_LENGTH]


def _misspelt(prompt: str) -> list[str]:
    """Tags that the model does not know: </S>, </E>, <s> ..."""
    told = []
    for tag in dict.fromkeys(m.group() for m in _TAG.finditer(prompt)):
        slash, name = _TAG.fullmatch(tag).groups()  # type: ignore[union-attr]
        right = f"<{_CLOSES.get(name.upper(), name.upper()) if slash else name.upper()}>"
        if tag != right:
            told.append(f"{tag} is no tag of this model: write {right}")
    return told


def _unpaired(prompt: str) -> list[str]:
    """Tags opened, closed or nested out of order; a tag spelt otherwise counts as the right one."""
    told = []
    open_tag = ""
    for slash, name in (m.groups() for m in _TAG.finditer(prompt)):
        tag = _CLOSES.get(name.upper(), name.upper()) if slash else name.upper()
        if tag in _CLOSES:
            if open_tag:
                told.append(f"<{tag}> opens inside <{open_tag}>: close that one with <{_CLOSES[open_tag]}> before")
            open_tag = tag
        elif open_tag != _OPENS[tag]:
            told.append(f"<{tag}> closes nothing: put <{_OPENS[tag]}> where its text begins")
        else:
            open_tag = ""
    if open_tag:
        told.append(f"<{open_tag}> is not closed: put <{_CLOSES[open_tag]}> where its text ends")
    return list(dict.fromkeys(told))


def _speech(prompt: str) -> list[str]:
    told = []
    if any(not words.strip() for words in _SPEECH.findall(prompt)):
        told.append("<S><E> holds no words: write what is said between them, or leave both out")
    quoted = None if re.search(r"<\s*S\s*>", prompt, re.I) else _QUOTED.search(_without_sound(prompt))
    if quoted:
        words = quoted.group()
        told.append(f"{words[:40]} is in quotes: if it is to be spoken, write <S>{words[1:-1][:40]}<E>")
    return told


def _sound(prompt: str, form: str) -> list[str]:
    """What is wrong with the description of the sound."""
    captions = [found.strip() for found in _AUDCAP.findall(prompt)]
    if not captions and (found := _AUDIO.search(prompt)):
        captions = [found[1].strip()]
        if _SPEECH.search(found[1]):
            return ["speech after `Audio:` counts as its description: put `Audio: ...` at the end of the prompt"]
    if not captions:
        if _TAG.search(prompt) and re.search(r"<\s*AUDCAP\s*>", prompt, re.I):
            return []  # it is there, in a tag that other sentences mend
        return [f"the sound is not described: add `{FORMS[form]}` at the end, with voices, noises and music"]
    told = []
    if not all(captions):
        told.append(f"the description of the sound is empty: say in `{FORMS[form]}` what is heard")
    after = _AUDCAP.split(prompt)[-1] if form == "audio" and _AUDCAP.search(prompt) else ""
    if after.strip():
        told.append("text after <ENDAUDCAP> becomes part of the sound's description: put the description last")
    return told


def _without_sound(prompt: str) -> str:
    return _AUDIO.sub("", _AUDCAP.sub("", prompt))


# Sizes


def snap(height: int, width: int, area: int, multiple: int = 32) -> Size:
    """The size scaled to that many pixels, each side then at its nearest multiple; raises RequestError at 0 or less."""
    _demand_positive(height, width)
    factor = math.sqrt(area / (height * width))
    return _nearest(round(height * factor), multiple), _nearest(round(width * factor), multiple)


def scale_to_area16(height: int, width: int, area: int = 1024 * 1024) -> Size:
    """The size scaled to that many pixels at multiples of 16, as image models want it."""
    _demand_positive(height, width)
    factor = math.sqrt(area / (height * width))
    return _nearest(height * factor, 16), _nearest(width * factor, 16)


def dims_from_area(aspect: str, area: int, multiple: int = 32) -> Size:
    """The largest size of about that aspect, "HEIGHT:WIDTH", within the area: each side cut down to a multiple."""
    tall, wide = _parts(aspect)
    # Reduced and floored as published, so that rounding falls the same way.
    shared = math.gcd(tall, wide)
    tall, wide = tall // shared, wide // shared
    factor = math.sqrt(area / (tall * wide))
    height, width = (int(factor * side) // multiple * multiple for side in (tall, wide))
    return max(height, multiple), max(width, multiple)


def of_image(height: int, width: int, area: int, multiple: int = 32) -> Size:
    """The size for a first frame: nearest in area, then in aspect, of the candidates near the image's own aspect.

    Candidates: p = p0 - 3 .. p0 + 3 rows of `multiple`, p0 = sqrt(area / multiple^2 / aspect), each with the columns of
    the aspect; and the image scaled to the area and rounded.
    """
    _demand_positive(height, width)
    aspect = width / height
    middle = max(1, round(math.sqrt(max(1, area // multiple**2) / aspect)))
    rows = (max(1, middle + step) for step in range(-3, 4))
    candidates = [(p * multiple, max(1, round(p * aspect)) * multiple) for p in rows]
    factor = math.sqrt(area / (height * width))
    candidates.append((_nearest(height * factor, multiple), _nearest(width * factor, multiple)))
    return min(candidates, key=lambda size: (abs(size[0] * size[1] - area), abs(size[1] / size[0] - aspect)))


def first_frame(image: Any, area: int, multiple: int = 32) -> Tensor:  # noqa: ANN401
    """(H, W, 3) uint8 -> (1, 3, h, w) at the size of `of_image`, near [-1, 1].

    Bicubic as published: no crop, no antialiasing, no clamp. Raises RequestError for another shape.
    """
    pixels = _pixels(image)
    return _resized(pixels, of_image(*pixels.shape[:2], area, multiple))


class SizeWarning(Caution):
    """A picture size far from those the model was trained on."""


@dataclass(frozen=True)
class Sizes:
    """Which picture sizes a model makes: sides at a multiple, pixels near an area.

    multiple: pixels of one token of the denoiser: 32 for Ovi and Wan2.2 5B, 16 for Wan2.1. recommended: sizes to name
    where another is far off; none = the same aspect at the model's area.
    """

    area: int
    multiple: int = 32
    recommended: tuple[Size, ...] = ()
    tolerance: float = 0.1

    def check(self, height: int, width: int) -> None:
        """Raise RequestError where a side is no multiple; warn where the area is 10 % or more off the model's."""
        nearest = _nearest(height, self.multiple), _nearest(width, self.multiple)
        if (height, width) != nearest:
            raise RequestError(
                f"size: {height}x{width} is not a multiple of {self.multiple}; the nearest possible is "
                f"{nearest[0]}x{nearest[1]}"
            )
        share = height * width / self.area
        if abs(share - 1) > self.tolerance:
            best = self.near(height, width)
            warnings.warn(
                f"size: {height}x{width} has {share:.2f} times the {self.area} pixels that the model was trained on; "
                f"the nearest recommended is {best[0]}x{best[1]}",
                SizeWarning,
                stacklevel=2,
            )

    def near(self, height: int, width: int) -> Size:
        """The recommended size nearest in aspect."""
        if not self.recommended:
            return snap(height, width, self.area, self.multiple)
        return min(self.recommended, key=lambda size: abs(math.log(size[1] / size[0] * height / width)))

    def of_aspect(self, text: str) -> Size:
        """The size for an aspect "WIDTH:HEIGHT", such as "16:9", within the area; raises RequestError for none."""
        width, height = _parts(text)
        return dims_from_area(f"{height}:{width}", self.area, self.multiple)

    def of_image(self, height: int, width: int) -> Size:
        """The size for a first frame of that many pixels."""
        return of_image(height, width, self.area, self.multiple)

    def image(self, frame: Any, size: Size) -> Tensor:  # noqa: ANN401
        """(H, W, 3) uint8 -> (1, 3, 1, height, width) near [-1, 1], as the models were given their first frame."""
        return _resized(_pixels(frame), size)[:, :, None]


def _pixels(image: Any) -> Tensor:  # noqa: ANN401
    pixels = image if isinstance(image, Tensor) else torch.from_numpy(np.array(image))
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != torch.uint8:
        raise RequestError(
            f"image: {tuple(pixels.shape)} of {pixels.dtype} is not (H, W, 3) of uint8; give one picture in RGB"
        )
    return pixels


def _resized(pixels: Tensor, size: Size) -> Tensor:
    image = pixels.permute(2, 0, 1)[None].float() / 255 * 2 - 1
    if image.shape[2:] == torch.Size(size):
        return image
    return F.interpolate(image, size, mode="bicubic", align_corners=False)


def _nearest(side: float, multiple: int) -> int:
    return max(multiple, round(side / multiple) * multiple)


def _parts(aspect: str) -> Size:
    found = re.fullmatch(r"\s*(\d+)\s*[:x/]\s*(\d+)\s*", aspect)
    if found is None or not int(found[1]) or not int(found[2]):
        raise RequestError(f'aspect: {aspect!r} is not two whole numbers such as "16:9"')
    return int(found[1]), int(found[2])


def _demand_positive(height: int, width: int) -> None:
    if height < 1 or width < 1:
        raise RequestError(f"size: {height}x{width} has no pixels; give two whole numbers above 0")
