"""Wan2.1 text-to-video against recorded runs, block by block, padded, and in a batch of several sizes."""

from typing import Any

import torch
from torch import Tensor

from soundstage.core import AV, Conditions, tap

STEM = "wan21_dit_t2v"


def inputs(vector: Any, *numbers: int) -> tuple[list[Tensor], Tensor, Conditions]:  # noqa: ANN401
    """Videos, times and texts of these samples."""
    given = vector.tensors
    texts = [Conditions(text=AV(video=given[f"in.context{i}"][None])) for i in numbers]
    times = given["in.t"].double()[list(numbers)] / 1000
    return [given[f"in.video{i}"] for i in numbers], times, Conditions.cat(texts)


@torch.no_grad()
def test_one_sample_block_by_block(vector: Any, wan: Any) -> None:  # noqa: ANN401
    given = vector.tensors
    (video,), t, cond = inputs(vector, 0)
    blocks = [f"blocks.{i}" for i in range(len(wan.blocks))]
    with tap(wan, ["patch_embedding", "time_embedding", "time_projection", "text_embedding", *blocks]) as seen:
        out = wan(AV(video=video[None]), AV(video=t), cond)["video"][0]
    close = vector.tolerance
    torch.testing.assert_close(seen["patch_embedding"].flatten(2).transpose(1, 2), given["mid.tokens"], **close)
    torch.testing.assert_close(seen["time_embedding"][:, 0], given["mid.time_embedding"], **close)
    torch.testing.assert_close(seen["time_projection"][:, 0], given["mid.time_projection"].flatten(1), **close)
    torch.testing.assert_close(seen["text_embedding"], given["mid.text_embedding"], **close)
    for i, name in enumerate(blocks):
        torch.testing.assert_close(seen[name][0], given[f"mid.block{i}"], **close)
    torch.testing.assert_close(out, given["out.video0"], **close)


@torch.no_grad()
def test_a_padded_sequence(vector: Any, wan: Any) -> None:  # noqa: ANN401
    videos, t, cond = inputs(vector, 0)
    (out,) = wan.run(videos, t, cond, length=vector.info["seq_len_padded"])
    torch.testing.assert_close(out, vector.tensors["out.padded.video0"], **vector.tolerance)


@torch.no_grad()
def test_a_batch_of_several_sizes(vector: Any, wan: Any) -> None:  # noqa: ANN401
    numbers = range(len(vector.tensors["in.t"]))
    videos, t, cond = inputs(vector, *numbers)
    out = wan.run(videos, t, cond, length=vector.info["seq_len_batch2"])
    for i in numbers:
        torch.testing.assert_close(out[i], vector.tensors[f"out.batch2.video{i}"], **vector.tolerance)
