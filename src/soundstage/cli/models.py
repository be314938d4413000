"""`soundstage models`: the models that come with the package, and what a model folder says of itself."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(help="List the models at hand and show their cards.", rich_markup_mode=None)

AsJson = Annotated[bool, typer.Option("--json", help="JSON on stdout, for programs.")]


@app.command("list")
def list_models(as_json: AsJson = False) -> None:
    """List the models that come with this install.

    \b
    Examples:
      soundstage models list
      soundstage models list --json
    """
    from soundstage.core.system import known_systems

    found = [facts(name) for name in known_systems()]
    if as_json:
        typer.echo(json.dumps(found))
        return
    for model in found:
        typer.echo(f"{model['name']}  {model['parameters'] / 1e6:.1f} M parameters, {model['bytes'] / 1e6:.1f} MB")
    if not found:
        typer.echo("no model comes with this install; give --model FOLDER where a model is asked for", err=True)


@app.command("describe")
def describe(
    model: Annotated[str | None, typer.Argument(help="A name or a folder; the default model when left out.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a model is: loader, size, files and card.

    \b
    Examples:
      soundstage models describe world-tiny
      soundstage models describe runs/mine/model --json
    """
    found = facts(model)
    if as_json:
        typer.echo(json.dumps(found))
        return
    typer.echo(f"{found['name']}  {found['parameters'] / 1e6:.1f} M parameters, {found['bytes'] / 1e6:.1f} MB")
    for name, value in found["files"].items():
        typer.echo(f"  {name}: {value['parameters']} parameters, {value['bytes']} bytes")
    for key, value in found["description"].items():
        typer.echo(f"  {key}: {value if isinstance(value, str) else json.dumps(value)}")
    card = Path(found["folder"]) / "README.md"
    if card.is_file():
        typer.echo("\n" + card.read_text(encoding="utf-8").rstrip())


def facts(model: str | None) -> dict[str, Any]:
    """Name, folder, model.json and the size of a model; raises SoundstageError when there is no such model."""
    from soundstage.core.system import model_folder, weight_files

    folder = model_folder(model)
    sizes = {p.name: {"parameters": num_parameters(p), "bytes": p.stat().st_size} for p in weight_files(folder)}
    described = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    return {
        "name": described.pop("name", folder.name),
        "folder": str(folder),
        "parameters": sum(size["parameters"] for size in sizes.values()),
        "bytes": sum(size["bytes"] for size in sizes.values()),
        "files": sizes,
        "description": described,
    }


def num_parameters(path: Path) -> int:
    """Numbers stored in a safetensors file, read from its header."""
    from safetensors import SafetensorError, safe_open

    from soundstage.core.errors import WeightsError

    try:
        with safe_open(path, framework="numpy") as file:
            return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    except SafetensorError as error:
        raise WeightsError(f"{path}: is not a safetensors file ({error}); copy the weights again") from error
