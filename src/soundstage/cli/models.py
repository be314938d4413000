"""`soundstage models`: the models at hand and the published ones: cards, files, licences, and what is lacking."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from soundstage.models.fetch import Plan
    from soundstage.models.published import Part, Published, Row

app = typer.Typer(help="The models at hand, and the published ones to fetch and check.", rich_markup_mode=None)

AsJson = Annotated[bool, typer.Option("--json", help="JSON on stdout, for programs.")]


@app.command("list")
def list_models(as_json: AsJson = False) -> None:
    """List the models that come with this install, and the published ones, with size and licence.

    \b
    Examples:
      soundstage models list
      soundstage models list --json
    """
    from soundstage.core.system import known_systems
    from soundstage.models.zoo import MODELS

    found = [facts(name) for name in known_systems()]
    if as_json:
        typer.echo(json.dumps(found + [published_facts(model) for model in MODELS.values()]))
        return
    for model in found:
        typer.echo(f"{model['name']}  {model['parameters'] / 1e6:.1f} M parameters, {model['bytes'] / 1e6:.1f} MB")
    if not found:
        typer.echo("no model comes with this install; give --model FOLDER where a model is asked for", err=True)
    typer.echo("\npublished, to get with `soundstage models fetch NAME DIR`:")
    width = max(map(len, MODELS))
    for model in MODELS.values():
        licences = ", ".join(_licence(each) for each in model.licences)
        typer.echo(f"{model.name:{width}}  {model.bytes / 1e9:5.1f} GB  {model.title}; {licences}")


@app.command("describe")
def describe(
    model: Annotated[str | None, typer.Argument(help="A name or a folder; the default model when left out.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a model is: loader, size, files, licences and card.

    \b
    Examples:
      soundstage models describe world-tiny
      soundstage models describe ovi
      soundstage models describe runs/mine/model --json
    """
    from soundstage.models.zoo import MODELS

    name = _published_name(model)
    if name is not None:
        told = published_facts(MODELS[name], Path(str(model)))
        typer.echo(json.dumps(told) if as_json else "\n".join(_card(told)))
        return
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


@app.command("fetch")
def fetch(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A published model (soundstage models list).")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to fill; made when it is not there.")],
    part: Annotated[
        list[str] | None, typer.Option(help="Only this part, such as text-encoder or vocoder; may be repeated.")
    ] = None,
    accept_licences: Annotated[
        bool, typer.Option("--accept-licences", help="Do not ask: the licences shown are read and accepted.")
    ] = False,
) -> None:
    """Get a published model from the hub into a folder, and check it; the same command goes on where it stopped.

    What lies there whole is left alone. Behind a mirror, set HF_ENDPOINT; without a network, the error says which files
    to copy from where.

    \b
    Examples:
      soundstage models fetch wan2.2-5b weights/wan
      soundstage models fetch ovi weights/ovi --accept-licences
      soundstage models fetch ovi weights/ovi --part text-encoder --part tokenizer
    """
    from soundstage.models.fetch import parts_of, prepare
    from soundstage.models.zoo import check, published

    model, roles = published(name), tuple(part or ())
    plan = prepare(model, folder, roles)
    for there in plan.there:
        typer.echo(f"there already: {there}", err=True)
    asked = parts_of(model, roles)
    if plan.wanted:
        _accept(asked, plan, accept_licences)
        _download(plan)
    _report(model.name, folder, check(model, folder, [each.role for each in asked]), as_json=False)


