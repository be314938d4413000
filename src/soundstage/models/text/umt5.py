"""umT5 as the text encoder of Wan and Ovi: prompts to features, through transformers' class and tokenizer.

The published encoder is umT5-xxl (arXiv:2304.09151): 24 layers with a relative position bias in each, no scaling of the
attention, a key mask. A text is cleaned, tokenised to at most 512 tokens, encoded, and cut to its true length; the
denoisers pad it with zero rows, which they do attend to.

Files: `models_t5_umt5-xxl-enc-bf16.pth` of Wan, or a hub folder such as `text_encoder`; the tokenizer is a folder laid
out like google/umt5-xxl.
Shape letters: B batch, S tokens, D width.
"""

from __future__ import annotations

import html
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from soundstage.core.av import AV
from soundstage.core.conditions import Conditions
from soundstage.core.errors import Caution, MissingExtra, WeightsError
from soundstage.core.extras import optional
from soundstage.models.text.cache import TextCache, identity_of
from soundstage.models.weights import KeyMap, Source, load_weights, shapes, weight_files

IGNORED = (r"decoder\..*", r"lm_head\..*", r"shared\.weight")
"""Patterns of what a file of the whole umT5 holds beside its encoder, and the second name of its embedding."""
VOCABULARY = ("tokenizer.json", "spiece.model")
_EMBEDDING = ("encoder.embed_tokens.weight", "shared.weight", "token_embedding.weight")
_LAYER = re.compile(r"blocks\.(\d+)\.(.+)")
_PUBLISHED = {
    "norm1.weight": "layer.0.layer_norm.weight",
    "attn.q.weight": "layer.0.SelfAttention.q.weight",
    "attn.k.weight": "layer.0.SelfAttention.k.weight",
    "attn.v.weight": "layer.0.SelfAttention.v.weight",
    "attn.o.weight": "layer.0.SelfAttention.o.weight",
    "pos_embedding.embedding.weight": "layer.0.SelfAttention.relative_attention_bias.weight",
    "norm2.weight": "layer.1.layer_norm.weight",
    "ffn.gate.0.weight": "layer.1.DenseReluDense.wi_0.weight",
    "ffn.fc1.weight": "layer.1.DenseReluDense.wi_1.weight",
    "ffn.fc2.weight": "layer.1.DenseReluDense.wo.weight",
}


