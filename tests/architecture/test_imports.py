"""The table of allowed imports, read from the source; docs/decisions/001 and 003 changed it."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ALLOWED: dict[str, set[str]] = {
    "core": set(),
    "media": set(),
    "world": {"media"},
    "data": {"core", "media"},
    "models": {"core", "media"},
    "objectives": {"core"},
    "inference": {"core", "media"},
    "training": {"core", "data", "objectives"},
    "evaluation": {"core", "media", "inference", "world"},
    "serving": {"media", "inference"},
    "testing": {"core", "media", "data", "objectives", "training"},
}
EVERYTHING = {"recipes", "cli"}
REQUIRED = {"torch", "numpy", "safetensors", "typer", "rich", "soundstage"}
OUTSIDE: dict[str, set[str]] = {
    "core": {"torch"},
    "media": {"numpy", "av", "soxr", "soundfile", "PIL"},
    "world": {"numpy", "PIL"},
}


def imports(path: Path, module: str) -> Iterator[tuple[str, bool]]:
    """(imported module, does it run on import) of each import in a file; under TYPE_CHECKING it never runs."""

    def walk(node: ast.AST, runs: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, runs) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                yield from ((name, runs) for name in _from(child, path, module))
            else:
                inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                typing = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
                yield from walk(child, runs and not inside and not typing)

    yield from walk(ast.parse(path.read_text(encoding="utf-8")), True)


def _from(node: ast.ImportFrom, path: Path, module: str) -> list[str]:
    base = node.module or ""
    if node.level:
        package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
        base = ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])
    return [f"{base}.{alias.name}" for alias in node.names] if base == "soundstage" else [base]


def room(module: str) -> str:
    """The package of a dotted name, "core" of "soundstage.core.av"; "" for the root."""
    return module.partition(".")[2].partition(".")[0]


def test_every_room_has_its_row(modules: dict[str, Path]) -> None:
    rooms = {room(name) for name, path in modules.items() if path.parent.name != "soundstage"}
    assert rooms <= set(ALLOWED) | EVERYTHING, "a package without a row in the table of imports"


def test_rooms_import_only_what_the_table_allows(modules: dict[str, Path]) -> None:
    wrong = []
    for name, path in modules.items():
        here = room(name)
        if here in EVERYTHING or path.parent.name == "soundstage":
            continue
        for imported, _ in imports(path, name):
            there = room(imported)
            if imported.split(".")[0] == "soundstage" and there not in ALLOWED[here] | {here, "__version__"}:
                wrong.append(f"{name} imports {imported}; {here} may import {sorted(ALLOWED[here]) or 'nothing'}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("here", sorted(OUTSIDE))
def test_lower_rooms_stand_on_few_packages(here: str, modules: dict[str, Path]) -> None:
    allowed = OUTSIDE[here] | {"soundstage"} | set(sys.stdlib_module_names)
    found = {
        f"{name} imports {imported}"
        for name, path in modules.items()
        if room(name) == here
        for imported, _ in imports(path, name)
        if imported.split(".")[0] not in allowed
    }
    assert not found


def test_no_optional_package_at_module_level(modules: dict[str, Path]) -> None:
    free = REQUIRED | set(sys.stdlib_module_names)
    found = {
        f"{name} imports {imported} at module level"
        for name, path in modules.items()
        for imported, runs in imports(path, name)
        if runs and imported.split(".")[0] not in free
    }
    assert not found, "import it inside the function that needs it"


def test_command_files_import_nothing_heavy_at_module_level(modules: dict[str, Path]) -> None:
    light = {"typer"} | set(sys.stdlib_module_names)
    ours = {"", "cli", "__version__"}
    found = {
        f"{name} imports {imported} at module level"
        for name, path in modules.items()
        if room(name) == "cli"
        for imported, runs in imports(path, name)
        if runs and imported.split(".")[0] not in light
        if not (imported.startswith("soundstage") and room(imported) in ours)
    }
    assert not found, "it would slow down soundstage --help"


def test_the_reader_of_imports_sees_every_form(tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    path.write_text(
        "import x.y\nfrom soundstage import models\nfrom . import b\nfrom ..media import clip\n"
        "if TYPE_CHECKING:\n    import z\ndef f():\n    import lazy\n"
    )
    assert set(imports(path, "soundstage.core.a")) == {
        ("x.y", True),
        ("soundstage.models", True),
        ("soundstage.core", True),
        ("soundstage.media", True),
        ("z", False),
        ("lazy", False),
    }
