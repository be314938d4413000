"""Prompts to umT5 features: batches, the cache on disk, and the encoder going when its work is done."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from soundstage.core.av import AV
from soundstage.core.conditions import Conditions
from soundstage.core.errors import Caution, MissingExtra, WeightsError
from soundstage.models.text import umt5
from soundstage.models.text.cache import TextCache, encoder_identity
from soundstage.models.text.umt5 import UMT5_XXL, UMT5Config, UMT5Text, clean, load_tokenizer, load_umt5
from soundstage.models.weights import shapes

TINY = UMT5Config(vocabulary=40, width=16, ffn=24, num_heads=2, head_width=8, depth=2)
SENTENCE = "rain on the window a man says we start now soft calm voice <S>We now.<E> Audio: door bell"
WORDS = SENTENCE.split()
PROMPTS = ["rain on the window", "a man says <S>We now.<E> Audio: soft calm voice", "", "rain on the window"]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """A folder laid out like google/umt5-xxl: words as tokens, </s> at the end."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    folder = tmp_path / "umt5-tiny"
    folder.mkdir()
    words = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])  # type: ignore[assignment]
    made.save(str(folder / "tokenizer.json"))
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**described, "unk_token": "<unk>"}))
    return folder


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A tiny encoder in Wan's published names."""
    torch.manual_seed(0)
    path = tmp_path / "models_t5_umt5-tiny.pth"
    torch.save(published(TINY.build().state_dict()), path)
    return path


