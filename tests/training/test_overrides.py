from __future__ import annotations

from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import pytest

from soundstage.core.av import AV
from soundstage.core.errors import ConfigError
from soundstage.training.config import Optim, Stage, TrainConfig, describe, load_recipe
from soundstage.training.overrides import changed, override


@dataclass(frozen=True)
class Place:
    where: str = "here"

    def parse(self, text: str) -> Place:
        return replace(self, where=text.removeprefix("folder:"))


@dataclass(frozen=True)
class Settings:
    steps: int = 1
    rate: float = 0.5
    on: bool = False
    kind: Literal["one", "two"] = "one"
    limit: float | None = 1.0
    sizes: tuple[int, ...] = (1,)
    betas: tuple[float, float] = (0.9, 0.95)
    path: Path = Path("a")
    fps: Fraction = Fraction(16)
    scale: AV[float] = field(default_factory=lambda: AV(1.0, 1.0))
    weights: dict[str, float] = field(default_factory=dict)
    tasks: dict[str, float] = field(default_factory=lambda: {"t2av": 1})
    place: Any = field(default_factory=Place)
    optim: Optim = field(default_factory=Optim)


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("steps=6_000", "steps", 6000),
        ("steps=6e3", "steps", 6000),
        ("rate=1e-5", "rate", 1e-5),
        ("on=true", "on", True),
        ("kind=two", "kind", "two"),
        ("limit=none", "limit", None),
        ("limit=2", "limit", 2.0),
        ("sizes=8,16,32", "sizes", (8, 16, 32)),
        ("betas=0.8,0.9", "betas", (0.8, 0.9)),
        ("path=b/c", "path", Path("b/c")),
        ("fps=24000/1001", "fps", Fraction(24000, 1001)),
        ("weights.flow/audio=0.5", "weights", {"flow/audio": 0.5}),
        ("tasks.t2av=0.5", "tasks", {"t2av": 0.5}),
        ("place=folder:clips", "place", Place("clips")),
        ("place.where=there", "place", Place("there")),
        ("optim.lr=1e-5", "optim", Optim(lr=1e-5)),
    ],
)
def test_a_text_becomes_the_type_of_its_field(text: str, name: str, value: object) -> None:
    assert getattr(override(Settings(), [text]), name) == value


def test_one_value_per_modality() -> None:
    both = override(Settings(), ["scale=4.0,3.0"]).scale
    assert both.as_dict() == {"video": 4.0, "audio": 3.0}
    assert override(Settings(), ["scale.audio=2"]).scale.as_dict() == {"video": 1.0, "audio": 2.0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim.lrr=1", r"optim.lrr: 'lrr' is not a setting; did you mean 'lr'\?"),
        ("stps=1", r"stps: 'stps' is not a setting; did you mean 'steps'\?"),
        ("steps=fast", r"steps: 'fast' is not an int"),
        ("steps=1.5", r"steps: '1.5' is not an int"),
        ("rate=quick", r"rate: 'quick' is not a float"),
        ("on=maybe", r"on: 'maybe' is not a bool"),
        ("kind=three", r"kind: 'three' is not one of one, two"),
        ("betas=1", r"betas: '1' has 1 values, not 2"),
        ("optim=adam", r"optim: a Optim cannot be given as text; set what is inside it"),
        ("steps.more=1", r"steps.more: int has no settings inside"),
        ("steps", r"override 'steps' is not key=value"),
    ],
)
def test_an_error_names_the_setting_and_the_remedy(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        override(Settings(), [text])


def test_values_that_have_their_type_are_set_as_they_are() -> None:
    new = changed(Settings(), {"optim.lr": 2.0, "place": Place("x")})
    assert (new.optim, new.place) == (Optim(lr=2.0), Place("x"))


def test_a_recipe_is_any_importable_function() -> None:
    with pytest.raises(ConfigError, match=r"'nothing' is not module:function"):
        load_recipe("nothing")
    with pytest.raises(ConfigError, match=r"there is no module 'soundstage.recipes.nope'"):
        load_recipe("soundstage.recipes.nope:tiny")
    with pytest.raises(ConfigError, match=r"has no 'lod_recipe'; it has .*load_recipe"):
        load_recipe("soundstage.training.config:lod_recipe")
    with pytest.raises(ConfigError, match=r"returned Optim, not a TrainConfig"):
        load_recipe("soundstage.training.config:Optim")


def test_a_configuration_is_described_for_json() -> None:
    shown = describe(Settings())
    assert shown["is"].endswith(":Settings")
    assert shown["fps"] == "16"
    assert shown["scale"] == {"video": 1.0, "audio": 1.0}
    assert shown["optim"]["lr"] == 3e-4
    assert describe(load_recipe) == "soundstage.training.config:load_recipe"


def test_a_run_checks_itself() -> None:
    base = {"name": "a", "model": None, "objective": None, "data": None, "steps": 1}
    with pytest.raises(ConfigError, match=r"batch_size: 64 is not a multiple of accumulate=3"):
        TrainConfig(**base, accumulate=3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"weights: 'adio' is neither a modality nor a term"):
        TrainConfig(**base, weights={"adio": 1.0})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"stages: their starts \[5, 2\] do not ascend"):
        TrainConfig(**base, stages=(Stage(5, {}), Stage(2, {})))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"steps: 0 is not at least 1"):
        TrainConfig(**{**base, "steps": 0})  # type: ignore[arg-type]
