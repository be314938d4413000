"""Wan2.2's transformer alone, with a time per token, against recorded runs."""

from typing import Any

import torch

from soundstage.core import AV, Conditions
from soundstage.models.wan import WAN_KEYS, Wan, WanConfig

STEM = "wan22_dit"


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
    assert (config.width, config.hidden, config.depth) == (said["dim"], said["ffn_dim"], said["num_layers"])
    model = config.build()
    model.load_state_dict({ours: state[source.names[0]] for ours, source in WAN_KEYS(list(state)).items()})
    return model.eval()


@torch.no_grad()
def test_the_velocity(vector: Any) -> None:  # noqa: ANN401
    model = build(vector)
    video, text = vector.tensors["in.video"], vector.tensors["in.context"]
    cond = Conditions(text=AV(video=text[None]))
    for told, recorded in (("t_tokens", "i2v"), ("t_tokens_uniform", "t2v")):
        t = vector.tensors[f"in.{told}"].double() / 1000
        (out,) = model.run([video], t, cond, per_token=True)
        torch.testing.assert_close(out, vector.tensors[f"out.{recorded}"], **vector.tolerance)


@torch.no_grad()
def test_a_time_per_frame_is_the_same(vector: Any) -> None:  # noqa: ANN401
    model = build(vector)
    video, text = vector.tensors["in.video"], vector.tensors["in.context"]
    cond = Conditions(text=AV(video=text[None]))
    for told, recorded in (("t_tokens", "i2v"), ("t_tokens_uniform", "t2v")):
        per_frame = vector.tensors[f"in.{told}"].unflatten(1, (video.shape[1], -1))
        assert torch.equal(per_frame, per_frame[..., :1].expand_as(per_frame))
        out = model(AV(video=video[None]), AV(video=per_frame[..., 0].double() / 1000), cond)
        torch.testing.assert_close(out["video"][0], vector.tensors[f"out.{recorded}"], **vector.tolerance)
