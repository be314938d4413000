"""`soundstage train`: run a recipe, or go on with one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from soundstage.training.chain import Chain
    from soundstage.training.config import TrainConfig


def command(
    recipe: Annotated[str, typer.Argument(help="Any importable module:function that returns a TrainConfig.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings to change, such as optim.lr=1e-4.", metavar="[KEY=VALUE...]")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the run; default runs/NAME.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default cuda where present.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print configuration, parameters, memory and FLOPs; do not run.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per logged step, for programs.")] = False,
) -> None:
    """Train a recipe. The same command again resumes from the last checkpoint; Ctrl-C saves first.

    \b
    Examples:
      soundstage train soundstage.recipes.world:tiny
      soundstage train soundstage.recipes.world:tiny steps=6000 optim.lr=1e-4 --out runs/slow
      soundstage train soundstage.recipes.world:tiny data=folder:clips steps=500
      soundstage train soundstage.recipes.world:tiny --dry-run
      torchrun --nproc-per-node 8 -m soundstage train soundstage.recipes.world:tiny
    """
    from soundstage.training.chain import Chain, load

    config = load(recipe, [*(overrides or []), *([f"out={out}"] if out else [])])
    if dry_run:
        for each in config.configs if isinstance(config, Chain) else (config,):
            _show_plan(each, as_json)
    elif isinstance(config, Chain):
        _run_chain(config, device, as_json)
    else:
        _run(config, device, as_json)


def _show_plan(config: TrainConfig, as_json: bool) -> None:
    from soundstage.recipes.published import sharable, shared
    from soundstage.training.plan import plan

    found = plan(config)
    if "memory" in found and "fake_score" in config.roles and sharable(config):
        found["memory_on_a_shared_base"] = plan(shared(config))["memory"]
    if as_json:
        typer.echo(json.dumps(found))
        return
    _show(found["config"], "")
    typer.echo(f"\nout: {found['out']}")
    for name, role in found["roles"].items():
        typer.echo(f"{name}: {role['parameters'] / 1e6:.3f} M parameters, {_size(role['bytes'])}")
    typer.echo(f"memory without activations: {_size(found['bytes'])}")
    for key, value in found.get("model", {}).items():
        typer.echo(f"{key}: {value if not isinstance(value, float) else f'{value:.4g}'}")
    if "flops_per_step" in found:
        typer.echo(f"FLOPs per step: {found['flops_per_step']:.3g}, whole run {_flops(found):.3g}")
    _show_memory("memory per device", found.get("memory", ()))
    _show_memory(
        "memory per device on a shared base (recipes.published.shared)", found.get("memory_on_a_shared_base", ())
    )
    typer.echo(f"samples: {found['samples']} in {config.steps} steps")


def _show_memory(title: str, rows: Sequence[Mapping[str, int]]) -> None:
    """A line for each number of devices, with what it is made of."""
    if rows:
        typer.echo(f"{title}, without the allocator's and NCCL's own:")
    for row in rows:
        parts = (name for name in row if name not in ("devices", "accumulate", "total"))
        told = ", ".join(f"{name} {_size(row[name])}" for name in parts)
        typer.echo(f"  {row['devices']} devices, accumulate={row['accumulate']}: {_size(row['total'])} ({told})")


def _size(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _flops(found: Mapping[str, Any]) -> float:
    return found.get("flops", found["flops_per_step"] * found["config"]["steps"])


def _show(value: Mapping[str, Any], prefix: str) -> None:
    """Settings as the dotted names that override them."""
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            typer.echo(f"{prefix}{key}: {item['is']}" if "is" in item else f"{prefix}{key}:")
            _show({name: inner for name, inner in item.items() if name != "is"}, f"{prefix}{key}.")
        elif key != "is":
            typer.echo(f"{prefix}{key} = {item}")


def _run(config: TrainConfig, device: str | None, as_json: bool) -> None:
    """Train; under torchrun in every process, of which the first speaks."""
    from soundstage.cli.progress import progress
    from soundstage.core.parallel import init_from_env, leave, only_rank_zero
    from soundstage.training import checkpoint
    from soundstage.training.engine import train

    group, rank, _ = init_from_env(device)
    try:
        last = checkpoint.latest(config.folder / "checkpoints")
        done = min(checkpoint.step_of(last), config.steps) if last else 0
        if done and rank == 0:
            typer.echo(f"resuming {config.folder} at step {done} of {config.steps}", err=True)
        only_rank_zero(lambda: _prepare(config.data) if done < config.steps else None, group)
        with progress("training", config.steps) if rank == 0 else nullcontext() as advance:

            def on_log(entry: Mapping[str, float]) -> None:
                if as_json:
                    typer.echo(json.dumps(dict(entry)))
                if advance:
                    advance.reach(int(entry["step"]), note=_note(entry))

            if advance:
                advance.reach(done)
            state = train(config, device=device, on_log=on_log)
    finally:
        leave()
    if rank == 0 and state.step < config.steps:
        typer.echo(f"stopped and saved at step {state.step}; the same command goes on from there", err=True)
    elif rank == 0 and not as_json:
        typer.echo(f"trained {config.name} for {state.step} steps: {config.folder}")


def _run_chain(chain: Chain, device: str | None, as_json: bool) -> None:
    """One run after another, with the gates between them."""
    from soundstage.core.parallel import init_from_env, leave
    from soundstage.training.chain import train_chain

    _, rank, _ = init_from_env(device)

    def on_log(entry: Mapping[str, float]) -> None:
        typer.echo(json.dumps(dict(entry)) if as_json else f"  step {int(entry['step'])}: {_note(entry)}")

    def on_link(config: TrainConfig) -> None:
        if rank == 0:
            typer.echo(f"{config.name}: to step {config.steps}, in {config.folder}", err=True)

    try:
        done = train_chain(chain, on_link=on_link, device=device, on_log=on_log)
    finally:
        leave()
    if rank == 0 and not done:
        typer.echo("stopped and saved; the same command goes on from there", err=True)
    elif rank == 0 and not as_json:
        typer.echo(f"trained {chain.run.name}: {', '.join(chain.links)}, in {chain.folder}")


def _prepare(data: Any) -> None:  # noqa: ANN401
    """Let data that caches something do so under a progress bar of its own."""
    from soundstage.cli.progress import progress

    prepare = getattr(data, "prepare", None)
    if prepare is None:
        return
    with progress("encoding clips") as advance:
        prepare(lambda done, total: advance.reach(done, note=f"of {total}"))


def _note(entry: Mapping[str, float]) -> str:
    """The few numbers worth a line."""
    terms = [name for name in entry if name.count("/") == 1 and not name.startswith(("lr/", "grad_norm/"))]
    shown = [f"{name} {entry[name]:.4g}" for name in terms]
    if "samples_per_second" in entry:
        shown.append(f"{entry['samples_per_second']:.1f} samples/s")
    return ", ".join(shown)
