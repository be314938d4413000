"""Public names exist, the root offers its three, and every module says what it is."""

import ast
import importlib
from pathlib import Path

import pytest

import soundstage


def test_every_public_name_can_be_imported(modules: dict[str, Path]) -> None:
    missing = []
    for name in modules:
        module = importlib.import_module(name)
        public = getattr(module, "__all__", ())
        assert len(public) == len(set(public)), f"{name}.__all__ names something twice"
        missing += [f"{name}.{public_name}" for public_name in public if not hasattr(module, public_name)]
    assert not missing


def test_the_root_offers_its_names_lazily() -> None:
    from soundstage.core.av import AV
    from soundstage.core.conditions import Conditions
    from soundstage.inference.generator import Generator

    assert (soundstage.AV, soundstage.Conditions, soundstage.Generator) == (AV, Conditions, Generator)
    assert set(dir(soundstage)) == {"AV", "Conditions", "Generator", "__version__"}
    with pytest.raises(AttributeError, match="'Genrator'; it has AV"):
        _ = soundstage.Genrator


def test_every_folder_of_modules_is_a_package(modules: dict[str, Path]) -> None:
    folders = {path.parent for path in modules.values()}
    assert not [folder for folder in folders if not (folder / "__init__.py").is_file()]


def test_every_module_begins_with_a_sentence(modules: dict[str, Path]) -> None:
    silent = []
    for name, path in modules.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if tree.body and not ast.get_docstring(tree):
            silent.append(name)
    assert not silent, "a module without a docstring"
