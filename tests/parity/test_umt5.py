"""The umT5 encoder against features recorded from the published implementation."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from soundstage.models.text.umt5 import IGNORED, UMT5, UMT5_KEYS, UMT5Config
from soundstage.models.weights import load_weights

STEM = "umt5"


def loaded(vector: Any, folder: Path) -> UMT5:  # noqa: ANN401
    state = {name.removeprefix("sd."): value for name, value in vector.tensors.items() if name.startswith("sd.")}
    save_file(state, folder / "encoder.safetensors")
    told = vector.info["config"]
    config = UMT5Config.of({name: tuple(value.shape) for name, value in state.items()})
    assert (config.vocabulary, config.width, config.ffn) == (told["vocab"], told["dim"], told["dim_ffn"])
    assert (config.num_heads, config.depth, config.buckets) == (
        told["num_heads"],
        told["num_layers"],
        told["num_buckets"],
    )
    assert config.num_heads * config.head_width == told["dim_attn"]
    with torch.device("meta"):
        model = replace(config, max_distance=told["max_distance"]).build()
    load_weights(model, folder / "encoder.safetensors", UMT5_KEYS, optional=IGNORED)
    return model.eval()


@torch.no_grad()
def test_hidden_states(vector: Any, tmp_path: Path) -> None:  # noqa: ANN401
    model = loaded(vector, tmp_path)
    ids, mask = vector.tensors["in.ids"], vector.tensors["in.mask"]
    hidden = model(ids, mask)
    torch.testing.assert_close(hidden, vector.tensors["out.hidden"], **vector.tolerance)
    for row, length in enumerate(mask.sum(1).tolist()):
        alone = model(ids[row : row + 1, :length], mask[row : row + 1, :length])[0]
        torch.testing.assert_close(alone, vector.tensors[f"out.context{row}"], **vector.tolerance)


def test_the_key_map_is_the_recorded_one(vector: Any) -> None:  # noqa: ANN401
    told = vector.info["map_transformers_UMT5EncoderModel_to_these_keys"]
    ours = {target: source.names[0] for target, source in UMT5_KEYS(list(told.values())).items()}
    embedding = ours.pop("encoder.embed_tokens.weight")
    assert ours | {"shared.weight": embedding} == told


@torch.no_grad()
@pytest.mark.parametrize("tied", [("shared.weight",), ("shared.weight", "encoder.embed_tokens.weight")], ids=len)
def test_hub_names_load_the_same(vector: Any, tied: tuple[str, ...], tmp_path: Path) -> None:  # noqa: ANN401
    told = vector.info["map_transformers_UMT5EncoderModel_to_these_keys"]
    hub = {name: vector.tensors[f"sd.{published}"] for name, published in told.items() if name != "shared.weight"}
    hub |= {name: vector.tensors["sd.token_embedding.weight"].clone() for name in tied}
    hub["decoder.block.0.layer.0.SelfAttention.q.weight"] = torch.zeros(2, 2)
    given = {name: value for name, value in vector.tensors.items() if not name.startswith("sd.")}
    model = loaded(replace(vector, tensors={f"sd.{name}": value for name, value in hub.items()} | given), tmp_path)
    hidden = model(given["in.ids"], given["in.mask"])
    torch.testing.assert_close(hidden, given["out.hidden"], **vector.tolerance)
