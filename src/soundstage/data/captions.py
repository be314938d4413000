"""Stage "captions": a sentence, and tags, for every clip by a model of one's choice, here or behind an address."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from soundstage.core.errors import ConfigError, MissingExtra
from soundstage.data.flow import Drop, Item, Transient
from soundstage.data.web import retry_after
from soundstage.media.decode import read
from soundstage.media.probe import probe

__all__ = ["Caption", "pictures"]

PROMPT = "Describe what is seen in these frames of one video, in time order, in one plain sentence."
BUSY = (408, 409, 425, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class Caption:
    """Adds the facts "caption" and "captioned_by"; where they are asked for, "tags" and "category".

    model: with `url`, the model's name there; without, the folder or hub id of a transformers model that takes images
    and gives text. url: of an OpenAI-compatible service, up to and with "/v1". key: name of the environment variable
    that holds its key; the key itself is no parameter. images: frames shown, evenly spaced; side: their longest side.
    tags: how many words are asked for, at most. categories: kinds of clip, such as data.mixture.CATEGORIES; an answer
    that names none of them is "other".
    A busy or absent service is tried again later; a request it refuses is an error that names what it said.
    """

    model: str
    url: str = ""
    key: str = "OPENAI_API_KEY"
    prompt: str = PROMPT
    tags: int = 0
    categories: tuple[str, ...] = ()
    images: int = 4
    side: int = 512
    max_tokens: int = 128
    seconds: float = 120.0
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if (
            not self.model
            or self.images < 1
            or self.tags < 0
            or (self.url and not self.url.startswith(("http://", "https://")))
        ):
            told = f"model {self.model!r}, url {self.url!r}, images {self.images}, tags {self.tags}"
            raise ConfigError(f"Caption: {told}; name a model, an http(s) url or none, and at least one image")

    def __call__(self, item: Item, folder: Path) -> Iterable[Item | Drop]:  # noqa: ARG002
        shown = pictures(item, self.images, self.side)
        text = self._ask(shown) if self.url else self._generate(shown)
        yield item.child(**self._understood(text), captioned_by=self.model)

    @property
    def asked(self) -> str:
        """The whole prompt."""
        lines = [self.prompt]
        if self.categories:
            lines.append(f'Then a line "Category: " and one of: {", ".join(self.categories)}.')
        if self.tags:
            lines.append(f'Then a line "Tags: " and at most {self.tags} words for what is seen, with commas between.')
        return "\n".join(lines)

    def _understood(self, text: str) -> dict[str, Any]:
        """The facts of an answer."""
        lines = {"category": "", "tags": ""}
        told = []
        for line in text.splitlines():
            name, sign, rest = line.strip(" *#-").partition(":")
            if sign and name.strip(" *").lower() in lines:
                lines[name.strip(" *").lower()] = rest.strip(" *.").lower()
            else:
                told.append(line)
        facts: dict[str, Any] = {"caption": " ".join(" ".join(told).split())}
        if self.categories:
            facts["category"] = next((name for name in self.categories if name.lower() in lines["category"]), "other")
        if self.tags:
            words = [word.strip() for word in lines["tags"].split(",")]
            facts["tags"] = list(dict.fromkeys(word for word in words if word))[: self.tags]
        return facts

    def _ask(self, shown: Sequence[np.ndarray]) -> str:
        try:
            import httpx
        except ImportError:
            raise MissingExtra("httpx", "data") from None
        content: list[dict[str, Any]] = [{"type": "text", "text": self.asked}]
        content += [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in shown]
        told = {"model": self.model, "messages": [{"role": "user", "content": content}]}
        told |= {"max_tokens": self.max_tokens, "temperature": 0}
        secret = os.environ.get(self.key)
        headers = {"Authorization": f"Bearer {secret}"} if secret else {}
        try:
            answer = httpx.post(
                f"{self.url.rstrip('/')}/chat/completions", json=told, headers=headers, timeout=self.seconds
            )
        except httpx.TransportError as error:
            raise Transient(f"{self.url}: {error or type(error).__name__}") from error
        if answer.status_code in BUSY:
            raise Transient(f"{self.url} answered {answer.status_code}", retry_after(answer.headers.get("retry-after")))
        if answer.status_code != 200:
            raise ConfigError(f"{self.url} answered {answer.status_code}: {answer.text[:200]}; check model and key")
        try:
            text = answer.json()["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError):
            raise Transient(f"{self.url} answered without a message: {answer.text[:200]}") from None
        if not isinstance(text, str) or not text.strip():
            raise Transient(f"{self.url} answered with an empty message")
        return text

    def _generate(self, shown: Sequence[np.ndarray]) -> str:
        import torch

        model, processor = _loaded(self.model)
        prompt = {}
        if getattr(processor, "chat_template", None):
            parts = [{"type": "image"}] * len(shown) + [{"type": "text", "text": self.asked}]
            text = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
            prompt = {"text": [text], "images": [list(shown)]}
        else:  # a plain captioner sees one picture: the middle one
            prompt = {"images": shown[len(shown) // 2]}
        inputs = processor(**prompt, return_tensors="pt").to(model.device)
        with torch.inference_mode():
            tokens = model.generate(**inputs, max_new_tokens=self.max_tokens, do_sample=False)
        said = tokens[0, inputs["input_ids"].shape[1] :] if "input_ids" in inputs else tokens[0]
        return processor.decode(said, skip_special_tokens=True)


def pictures(item: Item, count: int, side: int) -> list[np.ndarray]:
    """`count` (H, W, 3) uint8 frames of an item's span, evenly spaced, the longer side at most `side` pixels."""
    path = item.files["media"]
    info = probe(path)
    start, end = item.facts.get("span") or (0.0, info.duration)
    if info.video is None:
        raise ConfigError(f"{path.name}: holds no picture to describe; drop such items before this stage")
    factor = min(1.0, side / max(info.video.height, info.video.width))
    size = tuple(max(2, round(x * factor)) for x in (info.video.height, info.video.width))
    clip = read(path, start=start, end=end, fps=count / (end - start), size=size, audio=False, threads=1)
    chosen = np.linspace(0, len(clip.frames) - 1, min(count, len(clip.frames)))
    return [clip.frames[round(index)] for index in chosen]


@lru_cache(maxsize=1)
def _loaded(name: str) -> tuple[Any, Any]:
    """(model, processor), once per process."""
    import torch

    from soundstage.core.extras import optional

    transformers = optional("transformers", "models")
    model = transformers.AutoModelForImageTextToText.from_pretrained(name)
    processor = transformers.AutoProcessor.from_pretrained(name)
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), processor


def data_url(image: np.ndarray) -> str:
    """A picture (H, W, 3) uint8 as a JPEG in an address of its own."""
    try:
        from PIL import Image
    except ImportError:
        raise MissingExtra("pillow", "media") from None
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