@dataclass(frozen=True)
class UMT5Config:
    """Widths of an encoder. buckets, max_distance: of the relative positions; farther tokens share the last bucket."""

    vocabulary: int = 256_384
    width: int = 4096
    ffn: int = 10_240
    num_heads: int = 64
    head_width: int = 64
    depth: int = 24
    buckets: int = 32
    max_distance: int = 128

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, ...]]) -> UMT5Config:
        """The widths that tensor names and shapes tell, in Wan's names or the hub's.

        Raises WeightsError where they are not an umT5 encoder with a position bias in every layer.
        """
        found = {ours: shapes[source.names[0]] for ours, source in UMT5_KEYS(list(shapes)).items()}
        depth = 1 + max((int(m[1]) for name in found if (m := re.match(r"encoder\.block\.(\d+)\.", name))), default=-1)
        first = "encoder.block.0.layer.0.SelfAttention"
        try:
            vocabulary, width = found["encoder.embed_tokens.weight"]
            inner = found[f"{first}.q.weight"][0]
            ffn = found["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"][0]
            buckets, num_heads = found[f"{first}.relative_attention_bias.weight"]
            # A file with one bias for all layers is another T5.
            _ = found[f"encoder.block.{depth - 1}.layer.0.SelfAttention.relative_attention_bias.weight"]
        except (KeyError, ValueError) as error:
            some = ", ".join(list(shapes)[:3]) or "no tensor at all"
            raise WeightsError(
                f"text encoder: the file holds {some}, which is no umT5 encoder; give models_t5_umt5-xxl-enc-bf16.pth "
                "or a hub folder of umt5-xxl"
            ) from error
        return cls(vocabulary, width, ffn, num_heads, inner // num_heads, depth, buckets)

    def build(self) -> UMT5:
        """The encoder, randomly initialised; under `torch.device("meta")` it takes no memory."""
        return UMT5(self)


UMT5_XXL = UMT5Config()


class UMT5(nn.Module):
    """Token ids (B, S) and mask -> features (B, S, D). Its parameters are named as in transformers, each once."""

    def __init__(self, config: UMT5Config) -> None:
        super().__init__()
        self.config = config
        transformers = optional("transformers", "models", "UMT5EncoderModel", "AutoTokenizer")
        whole = transformers.UMT5EncoderModel(
            transformers.UMT5Config(
                vocab_size=config.vocabulary,
                d_model=config.width,
                d_kv=config.head_width,
                d_ff=config.ffn,
                num_layers=config.depth,
                num_heads=config.num_heads,
                relative_attention_num_buckets=config.buckets,
                relative_attention_max_distance=config.max_distance,
                dropout_rate=0.0,
            )
        )
        self.encoder = whole.encoder

    def forward(self, ids_BS: Tensor, mask_BS: Tensor) -> Tensor:
        """mask: 1 or True = a real token; the others are no keys, and their own features mean nothing."""
        return self.encoder(input_ids=ids_BS, attention_mask=mask_BS.long()).last_hidden_state


def _keys(names: Sequence[str]) -> dict[str, Source]:
    found: dict[str, Source] = {}
    for name in names:
        layer = _LAYER.fullmatch(name)
        if layer and layer[2] in _PUBLISHED:
            found[f"encoder.block.{layer[1]}.{_PUBLISHED[layer[2]]}"] = Source((name,))
        elif name == "norm.weight":
            found["encoder.final_layer_norm.weight"] = Source((name,))
        elif name.startswith("encoder."):
            found[name] = Source((name,))
    embedding = next((name for name in _EMBEDDING if name in names), None)
    if embedding is not None:
        found["encoder.embed_tokens.weight"] = Source((embedding,))
    return found


UMT5_KEYS: KeyMap = _keys
"""Key map of Wan's published names, and of the hub's, to `UMT5`; a hub file may hold the names in `IGNORED` besides."""


def clean(text: str) -> str:
    """A prompt as the published tokenizer takes it: mojibake and entities mended, white space collapsed.

    Raises MissingExtra without ftfy.
    """
    try:
        import ftfy
    except ImportError as error:
        raise MissingExtra("ftfy", "models") from error
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


class UMT5Text:
    """Prompts -> Conditions with text (B, S, D) and text_mask (B, S), S the longest prompt's tokens.

    weights: a .pth or .safetensors file, or a folder of shards. tokenizer: a folder with tokenizer_config.json and
    tokenizer.json or spiece.model. cache: a folder of answers; texts found there need no weights. keep: hold the
    encoder for the next call; otherwise it goes as soon as its call is answered. modalities: which get the features.
    batch: texts encoded at a time.

    Features are zero beyond the true length. "" is the end token alone. A prompt over max_length tokens is cut, with a
    warning. Raises WeightsError where the tokenizer is not there, or weights are needed and missing or another model's.
    """

    def __init__(
        self,
        weights: Path,
        tokenizer: Path,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        max_length: int = 512,
        cache: Path | None = None,
        keep: bool = False,
        modalities: Sequence[str] = ("video", "audio"),
        batch: int = 8,
    ) -> None:
        self.weights = Path(weights)
        self.device, self.dtype, self.max_length = torch.device(device), dtype, max_length
        self.keep, self.modalities, self.batch = keep, tuple(modalities), batch
        self._tokenizer_folder = Path(tokenizer)
        self._tokenizer: Any = None
        self._model: UMT5 | None = None
        vocabulary = tokenizer_files(self._tokenizer_folder)
        self._cache: TextCache | None = None
        if cache is not None:
            encoder = identity_of(self.weights, vocabulary, Path(cache))
            self._cache = TextCache(Path(cache), f"{encoder}, {max_length} tokens, {dtype}")
        else:
            weight_files(self.weights)

    def __call__(self, prompts: Sequence[str]) -> Conditions:
        """One row per prompt, in order; a prompt given twice is encoded once."""
        texts = [clean(prompt) for prompt in prompts]
        known = dict.fromkeys(texts)
        features = {text: None if self._cache is None else self._cache.get(text) for text in known}
        features |= self._encode([text for text in known if features[text] is None])
        rows = [found for text in texts if (found := features[text]) is not None]
        lengths = torch.tensor([len(row) for row in rows])
        padded = nn.utils.rnn.pad_sequence([row.to(self.device, self.dtype) for row in rows], batch_first=True)
        mask = (torch.arange(padded.shape[1])[None] < lengths[:, None]).to(self.device)
        return Conditions(
            text=AV(**dict.fromkeys(self.modalities, padded)),
            text_mask=AV(**dict.fromkeys(self.modalities, mask)),
        )

    def _encode(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Features (S, D) of each text at its true length; the encoder is loaded only when there is a text."""
        if not texts:
            return {}
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self._tokenizer_folder)
        # Texts of like length go together, so that little of a batch is padding.
        coded = sorted(((text, self._ids(text)) for text in texts), key=lambda pair: len(pair[1]))
        if self._model is None:
            self._model = load_umt5(self.weights, device=self.device, dtype=self.dtype)
        found: dict[str, Tensor] = {}
        try:
            for start in range(0, len(coded), self.batch):
                found |= self._features(coded[start : start + self.batch])
        finally:
            if not self.keep:
                self._model = None
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
        return found

    @torch.no_grad()
    def _features(self, coded: Sequence[tuple[str, list[int]]]) -> dict[str, Tensor]:
        """One batch through the encoder, and into the cache."""
        assert self._model is not None
        rows = [torch.tensor(ids, device=self.device) for _, ids in coded]
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        ids_BS = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        hidden_BSD = self._model(ids_BS, torch.arange(ids_BS.shape[1], device=self.device)[None] < lengths[:, None])
        found = {text: hidden[: len(ids)].clone() for (text, ids), hidden in zip(coded, hidden_BSD, strict=True)}
        if self._cache is not None:
            for text, features in found.items():
                self._cache.put(text, features)
        return found

    def _ids(self, text: str) -> list[int]:
        ids = self._tokenizer(text, add_special_tokens=True, verbose=False)["input_ids"]
        if len(ids) <= self.max_length:
            return ids
        warnings.warn(
            f"the prompt has {len(ids)} tokens and the model reads {self.max_length}: shorten {text[:40]!r}..., "
            "whose end is not read",
            Caution,
            stacklevel=4,
        )
        return self._tokenizer(text, add_special_tokens=True, truncation=True, max_length=self.max_length)["input_ids"]


def load_umt5(weights: Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> UMT5:
    """The encoder at a path, frozen. Raises WeightsError where it is missing, partial or of another model."""
    with torch.device("meta"):
        model = UMT5Config.of(shapes(weights)).build()
    load_weights(model, weights, UMT5_KEYS, device=device, dtype=dtype, optional=IGNORED, what="the umT5 encoder")
    return model.eval().requires_grad_(False)


def load_tokenizer(folder: Path) -> Any:  # noqa: ANN401
    """The tokenizer in a folder laid out like google/umt5-xxl; never asks a hub. Raises WeightsError without it."""
    tokenizer_files(folder)
    transformers = optional("transformers", "models", "UMT5EncoderModel", "AutoTokenizer")
    try:
        return transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(
            f"{folder}: the tokenizer cannot be read ({str(error).splitlines()[0]}); copy google/umt5-xxl again"
        ) from error


def tokenizer_files(folder: Path) -> tuple[Path, ...]:
    """The vocabulary files of a tokenizer folder; raises WeightsError where there is none."""
    found = tuple(folder / name for name in VOCABULARY if (folder / name).is_file())
    if not found or not (folder / "tokenizer_config.json").is_file():
        raise WeightsError(
            f"{folder}: holds no tokenizer; it needs tokenizer_config.json with tokenizer.json or spiece.model, "
            "as in the folder google/umt5-xxl beside Wan's weights"
        )
    return found
