"""Wan2.2's transformer alone, with a time per token, against recorded runs."""

from typing import Any

import torch

from soundstage.core import AV, Conditions

STEM = "wan22_dit"


@torch.no_grad()
def test_the_velocity(vector: Any, wan: Any) -> None:  # noqa: ANN401
    video, text = vector.tensors["in.video"], vector.tensors["in.context"]
    cond = Conditions(text=AV(video=text[None]))
    for told, recorded in (("t_tokens", "i2v"), ("t_tokens_uniform", "t2v")):
        t = vector.tensors[f"in.{told}"].double() / 1000
        (out,) = wan.run([video], t, cond, per_token=True)
        torch.testing.assert_close(out, vector.tensors[f"out.{recorded}"], **vector.tolerance)


@torch.no_grad()
def test_a_time_per_frame_is_the_same(vector: Any, wan: Any) -> None:  # noqa: ANN401
    video, text = vector.tensors["in.video"], vector.tensors["in.context"]
    cond = Conditions(text=AV(video=text[None]))
    for told, recorded in (("t_tokens", "i2v"), ("t_tokens_uniform", "t2v")):
        per_frame = vector.tensors[f"in.{told}"].unflatten(1, (video.shape[1], -1))
        assert torch.equal(per_frame, per_frame[..., :1].expand_as(per_frame))
        out = wan(AV(video=video[None]), AV(video=per_frame[..., 0].double() / 1000), cond)
        torch.testing.assert_close(out["video"][0], vector.tensors[f"out.{recorded}"], **vector.tolerance)
