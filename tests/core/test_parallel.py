"""Two processes give what one gives: a toy, a Wan tower and a twin, over a whole sampling loop with guidance."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from soundstage.core.attention import Attend, Tokens
from soundstage.core.av import AV
from soundstage.core.conditions import Conditions
from soundstage.core.errors import ConfigError, SoundstageError
from soundstage.core.guidance import Guided
from soundstage.core.parallel import context_parallel, init_from_env, leave, only_rank_zero
from soundstage.core.rng import Rng
from soundstage.core.sampling import unipc
from soundstage.core.schedule import shifted
from soundstage.inference.accelerate import Switches
from soundstage.models.twin import TwinConfig
from soundstage.models.unified_dit import UnifiedDiTConfig
from soundstage.models.wan import WanConfig

TOWER = WanConfig(32, 64, 4, 2, in_channels=4, out_channels=4, frequencies=16, text_width=12, text_length=6)
TWIN = TwinConfig(TOWER, replace(TOWER, in_channels=3, out_channels=3, patch=(1,)))
SHAPES = {"even": AV((4, 3, 4, 4), (3, 6)), "odd": AV((4, 3, 2, 6), (3, 7))}
"""12 video and 6 audio tokens; 9 video and 7 audio tokens."""


class Toy(nn.Module):
    """One layer of self-attention over the latent steps of the audio."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 2
        self.qkv, self.out = nn.Linear(3, 24), nn.Linear(8, 3)
        self.attend, self.tokens = Attend(), Tokens()

    def forward(self, x_t: AV[Tensor], t: AV[Tensor], cond: Conditions, *, r: AV[Tensor] | None = None) -> AV[Tensor]:
        assert r is None
        x = x_t["audio"].transpose(1, 2) * (1 + t["audio"][:, None, None]) + cond.text["audio"].mean()
        length = x.shape[1]
        x = self.tokens.split(x)
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).unbind(2)
        y = self.attend(q, k, v, (length,) * len(x))
        return AV(audio=self.tokens.gather(x + self.out(y.flatten(2)), length).transpose(1, 2))


def build(kind: str) -> nn.Module:
    torch.manual_seed(0)
    module = {"toy": Toy, "wan": TOWER.build, "twin": TWIN.build}[kind]().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter))
    return module


@torch.no_grad()
def sample(module: nn.Module, kind: str, shapes: AV[tuple[int, ...]], together: bool = True) -> tuple[Tensor, Tensor]:
    """Noise, and what three UniPC steps with guidance and a prompt of a batch of two make of it, each in one row."""
    names = {"toy": ("audio",), "wan": ("video",), "twin": ("video", "audio")}[kind]
    shapes = shapes.only(*names)
    noise = Rng.of(7, 2).fold("start").normal_like(shapes.map(lambda shape: torch.empty(2, *shape)))
    words = torch.randn(3, 5, 12, generator=torch.Generator().manual_seed(3))
    cond = Conditions(text=AV(words[:2], words[:2])).only(*names)
    negative = Conditions(text=AV(words[2:], words[2:])).only(*names)
    denoiser = Guided(module, negative, AV(4.0, 3.0).only(*names), together=together)
    x0 = unipc(denoiser, noise, shifted(3, AV(5.0, 5.0).only(*names)), cond)
    return tuple(torch.cat([part.flatten() for part in value.values()]) for value in (noise, x0))


