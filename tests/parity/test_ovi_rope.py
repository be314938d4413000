"""Rotary tables and the rotation of queries against recorded ones."""

from typing import Any

import torch

from soundstage.models.layers.wan_rotary import axis_pairs, rotate, rotations

STEM = "ovi_rope"


def test_tables(vector: Any) -> None:  # noqa: ANN401
    """Row p of the recorded table is position p on every axis at once."""
    info, rows = vector.info, vector.tensors["rows"].tolist()
    width, pairs = info["head_dim"], info["complex_dims"]["video"]
    assert axis_pairs(width) == tuple(pairs)
    time = rotations((max(rows) + 1,), width)[rows][:, : pairs[0]]
    side = rotations((1, max(rows) + 1, 1), width)[rows][:, pairs[0] : pairs[0] + pairs[1]]
    torch.testing.assert_close(torch.cat([time, side, side], dim=1), vector.tensors["video_freqs"], **vector.tolerance)
    scaled = rotations((max(rows) + 1,), width, info["audio_scale"])[rows]
    torch.testing.assert_close(scaled[:, : pairs[0]], vector.tensors["audio_freqs"], **vector.tolerance)
    still = torch.tensor([1.0, 0.0], dtype=torch.float64)
    assert torch.equal(scaled[:, pairs[0] :], still.expand_as(scaled[:, pairs[0] :]))


def test_queries(vector: Any) -> None:  # noqa: ANN401
    """Tokens behind the grid are padding and stay as they are."""
    for name, scale in (("video", 1.0), ("audio", vector.info["audio_scale"])):
        q, grid = vector.tensors[f"in.{name}_q"], vector.tensors[f"in.{name}_grid"]
        tables = torch.tensor([1.0, 0.0]).repeat(*q.shape[:2], 1, q.shape[-1] // 2, 1)
        for table, shape in zip(tables, grid.tolist(), strict=True):
            own = rotations(tuple(shape), q.shape[-1], scale)
            table[: len(own), 0] = own
        torch.testing.assert_close(rotate(q, tables), vector.tensors[f"out.{name}_q"], **vector.tolerance)


def test_the_plain_arithmetic_equals_the_complex_one(vector: Any) -> None:  # noqa: ANN401
    """Compilers take the one, eager float32 the other."""
    q = vector.tensors["in.video_q"]
    table = rotations((q.shape[1], 1, 1), q.shape[-1])[None, :, None].float()
    torch.testing.assert_close(rotate(q.double(), table).float(), rotate(q, table), rtol=1e-6, atol=1e-6)
