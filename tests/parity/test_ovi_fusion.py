"""The twin model against recorded runs: joint, clean first frame, skipped block, padded, ragged, each tower alone."""

import re
from typing import Any

import torch
from torch import Tensor

from soundstage.core import AV, Conditions, tap
from soundstage.models.twin import TWIN_KEYS, Twin, TwinConfig

STEM = "ovi_fusion"


def build(vector: Any) -> Twin:  # noqa: ANN401
    """The recorded model."""
    state = {key.removeprefix("sd."): value for key, value in vector.tensors.items() if key.startswith("sd.")}
    said = vector.info["config"]
    config = TwinConfig.of(
        {name: tuple(value.shape) for name, value in state.items()},
        num_heads=said["video"]["num_heads"],
        text_length=said["video"]["text_len"],
        eps=said["video"]["eps"],
        audio_rope_scale=said["audio"]["temporal_rope_scaling_factor"],
    )
    for name, tower in config.towers.items():
        assert (tower.width, tower.hidden, tower.depth) == tuple(
            said[name][k] for k in ("dim", "ffn_dim", "num_layers")
        )
    model = config.build()
    model.load_state_dict({ours: state[source.names[0]] for ours, source in TWIN_KEYS(list(state)).items()})
    return model.eval()


def latents(vector: Any) -> AV[Tensor]:  # noqa: ANN401
    """The first sample as a batch of one."""
    return AV(video=vector.tensors["in.video"][None], audio=vector.tensors["in.audio"].T[None])


def text(vector: Any, prefix: str = "in.", number: str = "") -> Conditions:  # noqa: ANN401
    """The texts of one sample."""
    given = vector.tensors
    return Conditions(text=AV(**{name: given[f"{prefix}{name}_context{number}"][None] for name in ("video", "audio")}))


def times(vector: Any, clean: bool) -> AV[Tensor]:  # noqa: ANN401
    """One time for both; with a clean first frame the video's is per frame, 0 at the first."""
    t = vector.tensors["in.t"].double() / 1000
    if not clean:
        return AV(video=t, audio=t)
    per_frame = t[:, None].repeat(1, vector.tensors["in.video"].shape[1])
    per_frame[:, 0] = 0
    return AV(video=per_frame, audio=t)


def same(vector: Any, out: AV[Tensor], call: str) -> None:  # noqa: ANN401
    """The first sample is the recorded one."""
    for name, value in out.items():
        mine = value[0] if name == "video" else value[0].T
        torch.testing.assert_close(mine, vector.tensors[f"out.{call}.{name}"], **vector.tolerance)


@torch.no_grad()
def test_joint_runs(vector: Any) -> None:  # noqa: ANN401
    model, x = build(vector), latents(vector)
    for call, clean in (("t2av", False), ("i2av", True)):
        same(vector, model(x, times(vector, clean), text(vector)), call)


@torch.no_grad()
def test_inner_values(vector: Any) -> None:  # noqa: ANN401
    model, given = build(vector), vector.tensors
    parts = {"tokens": "patch_embedding", "time_embedding": "time_embedding", "context": "text_embedding"}
    with tap(model, [f"{name}.{part}" for name in ("video", "audio") for part in parts.values()]) as seen:
        model(latents(vector), times(vector, clean=True), text(vector))
    for name in ("video", "audio"):
        for recorded, part in parts.items():
            mine, theirs = seen[f"{name}.{part}"], given[f"mid.{name}.{recorded}"]
            if recorded == "tokens":
                mine = mine.flatten(2).transpose(1, 2)
            if recorded == "time_embedding":  # recorded per token, computed per step
                mine = mine.repeat_interleave(theirs.shape[1] // mine.shape[1], dim=1)
            torch.testing.assert_close(mine, theirs, **vector.tolerance)


@torch.no_grad()
def test_a_skipped_block(vector: Any) -> None:  # noqa: ANN401
    model = build(vector)
    calls = {m[1]: int(m[2]) for key in vector.tensors if (m := re.fullmatch(r"out\.(slg(\d+))\.video", key))}
    assert calls
    for call, block in calls.items():
        same(vector, model.skipping((block,))(latents(vector), times(vector, False), text(vector)), call)


@torch.no_grad()
def test_padded_sequences(vector: Any) -> None:  # noqa: ANN401
    said = vector.info["calls"]["padded_i2av"]
    video, audio = (int(n) for n in re.findall(r"(\d+)", said.replace("i2av", "")))
    lengths = AV(video=video, audio=audio)
    same(vector, build(vector).run(latents(vector), times(vector, True), text(vector), lengths=lengths), "padded_i2av")


@torch.no_grad()
def test_a_batch_of_several_sizes(vector: Any) -> None:  # noqa: ANN401
    given = vector.tensors
    numbers = range(1, len(given["in.batch2.t"]))
    x = AV(
        video=[given["in.video"], *(given[f"in.batch2.video{i}"] for i in numbers)],
        audio=[given["in.audio"].T, *(given[f"in.batch2.audio{i}"].T for i in numbers)],
    )
    cond = Conditions.cat([text(vector), *(text(vector, "in.batch2.", str(i)) for i in numbers)])
    t = given["in.batch2.t"].double() / 1000
    out = build(vector).run(x, AV(video=t, audio=t), cond)
    for i in range(len(t)):
        torch.testing.assert_close(out["video"][i], given[f"out.batch2.video{i}"], **vector.tolerance)
        torch.testing.assert_close(out["audio"][i].T, given[f"out.batch2.audio{i}"], **vector.tolerance)


@torch.no_grad()
def test_a_time_per_token(vector: Any) -> None:  # noqa: ANN401
    x = latents(vector).replace(audio=vector.tensors["in.pertoken.audio"].T[None])
    t = vector.tensors["in.pertoken.t"].double() / 1000
    out = build(vector).run(x, AV(video=t, audio=t), text(vector), per_token=True)
    same(vector, out, "pertoken")


@torch.no_grad()
def test_either_tower_alone(vector: Any) -> None:  # noqa: ANN401
    model = build(vector)
    for name, clean in (("video", True), ("audio", False)):
        out = model(latents(vector).only(name), times(vector, clean).only(name), text(vector).only(name))
        assert out.modalities == (name,)
        same(vector, out, f"{name}_only")