def published(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our names to Wan's, written out here a second time."""
    parts = {
        "layer.0.SelfAttention.relative_attention_bias": "pos_embedding.embedding",
        "layer.0.SelfAttention": "attn",
        "layer.0.layer_norm": "norm1",
        "layer.1.layer_norm": "norm2",
        "layer.1.DenseReluDense.wi_0": "ffn.gate.0",
        "layer.1.DenseReluDense.wi_1": "ffn.fc1",
        "layer.1.DenseReluDense.wo": "ffn.fc2",
        "encoder.embed_tokens": "token_embedding",
        "encoder.final_layer_norm": "norm",
        "encoder.block": "blocks",
    }
    found = {}
    for name, value in state.items():
        for ours, theirs in parts.items():
            name = name.replace(ours, theirs)
        found[name] = value * 3 if "layer_norm" not in name else value
    return found


@pytest.fixture
def text(weights: Path, tokenizer: Path) -> Any:  # noqa: ANN401
    def make(**changes: Any) -> UMT5Text:  # noqa: ANN401
        return UMT5Text(weights, tokenizer, **{"dtype": torch.float32, **changes})

    return make


def rows(cond: Conditions) -> list[torch.Tensor]:
    assert cond.text is not None
    assert cond.text_mask is not None
    return [x[mask] for x, mask in zip(cond.text["video"], cond.text_mask["video"], strict=True)]


def test_the_published_encoder_has_its_size() -> None:
    with torch.device("meta"):
        model = UMT5_XXL.build()
    assert sum(p.numel() for p in model.parameters()) == 5_680_910_336
    named = published({name: torch.empty(0) for name in model.state_dict()})
    assert len(named) == 2 + 24 * 10
    assert {"token_embedding.weight", "norm.weight", "blocks.23.pos_embedding.embedding.weight"} <= set(named)
    wan = published({name: value for name, value in model.state_dict().items()})
    assert UMT5Config.of({name: tuple(value.shape) for name, value in wan.items()}) == UMT5_XXL


def test_features_are_those_of_each_prompt_alone(text: Any) -> None:  # noqa: ANN401
    cond = text(batch=2)(PROMPTS)
    assert cond.text.modalities == cond.text_mask.modalities == ("video", "audio")
    assert cond.text["video"] is cond.text["audio"]
    assert cond.text["video"].shape == (4, 10, 16)
    assert cond.text_mask["audio"].sum(1).tolist() == [5, 10, 1, 5]
    assert cond.text["video"][~cond.text_mask["video"]].abs().max() == 0
    together = rows(cond)
    for prompt, row in zip(PROMPTS, together, strict=True):
        torch.testing.assert_close(rows(text()([prompt]))[0], row, rtol=1e-5, atol=1e-5)
    assert torch.equal(together[0], together[3])
    assert float((together[0][:1] - together[2]).abs().max()) > 1e-2


def test_modalities_and_type_can_be_chosen(text: Any) -> None:  # noqa: ANN401
    cond = text(modalities=("audio",), dtype=torch.bfloat16)(["rain"])
    assert cond.text.modalities == ("audio",)
    assert cond.text["audio"].dtype == torch.bfloat16
    full = text()(["rain"]).text["audio"]
    torch.testing.assert_close(cond.text["audio"].float(), full, rtol=0.1, atol=0.1)


def test_the_ids_are_the_cleaned_words(tokenizer: Path) -> None:
    made = load_tokenizer(tokenizer)
    assert made(clean("  rain &amp;amp;  on\n"))["input_ids"] == [3, 2, 4, 1]


def test_a_long_prompt_is_cut_with_a_warning(text: Any) -> None:  # noqa: ANN401
    short = text(max_length=4)
    with pytest.warns(Caution, match="the prompt has 6 tokens and the model reads 4: shorten 'rain on the window now'"):
        cut = rows(short(["rain on the window now"]))[0]
    torch.testing.assert_close(cut, rows(text()(["rain on the"]))[0])


def test_the_encoder_goes_when_its_work_is_done(text: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ANN401
    built = []

    def watched(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        model = load_umt5(*args, **kwargs)
        built.append(weakref.ref(model))
        return model

    monkeypatch.setattr(umt5, "load_umt5", watched)
    gc.collect()
    gc.disable()
    try:
        goes, stays = text(), text(keep=True)
        goes(["rain"])
        assert [model() for model in built] == [None]
        goes(["rain"])
        stays(["rain"])
        stays(["now"])
    finally:
        gc.enable()
    assert len(built) == 3
    assert built[1]() is None
    assert built[2]() is not None


def test_a_full_cache_serves_without_weights(text: Any, weights: Path, tmp_path: Path) -> None:  # noqa: ANN401
    plain = text()(PROMPTS)
    cache = tmp_path / "cache"
    first = text(cache=cache)
    assert torch.equal(first(PROMPTS).text["video"], plain.text["video"])
    assert len(list(cache.glob("*.safetensors"))) == 3
    assert torch.equal(text(cache=cache)(PROMPTS[::-1]).text["audio"], plain.text["audio"].flip(0))
    weights.unlink()
    again = text(cache=cache)  # a new process would do the same
    assert torch.equal(again(PROMPTS).text["video"], plain.text["video"])
    with pytest.raises(WeightsError, match=r"models_t5_umt5-tiny\.pth"):
        again(["another man"])


def test_the_cache_tells_encoders_lengths_and_types_apart(text: Any, weights: Path, tmp_path: Path) -> None:  # noqa: ANN401
    cache = tmp_path / "cache"
    made = text(cache=cache)(["rain"]).text["video"]
    text(cache=cache, max_length=7)(["rain"])
    text(cache=cache, dtype=torch.bfloat16)(["rain"])
    assert len(list(cache.glob("*.safetensors"))) == 3
    torch.manual_seed(1)
    torch.save(published(TINY.build().state_dict()), weights)
    other = text(cache=cache)(["rain"]).text["video"]
    assert len(list(cache.glob("*.safetensors"))) == 4
    assert float((other - made).abs().max()) > 1e-2


@pytest.mark.parametrize("damage", ["truncated", "changed", "empty"])
def test_a_damaged_entry_is_made_again(text: Any, tmp_path: Path, damage: str) -> None:  # noqa: ANN401
    cache = tmp_path / "cache"
    made = text(cache=cache)(["rain on"]).text["video"]
    (entry,) = cache.glob("*.safetensors")
    whole = entry.read_bytes()
    entry.write_bytes({"truncated": whole[:-9], "changed": whole[:-1] + bytes([whole[-1] ^ 1]), "empty": b""}[damage])
    with pytest.warns(Caution, match="a damaged entry of the text cache; the text is encoded again"):
        again = text(cache=cache)(["rain on"]).text["video"]
    assert torch.equal(again, made)
    assert entry.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_a_warning(text: Any, tmp_path: Path) -> None:  # noqa: ANN401
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.warns(Caution, match="the text cache cannot be written to"):
        cond = text(cache=tmp_path / "cache")(["rain"])
    assert torch.equal(cond.text["video"], text()(["rain"]).text["video"])


def test_many_may_write_one_entry(tmp_path: Path) -> None:
    features = torch.full((200, 64), 3.0)

    def work(_: int) -> bool:
        cache = TextCache(tmp_path, "encoder")
        cache.put("text", features)
        found = cache.get("text")
        return found is not None and torch.equal(found, features)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(40)))
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]


@pytest.mark.slow
def test_two_processes_may_write_one_entry(tmp_path: Path) -> None:
    script = (
        "import sys, torch; from pathlib import Path; from soundstage.models.text.cache import TextCache\n"
        "cache = TextCache(Path(sys.argv[1]), 'encoder'); x = torch.full((200, 64), 3.0)\n"
        "for _ in range(30):\n    cache.put('text', x); assert torch.equal(cache.get('text'), x)\n"
    )
    running = [subprocess.Popen([sys.executable, "-W", "error", "-c", script, str(tmp_path)]) for _ in range(2)]
    assert [process.wait() for process in running] == [0, 0]
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]


