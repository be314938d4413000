"""Wan2.1 text-to-video against recorded runs, block by block, padded, and in a batch of several sizes."""

from typing import Any

import torch
from torch import Tensor

from soundstage.core import AV, Conditions, tap
from soundstage.models.wan import WAN_KEYS, Wan, WanConfig

STEM = "wan21_dit_t2v"


def build(vector: Any) -> Wan:  # noqa: ANN401
    """The recorded model."""
    state = {key.removeprefix("sd."): value for key, value in vector.tensors.items() if key.startswith("sd.")}
    said = vector.info["config"]
    config = WanConfig.of(
        {name: tuple(value.shape) for name, value in state.items()},
        num_heads=said["num_heads"],
        text_length=said["text_len"],
        eps=said["eps"],
    )
    assert (config.in_channels, config.out_channels) == (said["in_dim"], said["out_dim"])
    assert (config.frequencies, config.text_width) == (said["freq_dim"], said["text_dim"])
    model = config.build()
    model.load_state_dict({ours: state[source.names[0]] for ours, source in WAN_KEYS(list(state)).items()})
    return model.eval()


def inputs(vector: Any, *numbers: int) -> tuple[list[Tensor], Tensor, Conditions]:  # noqa: ANN401
    """Videos, times and texts of these samples."""
    given = vector.tensors
    texts = [Conditions(text=AV(video=given[f"in.context{i}"][None])) for i in numbers]
    times = given["in.t"].double()[list(numbers)] / 1000
    return [given[f"in.video{i}"] for i in numbers], times, Conditions.cat(texts)


@torch.no_grad()
def test_one_sample_block_by_block(vector: Any) -> None:  # noqa: ANN401
    model, given = build(vector), vector.tensors
    (video,), t, cond = inputs(vector, 0)
    blocks = [f"blocks.{i}" for i in range(len(model.blocks))]
    with tap(model, ["patch_embedding", "time_embedding", "time_projection", "text_embedding", *blocks]) as seen:
        out = model(AV(video=video[None]), AV(video=t), cond)["video"][0]
    close = vector.tolerance
    torch.testing.assert_close(seen["patch_embedding"].flatten(2).transpose(1, 2), given["mid.tokens"], **close)
    torch.testing.assert_close(seen["time_embedding"][:, 0], given["mid.time_embedding"], **close)
    torch.testing.assert_close(seen["time_projection"][:, 0], given["mid.time_projection"].flatten(1), **close)
    torch.testing.assert_close(seen["text_embedding"], given["mid.text_embedding"], **close)
    for i, name in enumerate(blocks):
        torch.testing.assert_close(seen[name][0], given[f"mid.block{i}"], **close)
    torch.testing.assert_close(out, given["out.video0"], **close)


@torch.no_grad()
def test_a_padded_sequence(vector: Any) -> None:  # noqa: ANN401
    videos, t, cond = inputs(vector, 0)
    (out,) = build(vector).run(videos, t, cond, length=vector.info["seq_len_padded"])
    torch.testing.assert_close(out, vector.tensors["out.padded.video0"], **vector.tolerance)


@torch.no_grad()
def test_a_batch_of_several_sizes(vector: Any) -> None:  # noqa: ANN401
    numbers = range(len(vector.tensors["in.t"]))
    videos, t, cond = inputs(vector, *numbers)
    out = build(vector).run(videos, t, cond, length=vector.info["seq_len_batch2"])
    for i in numbers:
        torch.testing.assert_close(out[i], vector.tensors[f"out.batch2.video{i}"], **vector.tolerance)
