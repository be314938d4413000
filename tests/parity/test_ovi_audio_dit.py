"""Ovi's audio tower by itself against recorded runs."""

from typing import Any

import torch
from torch import Tensor

from soundstage.core import AV, Conditions
from soundstage.models.wan import WAN_KEYS, Wan, WanConfig

STEM = "ovi_audio_dit"


def build(vector: Any) -> Wan:  # noqa: ANN401
    """The recorded tower."""
    state = {key.removeprefix("sd."): value for key, value in vector.tensors.items() if key.startswith("sd.")}
    said = vector.info["config"]
    config = WanConfig.of(
        {name: tuple(value.shape) for name, value in state.items()},
        num_heads=said["num_heads"],
        text_length=said["text_len"],
        eps=said["eps"],
        time_scale=said["temporal_rope_scaling_factor"],
    )
    assert config.modality == "audio"
    assert (config.in_channels, config.out_channels) == (said["in_dim"], said["out_dim"])
    model = config.build()
    model.load_state_dict({ours: state[source.names[0]] for ours, source in WAN_KEYS(list(state)).items()})
    return model.eval()


def texts(*rows: Tensor) -> Conditions:
    """Texts of unequal length as one batch."""
    return Conditions.cat([Conditions(text=AV(audio=text[None])) for text in rows])


@torch.no_grad()
def test_one_sample(vector: Any) -> None:  # noqa: ANN401
    x, t = vector.tensors["in.audio"].T[None], vector.tensors["in.t"].double() / 1000
    out = build(vector)(AV(audio=x), AV(audio=t), texts(vector.tensors["in.context"]))
    torch.testing.assert_close(out["audio"][0].T, vector.tensors["out.audio"], **vector.tolerance)


@torch.no_grad()
def test_a_batch_of_several_lengths(vector: Any) -> None:  # noqa: ANN401
    given = vector.tensors
    count = len(given["in.batch2.t"])
    sounds = [given["in.audio"], *(given[f"in.batch2.audio{i}"] for i in range(1, count))]
    words = [given["in.context"], *(given[f"in.batch2.context{i}"] for i in range(1, count))]
    out = build(vector).run([x.T for x in sounds], given["in.batch2.t"].double() / 1000, texts(*words))
    for i, sample in enumerate(out):
        torch.testing.assert_close(sample.T, given[f"out.batch2.audio{i}"], **vector.tolerance)
