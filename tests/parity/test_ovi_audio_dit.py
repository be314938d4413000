"""Ovi's audio tower by itself against recorded runs."""

from typing import Any

import torch
from torch import Tensor

from soundstage.core import AV, Conditions

STEM = "ovi_audio_dit"


def texts(*rows: Tensor) -> Conditions:
    """Texts of unequal length as one batch."""
    return Conditions.cat([Conditions(text=AV(audio=text[None])) for text in rows])


@torch.no_grad()
def test_one_sample(vector: Any, wan: Any) -> None:  # noqa: ANN401
    x, t = vector.tensors["in.audio"].T[None], vector.tensors["in.t"].double() / 1000
    out = wan(AV(audio=x), AV(audio=t), texts(vector.tensors["in.context"]))
    torch.testing.assert_close(out["audio"][0].T, vector.tensors["out.audio"], **vector.tolerance)


@torch.no_grad()
def test_a_batch_of_several_lengths(vector: Any, wan: Any) -> None:  # noqa: ANN401
    given = vector.tensors
    count = len(given["in.batch2.t"])
    sounds = [given["in.audio"], *(given[f"in.batch2.audio{i}"] for i in range(1, count))]
    words = [given["in.context"], *(given[f"in.batch2.context{i}"] for i in range(1, count))]
    out = wan.run([x.T for x in sounds], given["in.batch2.t"].double() / 1000, texts(*words))
    for i, sample in enumerate(out):
        torch.testing.assert_close(sample.T, given[f"out.batch2.audio{i}"], **vector.tolerance)
