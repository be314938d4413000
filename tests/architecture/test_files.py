"""Sizes of files, and what no committed file may say."""

import re
import tomllib
from pathlib import Path

TEXT = {".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".json", ".cfg", ".sh", ""}
MACHINE_PATH = re.compile(r"(?<![A-Za-z0-9._-])/(work|root|tmp|home|Users)/[A-Za-z]")
REGISTRY = re.compile(r"pypi\.org|pythonhosted\.org|download\.pytorch\.org|conda\.anaconda\.org|npmjs\.(org|com)")
MEGABYTES = 12


def _text(files: list[Path]) -> list[tuple[Path, str]]:
    return [(path, path.read_text(encoding="utf-8")) for path in files if path.suffix in TEXT]


def _longer(files: list[Path], limit: int) -> dict[str, int]:
    counted = {str(path): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    return {name: count for name, count in counted.items() if count > limit}


def test_no_module_is_longer_than_500_lines(files: list[Path]) -> None:
    assert not _longer([path for path in files if path.suffix == ".py"], 500)


def test_no_page_is_longer_than_150_lines(files: list[Path], root: Path) -> None:
    pages = [p for p in files if p.suffix == ".md" and (p.parent == root or root / "docs" in p.parents)]
    assert not _longer(pages, 150)


def test_no_decision_is_longer_than_30_lines(root: Path) -> None:
    pages = sorted((root / "docs" / "decisions").glob("*.md"))
    assert pages
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert re.match(r"\d{3}-[a-z0-9-]+\.md$", page.name), page.name
        assert len(text.splitlines()) <= 30, page.name
        assert [word for word in ("## Context", "## Choice", "## Consequence") if word not in text] == [], page.name


def test_no_file_names_a_machine_path(files: list[Path], root: Path) -> None:
    found = [
        f"{path.relative_to(root)}:{number}: {line.strip()[:100]}"
        for path, text in _text(files)
        for number, line in enumerate(text.splitlines(), 1)
        if MACHINE_PATH.search(line)
    ]
    assert not found, "a test takes its folder from tmp_path"


def test_no_file_names_a_registry(files: list[Path], root: Path) -> None:
    found = [str(path.relative_to(root)) for path, text in _text(files) if REGISTRY.search(text)]
    assert not found, "the address of a registry belongs to the user's own configuration"


def test_the_shipped_weights_are_small(files: list[Path], root: Path) -> None:
    weights = root / "src" / "soundstage" / "weights"
    for folder in {path.parent for path in files if weights in path.parents}:
        total = sum(path.stat().st_size for path in files if folder == path.parent)
        assert total <= MEGABYTES * 1e6, f"{total / 1e6:.1f} MB in {folder}"


def test_tested_versions_satisfy_the_project(root: Path) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pinned = dict(
        line.split("==") for line in (root / "constraints.txt").read_text().splitlines() if line and line[0] != "#"
    )
    wanted = [*project["dependencies"], *(r for group in project["optional-dependencies"].values() for r in group)]
    for requirement in wanted:
        name, _, floor = re.sub(r"\[.*?\]", "", requirement).partition(">=")
        if name == "soundstage":
            continue
        tested = [int(part) for part in pinned[name].split(".")]
        assert tested >= [int(part) for part in floor.split(".")], f"{name} is tested at {pinned[name]}, below {floor}"
