"""The documents are true: commands, options, recipes, links and snippets are what the code has."""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.core import TyperCommand
from typer.main import get_command

from soundstage.cli.app import app

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
RECIPES = ROOT / "src" / "soundstage" / "recipes"


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _blocks(page: Path, *languages: str) -> list[str]:
    """The fenced blocks of a page in these languages."""
    pattern = rf"^```(?:{'|'.join(languages)})\n(.*?)^```"
    return re.findall(pattern, page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def _command(words: list[str]) -> tuple[list[str], TyperCommand | None]:
    """(path, command) that a line of words begins with; None where there is no such command."""
    node, path = get_command(app), []
    while hasattr(node, "commands"):
        word = words[len(path)] if len(path) < len(words) else ""
        if word not in node.commands:
            return path, None
        node = node.commands[word]
        path.append(word)
    return path, node


def _options(command: TyperCommand) -> set[str]:
    return {name for parameter in command.params for name in parameter.opts if name.startswith("-")}


def _all_commands() -> list[list[str]]:
    root = get_command(app)
    inner = {name: sorted(getattr(node, "commands", [])) for name, node in root.commands.items()}
    return [[name, *rest] for name, below in sorted(inner.items()) for rest in ([[b] for b in below] or [[]])]


@pytest.mark.parametrize("words", _all_commands(), ids=" ".join)
def test_every_command_and_option_is_documented(words: list[str]) -> None:
    page = "\n".join((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("cli.md", "cli-data.md"))
    heading = f"## soundstage {' '.join(words)}\n"
    assert heading in page, f"docs/cli.md and cli-data.md have no section {heading!r}"
    section = page.partition(heading)[2].partition("\n## ")[0]
    command = _command(words)[1]
    assert command is not None
    missing = {option for option in _options(command) if option.startswith("--") and f"`{option}" not in section}
    assert not missing
    claimed = set(re.findall(r"^- `(--[a-z-]+)", section, re.MULTILINE))
    assert claimed <= _options(command), "an option that the command does not have"


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_every_command_line_on_a_page_exists(page: Path) -> None:
    for block in _blocks(page, "bash", "sh", "console"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if not words or Path(words[0]).name != "soundstage" or words[1:2] == ["--help"]:
                continue
            _, command = _command(words[1:])
            assert command is not None, f"{_name(page)}: no such command: {line}"
            used = {word.split("=")[0] for word in words if re.match(r"--?[a-z]", word)}
            assert used <= _options(command) | {"--help"}, f"{_name(page)}: {line}"


def _recipes() -> list[tuple[str, str]]:
    """(module:function, docstrings of it and of its module) of each public function returning a TrainConfig."""
    found = []
    for path in sorted(RECIPES.rglob("*.py")):
        module = ".".join(path.relative_to(ROOT / "src").with_suffix("").parts)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in tree.body:
            returns = ast.unparse(node.returns) if isinstance(node, ast.FunctionDef) and node.returns else ""
            if isinstance(node, ast.FunctionDef) and returns.endswith("TrainConfig") and not node.name.startswith("_"):
                found.append((f"{module}:{node.name}", f"{ast.get_docstring(node)}\n{ast.get_docstring(tree)}"))
    return found


def test_every_recipe_is_documented() -> None:
    recipes = _recipes()
    assert recipes
    pages = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert not [name for name, _ in recipes if not re.search(rf"{re.escape(name)}\b", pages)], "no page names it"
    silent = [name for name, text in recipes if f"soundstage train {name}" not in text]
    assert not silent, "its docstring gives no command"


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{_name(page)} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^a-z0-9 _-]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, f"{_name(page)} links to {target}"


@pytest.mark.parametrize("page", [p for p in PAGES if p.is_relative_to(ROOT / "docs")], ids=_name)
def test_every_page_is_on_the_map(page: Path) -> None:
    index = ROOT / "docs" / "index.md"
    links = re.findall(r"\]\(([^)#\s]+)", index.read_text(encoding="utf-8"))
    reached = {(index.parent / link).resolve() for link in links if ":" not in link}
    assert page == index or page in reached or page.parent in reached


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_python_that_is_shown_and_not_run_parses(page: Path) -> None:
    for block in _blocks(page, "python notest"):
        compile(block, _name(page), "exec")


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if _blocks(page, "python")], ids=_name)
def test_the_python_of_a_page_runs(page: Path, tmp_path: Path) -> None:
    script = "\n".join(_blocks(page, "python"))
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, f"{_name(page)}:\n{done.stderr}"