@app.command("check")
def check(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder with a model's files, in any layout.")],
    model: Annotated[
        str | None, typer.Option(help="Which published model it must be; recognised by its files when left out.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check that a folder holds all of a model: files, sizes, and every tensor's name and shape; loads nothing.

    Exit code 0 when all is well, 2 otherwise.

    \b
    Examples:
      soundstage models check weights/ovi
      soundstage models check weights/ovi --model ovi-720x720-5s
      soundstage models check weights/wan --json
    """
    from soundstage.core.errors import WeightsError
    from soundstage.models import zoo

    if model is None and (folder / "model.json").is_file():
        _check_own(folder, as_json)
        return
    name = model or zoo.recognise(folder)
    if name is None:
        if not folder.is_dir():
            raise WeightsError(f"{folder}: there is no such folder; give the folder of a model's weights")
        known = ", ".join(zoo.MODELS)
        raise WeightsError(f"{folder}: holds no model that is known by its files; say which with --model ({known})")
    _report(name, folder, zoo.check(name, folder), as_json)


def facts(model: str | None) -> dict[str, Any]:
    """Name, folder, model.json and the size of a model; raises SoundstageError when there is no such model."""
    from soundstage.core.system import model_folder, weight_files

    folder = model_folder(model)
    sizes = {p.name: {"parameters": num_parameters(p), "bytes": p.stat().st_size} for p in weight_files(folder)}
    described = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    return {
        "name": described.pop("name", folder.name),
        "installed": True,
        "folder": str(folder),
        "parameters": sum(size["parameters"] for size in sizes.values()),
        "bytes": sum(size["bytes"] for size in sizes.values()),
        "files": sizes,
        "description": described,
    }


def published_facts(model: Published, folder: Path | None = None) -> dict[str, Any]:
    """Name, title, licences, parts and files of a published model, with their paths where a folder has them."""
    from soundstage.models.zoo import lying

    there = lying(model, folder) if folder is not None and folder.is_dir() else {}
    parts = [
        {
            "role": part.role,
            "licence": part.licence,
            "non_commercial": part.non_commercial,
            "bytes": part.bytes,
            "files": [{"repo": f.repo, "path": f.path, "to": f.to, "bytes": f.bytes} for f in part.files],
            "found": str(there[part.role]) if part.role in there else None,
        }
        for part in model.parts
    ]
    return {
        "name": model.name,
        "title": model.title,
        "installed": False,
        "folder": None if folder is None or not folder.is_dir() else str(folder),
        "bytes": model.bytes,
        "licences": list(model.licences),
        "parts": parts,
    }


def num_parameters(path: Path) -> int:
    """Numbers stored in a weight file, read from its header; raises WeightsError for a file that is none."""
    from soundstage.models.weights import shapes

    return sum(math.prod(shape) for shape in shapes(path).values())


def _published_name(asked: str | None) -> str | None:
    """The published model that a name or a folder means; None for a model of this install or a model folder."""
    from soundstage.models.zoo import MODELS, recognise

    if asked is None or asked in MODELS:
        return asked
    folder = Path(asked)
    return recognise(folder) if folder.is_dir() and not (folder / "model.json").is_file() else None


def _card(told: dict[str, Any]) -> list[str]:
    where = f", found in {told['folder']}" if told["folder"] else ""
    lines = [f"{told['name']}  {told['title']}; about {told['bytes'] / 1e9:.1f} GB{where}"]
    for part in told["parts"]:
        size = (
            f"{part['bytes'] / 1e9:.1f} GB" if part["bytes"] else "small" if len(part["files"]) > 1 else "size unknown"
        )
        lines.append(f"  {part['role']}: {size}, {_licence(part['licence'])}")
        lines += [f"    {file['to']}  from {file['repo']}" for file in part["files"]]
        if told["folder"]:
            lines.append(f"    found: {part['found'] or 'no'}")
    if told["folder"] is None:
        lines.append(f"get it with: soundstage models fetch {told['name']} DIR")
    return lines


def _licence(licence: str) -> str:
    return f"{licence} (NON-COMMERCIAL use only)" if "-NC" in licence else licence


def _accept(parts: Sequence[Part], plan: Plan, accepted: bool) -> None:
    """Show sizes and licences; ask where a licence forbids commercial use."""
    from soundstage.core.errors import WeightsError

    begun = f", {plan.arrived / 1e9:.1f} GB of them here already" if plan.arrived else ""
    typer.echo(f"to fetch: {len(plan.wanted)} files, {plan.bytes / 1e9:.1f} GB{begun}, into {plan.folder}", err=True)
    for part in parts:
        repos = ", ".join(dict.fromkeys(file.repo for file in part.files))
        typer.echo(f"  {part.role}: {_licence(part.licence)}, from {repos}", err=True)
    if accepted or not any(part.non_commercial for part in parts):
        return
    try:
        yes = typer.confirm("Some weights, and what is made with them, are not for commercial use. Accept?", err=True)
    except typer.Abort:
        yes = False
    if not yes:
        raise WeightsError("licences: not accepted, nothing was fetched; read them and give --accept-licences")


def _download(plan: Plan) -> None:
    from soundstage.cli.progress import progress
    from soundstage.models.fetch import download

    mega = 10**6
    with progress("fetching, MB", -(-plan.bytes // mega)) as advance:
        download(plan, lambda done, _, name: advance.reach(-(-done // mega), name))


def _check_own(folder: Path, as_json: bool) -> None:
    """A folder with model.json: its files are whole."""
    from soundstage.core.system import weight_files
    from soundstage.models.weights import check_whole

    for path in weight_files(folder):
        check_whole(path)
    found = facts(str(folder))
    told = {"model": found["name"], "folder": str(folder), "whole": True, "files": found["files"]}
    typer.echo(json.dumps(told) if as_json else f"{found['name']}: whole, {found['bytes'] / 1e6:.1f} MB in {folder}")


def _report(name: str, folder: Path, rows: Sequence[Row], as_json: bool) -> None:
    """The table or JSON of a check; raises WeightsError, the first problem, when anything is wrong."""
    from soundstage.core.errors import WeightsError

    wrong = [row for row in rows if not row.whole]
    if as_json:
        typer.echo(json.dumps({"model": name, "folder": str(folder), "whole": not wrong, "parts": [*map(_told, rows)]}))
    else:
        typer.echo(f"{name} in {folder}")
        for row in rows:
            path = row.path.relative_to(folder) if row.path is not None else "-"
            typer.echo(f"  {row.state:8} {row.bytes / 1e9:8.3f} GB  {row.part.role}: {path}{_tensors(row)}")
            if row.part.non_commercial:
                typer.echo(f"           licence {_licence(row.part.licence)}")
        for row in wrong[1:]:
            typer.echo(f"also: {row.problem}", err=True)
    if wrong:
        raise WeightsError(str(wrong[0].problem))


def _tensors(row: Row) -> str:
    if row.report is None:
        return ""
    odd = {"missing": row.report.missing, "unexpected": row.report.unexpected, "of wrong shape": row.report.wrong_shape}
    return f", {row.report.loaded} tensors fit" + "".join(f", {len(each)} {what}" for what, each in odd.items() if each)


def _told(row: Row) -> dict[str, Any]:
    report = row.report
    return {
        "role": row.part.role,
        "state": row.state,
        "path": None if row.path is None else str(row.path),
        "bytes": row.bytes,
        "licence": row.part.licence,
        "loaded": None if report is None else report.loaded,
        "missing": [] if report is None else list(report.missing),
        "unexpected": [] if report is None else list(report.unexpected),
        "wrong_shape": [] if report is None else [list(each) for each in report.wrong_shape],
        "problem": row.problem,
    }