def test_the_identity_follows_the_bytes(tmp_path: Path) -> None:
    path, words = tmp_path / "a.safetensors", tmp_path / "tokenizer.json"
    words.write_text("{}")
    save_file({"x": torch.zeros(4, 1000)}, path)
    before = encoder_identity(path, [words])
    assert encoder_identity(path, [words]) == before
    save_file({"x": torch.zeros(4, 1000).index_fill(0, torch.tensor([2]), 1.0)}, path)
    assert encoder_identity(path, [words]) != before
    save_file({"x": torch.zeros(4, 1000)}, path)
    assert encoder_identity(path, [words]) == before
    words.write_text("{ }")
    assert encoder_identity(path, [words]) != before
    with pytest.raises(WeightsError):
        encoder_identity(tmp_path / "none.pth", [words])
    assert TextCache(tmp_path, before).get("nothing") is None


def test_a_hub_folder_of_shards_is_the_same_encoder(text: Any, weights: Path, tokenizer: Path, tmp_path: Path) -> None:  # noqa: ANN401
    state = load_umt5(weights).state_dict()
    folder = tmp_path / "text_encoder"
    folder.mkdir()
    half = len(state) // 2
    names = {name: f"model-{1 + (i > half):05d}-of-00002.safetensors" for i, name in enumerate(state)}
    named = {"encoder.embed_tokens.weight": "shared.weight"}
    for shard in sorted(set(names.values())):
        held = {named.get(name, name): state[name].clone() for name in state if names[name] == shard}
        save_file(held | {f"decoder.{shard[6:11]}.weight": torch.zeros(3)}, folder / shard)
    where = {name: file for file in sorted(set(names.values())) for name in load_file(folder / file)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    assert UMT5Config.of(shapes(folder)) == TINY
    hub = UMT5Text(folder, tokenizer, dtype=torch.float32)(PROMPTS)
    assert torch.equal(hub.text["video"], text()(PROMPTS).text["video"])


def test_a_sentencepiece_model_serves_as_tokenizer(tmp_path: Path) -> None:
    import sentencepiece

    folder = tmp_path / "spiece"
    folder.mkdir()
    with (folder / "spiece.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))] * 4),
            model_writer=file,
            vocab_size=60,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer", "extra_ids": 0}))
    made = load_tokenizer(folder)
    recorded = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    for prompt in [*PROMPTS, "a man: \uff57\uff45 \u2460 start", "<S>door<E>\u65e5"]:
        assert made(clean(prompt))["input_ids"] == [*recorded.encode(clean(prompt)), 1]


def test_what_is_missing_is_one_sentence(weights: Path, tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"holds no tokenizer; it needs tokenizer_config\.json with tokenizer\.json"):
        UMT5Text(weights, tmp_path / "nowhere")
    with pytest.raises(WeightsError, match=r"none\.pth"):
        UMT5Text(tmp_path / "none.pth", tokenizer)
    with pytest.raises(WeightsError, match=r"none\.pth"):
        UMT5Text(tmp_path / "none.pth", tokenizer, cache=tmp_path / "cache")
    (tokenizer / "tokenizer.json").write_text("{")
    with pytest.raises(WeightsError, match=r"the tokenizer cannot be read .*; copy google/umt5-xxl again"):
        UMT5Text(weights, tokenizer, dtype=torch.float32)(["rain"])


def test_other_weights_are_told_apart(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"holds blocks\.0\.q, which is no umT5 encoder; give models_t5_umt5-xxl"):
        UMT5Config.of({"blocks.0.q": (3, 4)})
    with pytest.raises(WeightsError, match="holds no tensor at all"):
        UMT5Config.of({})
    state = torch.load(weights)
    shared = {name: x for name, x in state.items() if "blocks.1.pos" not in name}
    with pytest.raises(WeightsError, match="no umT5 encoder"):
        UMT5Config.of({name: tuple(x.shape) for name, x in shared.items()})
    torch.save({name: x for name, x in state.items() if name != "norm.weight"}, tmp_path / "partial.pth")
    with pytest.raises(WeightsError, match=r"1 missing \(encoder.final_layer_norm.weight\)"):
        load_umt5(tmp_path / "partial.pth")


def test_a_missing_package_names_the_extra(text: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ANN401
    encode = text()
    for package in ("ftfy", "transformers"):
        with monkeypatch.context() as patch, pytest.raises(MissingExtra, match=rf"{package} .*soundstage\[models\]"):
            patch.setitem(sys.modules, package, None)
            encode(["rain"])


def test_nothing_warns(text: Any) -> None:  # noqa: ANN401
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        cond = text()(PROMPTS)
    assert not seen
    assert Conditions.cat([cond, cond]).batch == 8
    assert isinstance(cond.text, AV)
