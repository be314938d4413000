"""Wan and the twin over two processes: tokens split between them (Ulysses) and weights sharded (FSDP2) equal one."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from soundstage.core import AV, Conditions
from soundstage.core.attention import Attend, Tokens
from soundstage.core.causal import Cache, Chunking, cut
from soundstage.core.denoiser import StreamGeometry
from soundstage.models.twin import TwinConfig
from soundstage.models.wan import WanConfig

VIDEO = WanConfig(32, 56, 2, 2, in_channels=6, out_channels=6, frequencies=32, text_width=24, text_length=12)
TWIN = TwinConfig(VIDEO, replace(VIDEO, in_channels=5, out_channels=5, patch=(1,)))
IMAGE = replace(VIDEO, in_channels=10, image_width=20)
CLOCKS = AV(
    StreamGeometry(Fraction(8), 4, channels=6, causal_first=True), StreamGeometry(Fraction(1600), 400, channels=5)
)
CAUSAL = TWIN.as_causal(Chunking(Fraction(1)), CLOCKS)
WORLD = 2


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def model(config: WanConfig | TwinConfig) -> nn.Module:
    """The same on every process, nothing trivially zero."""
    torch.manual_seed(0)
    built = config.build()
    for parameter in built.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    return built


def text(batch: int) -> Conditions:
    return Conditions(text=AV(video=noise(batch, 7, 24, seed=5), audio=noise(batch, 7, 24, seed=6)))


def dense(frames: int, width: int, steps: int) -> tuple[AV[Tensor], AV[Tensor], Conditions]:
    """A batch of two with a time per frame and a clean first one; frames * width tokens of video."""
    x = AV(video=noise(2, 6, frames, 2, 2 * width, seed=1), audio=noise(2, 5, steps, seed=2))
    t = torch.tensor([[0.2], [0.9]]).repeat(1, frames)
    t[:, 0] = 0
    return x, AV(video=t, audio=torch.tensor([0.2, 0.9])), text(2)


def wan(net: Any) -> list[Tensor]:  # noqa: ANN401
    """15 tokens, image to video."""
    x, t, cond = dense(5, 3, 4)
    cond = replace(
        cond.only("video"), control=AV(video=noise(2, 4, 5, 2, 6, seed=3)), reference=noise(2, 5, 20, seed=4)
    )
    return list(net(x.only("video"), t.only("video"), cond).values())


def even(net: Any) -> list[Tensor]:  # noqa: ANN401
    """16 and 6 tokens."""
    return list(net(*dense(4, 4, 6)).values())


def odd(net: Any) -> list[Tensor]:  # noqa: ANN401
    """15 and 7 tokens."""
    return list(net(*dense(5, 3, 7)).values())


def ragged(net: Any) -> list[Tensor]:  # noqa: ANN401
    """Two sizes in one batch, padded to 15 and 7 tokens; a time per frame."""
    x = AV(
        video=[noise(6, 2, 4, 6, seed=1), noise(6, 5, 2, 2, seed=2)], audio=[noise(5, 7, seed=3), noise(5, 4, seed=4)]
    )
    t = AV(video=torch.rand(2, 5, generator=torch.Generator().manual_seed(0)), audio=torch.tensor([0.2, 0.9]))
    out = net.run(x, t, text(2), lengths=AV(video=15, audio=7))
    return [*out["video"], *out["audio"]]


def tokenwise(net: Any) -> list[Tensor]:  # noqa: ANN401
    """A time per token."""
    x, _, cond = dense(5, 3, 7)
    t = AV(video=noise(2, 15, seed=7).sigmoid(), audio=noise(2, 7, seed=8).sigmoid())
    return list(net.run(x, t, cond, per_token=True).values())


def in_chunks(net: Any) -> list[Tensor]:  # noqa: ANN401
    """Of 9 and 6 tokens of video, 4 and 3 of audio: the clip in one call, then chunk by chunk."""
    x, t, cond = dense(5, 3, 7)
    out, cache = [*net(x, t, cond).values()], Cache()
    for chunk in net.chunks(AV(5, 7)):
        v, cache = net.extend(cache, cut(x, chunk), cut(t, chunk), cond)
        out += v.values()
    return out


CALLS: dict[str, tuple[WanConfig | TwinConfig, Callable[[Any], list[Tensor]]]] = {
    "wan": (IMAGE, wan),
    "even": (TWIN, even),
    "odd": (TWIN, odd),
    "ragged": (TWIN, ragged),
    "tokenwise": (TWIN, tokenwise),
    "in chunks": (CAUSAL, in_chunks),
}


def outcome(net: nn.Module, call: Callable[[Any], list[Tensor]]) -> dict[str, Tensor]:
    """What comes out, and the gradient of every parameter."""
    out = call(net)
    sum(value.square().mean() for value in out).backward()  # type: ignore[union-attr]
    whole = {name: p.grad for name, p in net.named_parameters()}
    grads = {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in whole.items()}
    return {f"out.{i}": value.detach() for i, value in enumerate(out)} | grads  # type: ignore[return-value]


def work(rank: int, folder: Path, task: Callable[[str], dict[str, Tensor]]) -> None:
    """One of two processes: every case, its results written down by the first."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=WORLD)
    try:
        results = {name: task(name) for name in CALLS}
        torch.save(results, folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def split_tokens(name: str) -> dict[str, Tensor]:
    """Gradients are the mean over processes, as data parallel training takes it."""
    config, call = CALLS[name]
    net = model(config)
    for part in net.modules():
        if isinstance(part, Attend | Tokens):
            part.group = dist.group.WORLD
    result = outcome(net, call)
    for key, value in result.items():
        if not key.startswith("out."):
            dist.all_reduce(value)
            value /= WORLD
    return result


def sharded(name: str) -> dict[str, Tensor]:
    """Blocks and root sharded; blocks computed again in the backward pass."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    config, call = CALLS[name]
    net = model(config)
    net.checkpointing = True
    for block in net.blocks:  # type: ignore[union-attr]
        fully_shard(block)
    fully_shard(net)
    register_fsdp_forward_method(net, "run")
    return outcome(net, call)


@pytest.mark.parametrize("task", [split_tokens, sharded])
def test_two_processes_equal_one(task: Callable[[str], dict[str, Tensor]], tmp_path: Path) -> None:
    mp.start_processes(work, args=(tmp_path, task), nprocs=WORLD, start_method="fork")
    for rank in range(WORLD):
        results = torch.load(tmp_path / f"{rank}.pt")
        for name, (config, call) in CALLS.items():
            expected = outcome(model(config), call)
            assert results[name].keys() == expected.keys()
            for key, value in expected.items():
                told = lambda m, where=f"{name} {key} on {rank}": f"{where}: {m}"  # noqa: E731
                torch.testing.assert_close(results[name][key], value, rtol=1e-4, atol=1e-6, msg=told)
