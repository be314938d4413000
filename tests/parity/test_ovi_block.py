"""One fused block of both towers against a recorded one: a batch of unequal lengths, modulation per token."""

from typing import Any

import torch
from torch import Tensor

from soundstage.models.layers.wan_block import Other, Stream, layer_norm
from soundstage.models.layers.wan_rotary import rotations
from soundstage.models.twin import FusedBlock, TwinConfig
from soundstage.models.wan import WanConfig

STEM = "ovi_block"
TOWERS = ("video", "audio")


def build(vector: Any) -> tuple[FusedBlock, TwinConfig]:  # noqa: ANN401
    """The recorded block, and the config it follows from."""
    towers = {}
    for name in TOWERS:
        said = vector.info["config"][name]
        towers[name] = WanConfig(
            width=said["dim"],
            hidden=said["ffn_dim"],
            num_heads=said["num_heads"],
            depth=said["num_layers"],
            in_channels=said["in_dim"],
            out_channels=said["out_dim"],
            patch=tuple(said["patch_size"]),
            text_length=said["text_len"],
            eps=said["eps"],
        )
    scale = vector.info["config"]["audio"]["temporal_rope_scaling_factor"]
    config = TwinConfig(**towers, audio_rope_scale=scale)
    block = FusedBlock(config).eval()
    state = {key.removeprefix("sd."): value for key, value in vector.tensors.items() if key.startswith("sd.")}
    ours = {key.replace("_block.", ".").replace("modulation.modulation", "modulation"): x for key, x in state.items()}
    block.load_state_dict(ours)
    return block, config


def stream(vector: Any, name: str, config: WanConfig) -> Stream:  # noqa: ANN401
    """What the block is told of one tower; its rows of modulation are one per token."""
    given = vector.tensors
    batch, length = given[f"in.{name}"].shape[:2]
    head = config.width // config.num_heads
    rotation = torch.zeros(batch, length, 1, head // 2, 2)
    for i, grid in enumerate(given[f"in.{name}_grid"].tolist()):
        own = rotations(tuple(grid), head, config.time_scale).float()
        rotation[i, : len(own), 0] = own
    counts = tuple(given[f"in.{name}_lens"].tolist())
    return Stream(given[f"in.{name}_e"], None, rotation, counts, given[f"in.{name}_context"], None)


def same(vector: Any, mine: Tensor, key: str, lengths: Tensor) -> None:  # noqa: ANN401
    """The real tokens of every sample are the recorded ones."""
    for i, count in enumerate(lengths.tolist()):
        torch.testing.assert_close(mine[i, :count], vector.tensors[key][i, :count], **vector.tolerance)


@torch.no_grad()
def test_the_block(vector: Any) -> None:  # noqa: ANN401
    block, config = build(vector)
    x = {name: vector.tensors[f"in.{name}"] for name in TOWERS}
    streams = {name: stream(vector, name, config.towers[name]) for name in TOWERS}
    out, kv = block(x, streams, dict.fromkeys(TOWERS))
    again, _ = block(x, streams, kv)
    for name in TOWERS:
        same(vector, out[name], f"out.{name}", vector.tensors[f"in.{name}_lens"])
        assert torch.equal(out[name], again[name]), "keys and values given back"


@torch.no_grad()
def test_fused_cross_attention_alone(vector: Any) -> None:  # noqa: ANN401
    block, config = build(vector)
    streams = {name: stream(vector, name, config.towers[name]) for name in TOWERS}
    for name, other in (TOWERS, TOWERS[::-1]):
        own = getattr(block, name)
        x = layer_norm(own.norm3, vector.tensors[f"in.{name}"])
        read = Other(vector.tensors[f"in.{other}"], streams[other].rotation, streams[other].lengths)
        kv = own.cross_attn.keys(streams[name].text, None)
        out = own.cross_attn(x, kv, streams[name].rotation, read)
        same(vector, out, f"out.{name}_cross_attn_only", vector.tensors[f"in.{name}_lens"])
