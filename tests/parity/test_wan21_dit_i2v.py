"""Wan2.1 image-to-video against recorded runs: control latents on the channels, image tokens in every block."""

from typing import Any

import torch

from soundstage.core import AV, Conditions, tap

STEM = "wan21_dit_i2v"


def texts(vector: Any) -> Conditions:  # noqa: ANN401
    """The texts of all samples and the image features."""
    count = len(vector.tensors["in.t"])
    cond = [Conditions(text=AV(video=vector.tensors[f"in.context{i}"][None])) for i in range(count)]
    joined = Conditions.cat(cond)
    return Conditions(text=joined.text, text_mask=joined.text_mask, reference=vector.tensors["in.clip"])


@torch.no_grad()
def test_the_velocity(vector: Any, wan: Any) -> None:  # noqa: ANN401
    """As a list of ready inputs, which may be of several sizes; recorded inner values too."""
    given = vector.tensors
    inner = {key: key.removeprefix("mid.").replace("block", "blocks.", 1) for key in given if key.startswith("mid.")}
    t, cond = given["in.t"].double() / 1000, texts(vector)
    joined = [torch.cat([given[f"in.video{i}"], given[f"in.y{i}"]]) for i in range(len(t))]
    with tap(wan, inner.values()) as seen:
        out = wan.run(joined, t, cond)
    for i, sample in enumerate(out):
        torch.testing.assert_close(sample, given[f"out.video{i}"], **vector.tolerance)
    for key, name in inner.items():
        mine = seen[name][0] if isinstance(seen[name], tuple) else seen[name]
        torch.testing.assert_close(mine, given[key], **vector.tolerance)


@torch.no_grad()
def test_through_conditions(vector: Any, wan: Any) -> None:  # noqa: ANN401
    given = vector.tensors
    t, cond = given["in.t"].double() / 1000, texts(vector)
    for i in range(len(t)):
        own = cond.map(lambda x, i=i: x[i : i + 1])
        control = AV(video=given[f"in.y{i}"][None])
        told = Conditions(text=own.text, text_mask=own.text_mask, reference=own.reference, control=control)
        out = wan(AV(video=given[f"in.video{i}"][None]), AV(video=t[i : i + 1]), told)
        torch.testing.assert_close(out["video"][0], given[f"out.video{i}"], **vector.tolerance)
