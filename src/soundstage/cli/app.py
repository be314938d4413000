"""The `soundstage` command: its root, the table of its commands, and what becomes of an error.

Command files import typer alone at the top and everything heavy inside their functions, so `--help` stays instant.
"""

from __future__ import annotations

import errno
import sys
import warnings
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.exceptions import TyperException

from soundstage import __version__
from soundstage.cli import data, evaluate, generate, models, plan, probe, sweep, train, world

app = typer.Typer(
    name="soundstage",
    help="Films with their own sound from a sentence, and a world that measures how well the two fit.",
    epilog="Every command has examples: soundstage COMMAND --help",
    add_completion=False,
    rich_markup_mode=None,
)
app.command("generate")(generate.command)
app.command("evaluate")(evaluate.command)
app.command("train")(train.command)
app.command("sweep")(sweep.command)
app.add_typer(data.app, name="data")
app.add_typer(world.app, name="world")
app.add_typer(models.app, name="models")
app.command("plan")(plan.command)
app.command("probe")(probe.command)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def root(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")] = (
        False
    ),
) -> None:
    """Films with their own sound from a sentence, and a world that measures how well the two fit."""


def main(args: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 2 an error the user can mend (one sentence on stderr), 130 stopped.

    Any other exception is a defect and keeps its traceback; `--debug` before the command keeps every traceback.
    """
    args = sys.argv[1:] if args is None else args
    warnings.showwarning = _showing(warnings.showwarning)
    try:
        code = typer.main.get_command(app)(args or ["--help"], prog_name="soundstage", standalone_mode=False)
    except typer.Abort:
        code = 130
    except Exception as error:
        message = sentence(error)
        if message is None or "--debug" in args:
            raise
        typer.echo(f"error: {message}", err=True)
        code = 2
    sys.exit(code if isinstance(code, int) else 0)


def _showing(others: Callable[..., None]) -> Callable[..., None]:
    """Cautions as one line on stderr; other warnings as ever."""

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:  # noqa: ANN401
        if any(each.__name__ == "Caution" and each.__module__.startswith("soundstage.") for each in category.__mro__):
            typer.echo(f"warning: {message}", err=True)
        else:
            others(message, category, *where, **more)

    return show


REMEDIES = {
    errno.ENOENT: "there is no such file; check the path",
    errno.ENOSPC: "the disk is full; free some space, or write to another disk",
    errno.EACCES: "it may not be read or written; change its rights, or choose another place",
    errno.EROFS: "the disk is read-only; choose another place",
    errno.EISDIR: "it is a folder; name a file in it",
    errno.ENOTDIR: "a part of the path is a file; name a folder",
    errno.EEXIST: "it exists already; choose another name",
}


def sentence(error: Exception) -> str | None:
    """What to tell the user about an error they can mend; None for a defect of ours."""
    if isinstance(error, _ours()):
        return str(error)
    if isinstance(error, TyperException):
        context = getattr(error, "ctx", None)
        remedy = f"; see {context.command_path} --help" if context is not None else ""
        return error.format_message().removesuffix(".") + remedy
    if isinstance(error, ImportError) and error.name is None:  # raised by us, with the package to install
        return str(error)
    if isinstance(error, OSError) and error.errno is not None:
        where = f"{error.filename}: " if error.filename else ""
        return where + REMEDIES.get(error.errno, f"{error.strerror}; check the path and the disk")
    return None


def _ours() -> tuple[type[Exception], ...]:
    """The roots of our errors. A module that was never loaded has raised nothing, so torch is not loaded to look."""
    roots = {"soundstage.core.errors": "SoundstageError", "soundstage.media.errors": "MediaError"}
    return tuple(getattr(sys.modules[module], name) for module, name in roots.items() if module in sys.modules)
