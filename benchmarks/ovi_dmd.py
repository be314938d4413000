"""Real DMD steps on a stack of Ovi's blocks: seconds per step, memory, and the share of the matrix peak.

    python benchmarks/ovi_dmd.py --device cuda --out benchmarks/results/ovi-dmd-gpu.json    # full width, 5 s at 704x704
    python benchmarks/ovi_dmd.py --preset cpu                                               # at reduced width
    python benchmarks/ovi_dmd.py --table benchmarks/results/ovi-dmd-gpu.json                # only its table

The run is `soundstage.recipes.ovi:dmd4` with random weights, its own optimisers and checkpointing, through the
engine that trains; only the number of blocks is less: as many as student, fake score and teacher find room for.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from measure import Row, Timer, commit, machine, table, today
from ovi_models import Inputs, Preset, presets
from ovi_sections import peak
from torch import nn

from soundstage.core.av import AV
from soundstage.core.batch import Batch
from soundstage.core.rng import Rng
from soundstage.models import twin
from soundstage.models.twin import TwinConfig
from soundstage.objectives.dmd import Guidance
from soundstage.recipes import ovi
from soundstage.training.config import Role, TrainConfig
from soundstage.training.engine import RunError, train
from soundstage.training.plan import plan


@dataclass(frozen=True)
class Stack:
    """Ovi with fewer blocks and random weights, which says of itself what `--dry-run` asks."""

    preset: Preset
    depth: int
    dtype: torch.dtype = torch.float32

    def build(self) -> nn.Module:
        """The module."""
        return self._config.build().to(self.dtype)

    def describe(self) -> dict[str, Any]:
        """Latents, tokens, and FLOPs of one call."""
        tokens = self.preset.tokens
        shapes = Noise(self.preset).shape
        return {
            "latents": shapes.as_dict(),
            "tokens": tokens.as_dict(),
            "flops": twin.flops(self._config, tokens).total,
        }

    @property
    def _config(self) -> TwinConfig:
        towers = self.preset.twin
        cut = {name: replace(getattr(towers, name), depth=self.depth) for name in ("video", "audio")}
        return replace(towers, **cut)


@dataclass(frozen=True)
class Noise:
    """Random latents, and one text for all."""

    preset: Preset

    @property
    def shape(self) -> AV[tuple[int, ...]]:
        """Of one sample."""
        towers = self.preset.twin
        return AV((towers.video.in_channels, *self.preset.grid), (towers.audio.in_channels, self.preset.steps))

    def build(self) -> Noise:
        """Itself."""
        return self

    def batch(self, step: int, size: int, part: int = 0, of: int = 1) -> Batch:
        """Samples step * size onwards, or one of `of` equal parts of them."""
        x0 = Rng.of(step, size).normal_like(self.shape.map(lambda shape: torch.empty(size, *shape)))
        cond = Inputs(self.preset, torch.device("cpu"), torch.float32).told()
        cond = cond.map(lambda x: x.expand(size, *x.shape[1:]))
        return Batch(x0, cond, tuple(str(i) for i in range(size))).part(part, of)


def run_of(preset: Preset, depth: int, steps: int, out: Path) -> TrainConfig:
    """The recipe on a stack: one sample a step, the student at every second."""
    recipe = ovi.dmd4()
    student = Stack(preset, depth)
    roles: Mapping[str, Role] = {
        "teacher": Role(Stack(preset, depth, torch.bfloat16)),
        "fake_score": replace(recipe.roles["fake_score"], model=student),
    }
    bf16 = preset.types[0] == torch.bfloat16
    objective = replace(recipe.objective, ratio=2, guidance=Guidance(ovi.GUIDANCE))
    changes: dict[str, Any] = {
        "batch_size": 1,
        "accumulate": 1,
        "steps": steps,
        "log_every": 1,
        "validate": None,
        "save_every": steps + 1,
    }
    return replace(
        recipe,
        model=student,
        roles=roles if bf16 else {**roles, "teacher": Role(student)},
        objective=objective,
        data=Noise(preset),
        precision="bf16" if bf16 else "fp32",
        out=str(out),
        **changes,
    )


def measured(preset: Preset, depth: int, steps: int, device: torch.device) -> Row:
    """Seconds of a step in which the student moves, and of one in which only the fake score does; bytes; FLOPs."""
    with tempfile.TemporaryDirectory() as folder:
        config = run_of(preset, depth, steps, Path(folder))
        said = plan(config, devices=(1,))
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        marks = [time.perf_counter()]

        def mark(_: Mapping[str, float]) -> None:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            marks.append(time.perf_counter())

        train(config, device=device, on_log=mark, tensorboard=False)
    took = [b - a for a, b in pairwise(marks)][2:]  # the first two make buffers and pick kernels
    row: Row = {
        "blocks": depth,
        "parameters": said["roles"]["student"]["parameters"],
        "seconds_student": median(took[0::2]),
        "seconds_critic": median(took[1::2]),
        "seconds": (median(took[0::2]) + median(took[1::2])) / 2,
        "flops": said["flops_per_step"],
        "predicted_bytes": said["memory"][0]["total"],
    }
    if device.type == "cuda":
        row["peak_bytes"] = torch.cuda.max_memory_allocated(device)
    return row


def deepest(preset: Preset, device: torch.device) -> int:
    """Blocks for which `--dry-run` predicts nine tenths of the device's memory; on a CPU the preset's own."""
    if device.type != "cuda":
        return preset.twin.video.depth
    room = 0.9 * torch.cuda.get_device_properties(device).total_memory
    for depth in range(preset.twin.video.depth, 1, -1):
        if plan(run_of(preset, depth, 4, Path("unused")), devices=(1,))["memory"][0]["total"] < room:
            return depth
    return 1


def command(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    preset: Annotated[str | None, typer.Option(help="tiny, cpu or full; default cpu, or full on cuda.")] = None,
    blocks: Annotated[int | None, typer.Option(help="Default: as many as fit.")] = None,
    steps: Annotated[int, typer.Option(min=4, help="Steps that are run.")] = 12,
    out: Annotated[Path | None, typer.Option(help="File for the figures, as JSON.")] = None,
    show: Annotated[Path | None, typer.Option("--table", help="Only print the table of such a file.")] = None,
) -> None:
    """Run DMD steps, print a table, and write the figures as JSON."""
    if show is not None:
        typer.echo(shown(json.loads(show.read_text(encoding="utf-8"))))
        return
    where = torch.device(device)
    chosen = presets(512, 4, 1000)[preset or ("full" if where.type == "cuda" else "cpu")]
    if where.type == "cpu":
        torch.set_num_threads(1)
    rate = next(iter(peak(chosen, Timer(where))))["tflops"]
    depth = blocks or deepest(chosen, where)
    while True:
        try:
            row = measured(chosen, depth, steps, where)
            break
        except (RunError, torch.OutOfMemoryError):
            if blocks is not None or depth == 1:
                raise
            depth -= 1
    row |= {"tflops": row["flops"] / row["seconds"] / 1e12, "peak_tflops": rate}
    found = {"date": today(), **commit(), "machine": machine(where), "preset": chosen.told(), "rows": [row]}
    if out is not None:
        out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    typer.echo(shown(found))


def shown(found: Mapping[str, Any]) -> str:
    """The table of a file of figures."""
    gib = 2**30
    columns = {
        "blocks": lambda row: str(row["blocks"]),
        "parameters of each role": lambda row: f"{row['parameters'] / 1e9:.2f} B",
        "student and critic [s]": lambda row: f"{row['seconds_student']:.2f}",
        "critic alone [s]": lambda row: f"{row['seconds_critic']:.2f}",
        "peak [GiB]": lambda row: f"{row['peak_bytes'] / gib:.1f}" if "peak_bytes" in row else "-",
        "predicted [GiB]": lambda row: f"{row['predicted_bytes'] / gib:.1f}",
        "TFLOP/s": lambda row: f"{row['tflops']:.2f}",
        "of the matrix peak": lambda row: f"{100 * row['tflops'] / row['peak_tflops']:.0f} %",
    }
    return table(found["rows"], columns)


if __name__ == "__main__":
    typer.run(command)
