"""Wan2.1 image-to-video against recorded runs: control latents on the channels, image tokens in every block."""

from typing import Any

import torch

from soundstage.core import AV, Conditions, tap
from soundstage.models.wan import WAN_KEYS, Wan, WanConfig

STEM = "wan21_dit_i2v"


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
    assert (config.image_width, config.in_channels) == (said["clip_dim"], said["in_dim"])
    model = config.build()
    model.load_state_dict({ours: state[source.names[0]] for ours, source in WAN_KEYS(list(state)).items()})
    return model.eval()


def texts(vector: Any) -> Conditions:  # noqa: ANN401
    """The texts of all samples and the image features."""
    count = len(vector.tensors["in.t"])
    cond = [Conditions(text=AV(video=vector.tensors[f"in.context{i}"][None])) for i in range(count)]
    joined = Conditions.cat(cond)
    return Conditions(text=joined.text, text_mask=joined.text_mask, reference=vector.tensors["in.clip"])


@torch.no_grad()
def test_the_velocity(vector: Any) -> None:  # noqa: ANN401
    """As a list of ready inputs, which may be of several sizes; recorded inner values too."""
    model, given = build(vector), vector.tensors
    inner = {key: key.removeprefix("mid.").replace("block", "blocks.", 1) for key in given if key.startswith("mid.")}
    t, cond = given["in.t"].double() / 1000, texts(vector)
    joined = [torch.cat([given[f"in.video{i}"], given[f"in.y{i}"]]) for i in range(len(t))]
    with tap(model, inner.values()) as seen:
        out = model.run(joined, t, cond)
    for i, sample in enumerate(out):
        torch.testing.assert_close(sample, given[f"out.video{i}"], **vector.tolerance)
    for key, name in inner.items():
        mine = seen[name][0] if isinstance(seen[name], tuple) else seen[name]
        torch.testing.assert_close(mine, given[key], **vector.tolerance)


@torch.no_grad()
def test_through_conditions(vector: Any) -> None:  # noqa: ANN401
    model, given = build(vector), vector.tensors
    t, cond = given["in.t"].double() / 1000, texts(vector)
    for i in range(len(t)):
        own = cond.map(lambda x, i=i: x[i : i + 1])
        control = AV(video=given[f"in.y{i}"][None])
        told = Conditions(text=own.text, text_mask=own.text_mask, reference=own.reference, control=control)
        out = model(AV(video=given[f"in.video{i}"][None]), AV(video=t[i : i + 1]), told)
        torch.testing.assert_close(out["video"][0], given[f"out.video{i}"], **vector.tolerance)