def two(work: Callable[[Any, int], Any], folder: Path) -> list[Any]:
    """What work(group, rank) gives on each of two processes."""
    context = torch.multiprocessing.start_processes(
        _process, (work, str(folder)), nprocs=2, join=False, start_method="fork"
    )
    while not context.join():
        pass
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def _process(rank: int, work: Callable[[Any, int], Any], folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        torch.save(work(torch.distributed.group.WORLD, rank), Path(folder) / f"{rank}.pt")
    finally:
        leave()


@pytest.mark.parametrize("kind", ["toy", "wan", "twin"])
@pytest.mark.parametrize("shapes", list(SHAPES))
def test_a_sampling_loop_over_two_processes_equals_one(kind: str, shapes: str, tmp_path: Path) -> None:
    noise, wanted = sample(build(kind), kind, SHAPES[shapes])
    parts = two(lambda group, _: sample(context_parallel(build(kind), group), kind, SHAPES[shapes]), tmp_path)
    for own_noise, x0 in parts:
        assert torch.equal(own_noise, noise)
        assert float((x0 - wanted).abs().max() / wanted.abs().max()) < 1e-5
    assert torch.equal(parts[0][1], parts[1][1])


@pytest.mark.slow
def test_the_switches_work_over_two_processes(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    switches = Switches.parse("int8,offload,apart")
    _, wanted = sample(switches.apply(build("twin"), "cpu"), "twin", SHAPES["odd"], together=False)

    def work(group: Any, rank: int) -> Tensor:  # noqa: ANN401, ARG001
        module = context_parallel(switches.apply(build("twin"), "cpu"), group)
        assert switches.report(module)["attention"]["processes"] == 2
        return sample(module, "twin", SHAPES["odd"], together=False)[1]

    for x0 in two(work, tmp_path):
        assert float((x0 - wanted).abs().max() / wanted.abs().max()) < 1e-5


def test_without_a_group_it_is_one_process_again(tmp_path: Path) -> None:
    _, wanted = sample(build("twin"), "twin", SHAPES["odd"])

    def work(group: Any, rank: int) -> Tensor:  # noqa: ANN401, ARG001
        module = context_parallel(context_parallel(build("twin"), group), None)
        return sample(module, "twin", SHAPES["odd"])[1]

    assert all(torch.equal(x0, wanted) for x0 in two(work, tmp_path))


def _refused(group: Any, rank: int) -> list[str]:  # noqa: ANN401, ARG001
    told = []
    odd = replace(TOWER, width=48, num_heads=3).build()
    unified = UnifiedDiTConfig(width=32, depth=1, num_heads=2).build()
    for module in (odd, unified, nn.Linear(2, 2)):
        try:
            context_parallel(module, group)
        except ConfigError as error:
            told.append(str(error))
    return told


def test_heads_that_cannot_be_shared_are_refused_with_what_can(tmp_path: Path) -> None:
    heads, own, none = two(_refused, tmp_path)[0]
    assert heads == "context parallel: 2 processes cannot share the 3 attention heads of Wan; start 1 or 3"
    assert "the attention of UnifiedDiT cannot be shared" in own
    assert "the attention of Linear cannot be shared" in none


def _first_alone(group: Any, rank: int) -> tuple[Any, str]:  # noqa: ANN401
    made = only_rank_zero(lambda: f"made by {rank}", group)

    def fails() -> None:
        raise ValueError("disk is full")

    try:
        only_rank_zero(fails, group)
    except (ValueError, SoundstageError) as error:
        return made, f"{type(error).__name__}: {error}"
    return made, ""


def test_one_process_works_and_its_error_reaches_all(tmp_path: Path) -> None:
    first, second = two(_first_alone, tmp_path)
    assert first == ("made by 0", "ValueError: disk is full")
    assert second == (None, "SoundstageError: the first process stopped: ValueError: disk is full")
    assert only_rank_zero(lambda: 3, None) == 3


def test_without_torchrun_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert init_from_env("cpu") == (None, 0, torch.device("cpu"))
    assert init_from_env()[2].type == ("cuda" if torch.cuda.is_available() else "cpu")
    leave()
    module = build("toy")
    assert context_parallel(module, None) is module
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="RANK is '' in the environment, not a number; start with"):
        init_from_env("cpu")
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ConfigError, match="WORLD_SIZE is 'two'"):
        init_from_env("cpu")


SCRIPT = """
import sys, torch
from dataclasses import replace
from soundstage.core.av import AV
from soundstage.core.conditions import Conditions
from soundstage.core.parallel import context_parallel, init_from_env, leave, only_rank_zero
from soundstage.models.wan import WanConfig

torch.set_num_threads(1)
group, rank, device = init_from_env("cpu")
torch.manual_seed(0)
module = WanConfig(32, 64, 4, 2, 4, 4, frequencies=16, text_width=12, text_length=6).build()
torch.nn.init.normal_(module.head.head.weight)
context_parallel(module, group)
with torch.no_grad():
    v = module(AV(torch.randn(1, 4, 3, 2, 6)), AV(torch.tensor([0.5])), Conditions())["video"]
only_rank_zero(lambda: torch.save(v, sys.argv[1]), group)
leave()
"""


@pytest.mark.slow
def test_a_program_under_torchrun_equals_the_program_by_itself(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    launch += ["--rdzv-endpoint", "localhost:0"]
    for start, out in (([], "one.pt"), (launch, "two.pt")):
        command = [sys.executable, *start, "program.py", out]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    one, both = (torch.load(tmp_path / name) for name in ("one.pt", "two.pt"))
    assert float((one - both).abs().max() / one.abs().max()) < 1e-5
