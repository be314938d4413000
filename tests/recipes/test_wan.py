"""Wan's recipes cut down: each runs, resumes, is exported as Wan is published, and makes a clip in four calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from soundstage.core.av import AV
from soundstage.core.conditions import Conditions
from soundstage.core.errors import ConfigError, RequestError
from soundstage.core.system import Sampling, load_system
from soundstage.data.records import ClipShape
from soundstage.inference.generator import Generator
from soundstage.objectives.flow_map import Derivative
from soundstage.objectives.progressive import Gate
from soundstage.recipes import wan
from soundstage.recipes.published import Agreement, Backbone
from soundstage.testing.tiny import tiny
from soundstage.training.chain import Chain, load, train_chain
from soundstage.training.config import TrainConfig
from soundstage.training.engine import RunError, train
from soundstage.training.metrics import read

pytestmark = [
    pytest.mark.filterwarnings("ignore::soundstage.models.ovi_forms.SizeWarning"),
    pytest.mark.filterwarnings("ignore::soundstage.core.errors.Caution"),
    pytest.mark.usefixtures("here"),
]
MODEL = "wan2.1-t2v-1.3b"
CLIP = ClipShape(fps=16, size=(16, 16), num_frames=5)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def on_clips(config: TrainConfig) -> TrainConfig:
    """The recipe on the tiny clips, in float32 (bfloat16 on a CPU is slow), moving at every step."""
    return replace(config, data=replace(config.data, shape=CLIP), precision="fp32")


def dmd4(weights: Path, clips: Path, prompts: Path) -> TrainConfig:  # noqa: ARG001
    config = wan.dmd4(str(weights), str(prompts))
    channels = Backbone(MODEL, str(weights)).build().config.out_channels  # type: ignore[union-attr]
    data = replace(config.data, shape=AV(video=(channels, 2, 2, 2)))
    return replace(config, data=data, precision="fp32", objective=replace(config.objective, ratio=1))


def rcm4(weights: Path, clips: Path, prompts: Path) -> TrainConfig:  # noqa: ARG001
    config = on_clips(wan.rcm4(str(weights), str(clips)))
    objective: Any = config.objective
    consistency = replace(objective.consistency, ramp=1.0)
    return replace(config, objective=replace(objective, consistency=consistency, dmd=replace(objective.dmd, ratio=1)))


def meanflow(weights: Path, clips: Path, prompts: Path) -> TrainConfig:  # noqa: ARG001
    config = on_clips(wan.meanflow(str(weights), str(clips)))
    return replace(config, objective=replace(config.objective, ramp=1.0))


@pytest.mark.parametrize(
    ("recipe", "sampling"),
    [
        (dmd4, wan.renoising(wan.DMD_SCALE)),
        (rcm4, wan.renoising(wan.RCM_SCALE)),
        (meanflow, wan.renoising(wan.MEAN_FLOW_SCALE)),
    ],
    ids=["dmd4", "rcm4", "meanflow"],
)
def test_it_runs_resumes_exports_and_generates(
    recipe: Callable[[Path, Path, Path], TrainConfig],
    sampling: Sampling,
    wan_folder: Path,
    clips_folder: Path,
    prompts: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "run"
    config = tiny(recipe(wan_folder, clips_folder, prompts), out, save_every=1)
    first = train(config, tensorboard=False).student.state_dict()
    last = out / "checkpoints" / "step-00000002"
    last.rename(last.with_name(f"{last.name}.part"))  # killed before the last checkpoint was whole
    student = train(config, tensorboard=False).student
    assert all(torch.equal(first[name], value) for name, value in student.state_dict().items())

    folder = wan.pack(out, tmp_path / "student", config, sampling)
    generator = Generator.load(MODEL, "cpu", weights=folder)
    made = generator.generate("red ball rolls", size=(16, 16), duration=5 / 16)
    assert (made.record["steps"], generator.system.name) == (4, config.name)
    assert made.clip.frames.shape == (5, 16, 16, 3)
    with pytest.raises(RequestError, match="built in; leave guidance out"):
        generator.generate("red ball rolls", guidance=5)
    with pytest.raises(RequestError, match="distilled for 4 steps, not 8"):
        generator.generate("red ball rolls", steps=8)

    exported = load_system(MODEL, weights=folder, dtype=torch.float32).denoiser
    x = AV(video=torch.randn(1, *made.latents["video"].shape, generator=torch.Generator().manual_seed(1)))
    t = AV(video=torch.full((1,), 0.8333333))
    asked = {"r": t * 0.0} if recipe is meanflow else {}
    with torch.no_grad():
        ours, theirs = student(x, t, Conditions(), **asked)["video"], exported(x, t, Conditions())["video"]
    assert float((ours - theirs).norm() / ours.norm()) < 2e-2


def chain(weights: Path, clips: Path, out: Path, gate: Gate) -> Chain:
    """The progressive recipe in two steps a link, one sample in the gate."""
    whole = wan.progressive_16_8_4(str(weights), str(clips))
    run = tiny(on_clips(whole.run), out, save_every=1, validate=Agreement(16, 3, samples=1), validate_every=2)
    links = {
        name: {k: replace(v, samples=1) if k == "validate" else v for k, v in changes.items()}
        for name, changes in whole.links.items()
    }
    return replace(whole, run=run, links=links, gate=gate)


def test_progressive_takes_each_student_as_the_next_teacher(
    wan_folder: Path, clips_folder: Path, tmp_path: Path
) -> None:
    links = chain(wan_folder, clips_folder, tmp_path / "run", Gate("gap", at_most=100.0))
    begun: list[str] = []
    assert train_chain(links, on_link=lambda config: begun.append(config.name), tensorboard=False)
    assert begun == [f"wan-progressive-{name}" for name in ("16", "8", "4")]
    configs = links.configs
    assert [config.objective.grid.steps for config in configs] == [16, 8, 4]
    assert [config.objective.substeps for config in configs] == [3, 2, 2]
    assert [config.objective.guidance is None for config in configs] == [False, True, True]
    state = train(configs[2], tensorboard=False)  # nothing is left to do: the run as it ended
    before = train(configs[1], tensorboard=False).student.state_dict()
    for name, value in state.nets["teacher"].state_dict().items():
        assert torch.equal(value, before[name].to(value.dtype)), name
    assert any(not torch.equal(value, before[name]) for name, value in state.student.state_dict().items())
    assert train_chain(links, on_link=lambda config: begun.append(config.name), tensorboard=False)
    assert len(begun) == 3, "what is done is not done again"

    folder = wan.pack(configs[2].folder, tmp_path / "student", configs[2], wan.walking())
    made = Generator.load(MODEL, "cpu", weights=folder).generate("red ball rolls", size=(16, 16), duration=5 / 16)
    assert (made.record["sampler"], made.record["steps"]) == ("euler", 4)


def test_a_gate_extends_a_link_and_then_stops_the_chain(wan_folder: Path, clips_folder: Path, tmp_path: Path) -> None:
    links = chain(wan_folder, clips_folder, tmp_path / "run", Gate("gap", at_most=0.0))
    with pytest.raises(RunError, match=r"wan-progressive-16: gap is .* after 3 steps and 1 extensions, and must be at"):
        train_chain(links, tensorboard=False)
    assert [entry["step"] for entry in read(tmp_path / "run" / "16") if "validate/gap" in entry] == [2, 3]
    assert not (tmp_path / "run" / "8").exists()


def test_a_flow_map_begins_as_its_teacher_and_learns_of_r(wan_folder: Path) -> None:
    one = Backbone(MODEL, str(wan_folder)).build()
    two = Backbone(MODEL, str(wan_folder), two_times=True).build()
    channels = one.config.out_channels  # type: ignore[union-attr]
    x, t = AV(video=torch.randn(2, channels, 2, 2, 2)), AV(video=torch.tensor([0.9, 0.5]))
    r = t * 0.5
    with torch.no_grad():
        expected = one(x, t, Conditions())["video"]
        assert torch.equal(two(x, t, Conditions(), r=r)["video"], expected)
        torch.nn.init.normal_(two.span_embedding[2].weight)  # type: ignore[union-attr]
        assert not torch.allclose(two(x, t, Conditions(), r=r)["video"], two(x, t, Conditions(), r=t)["video"])
        assert torch.equal(two(x, t, Conditions(), r=t)["video"], two(x, t, Conditions())["video"])
    span = t - r
    found = [
        derivative(lambda x, s: two(x, s, Conditions(), r=r), x, t, span * x, span)[1]["video"]
        for derivative in (Derivative("jvp"), Derivative("difference", 1e-3))
    ]
    assert float((found[0] - found[1]).norm() / found[0].norm()) < 5e-2


def test_words_reach_the_recipe_or_its_settings() -> None:
    one = load("soundstage.recipes.wan:dmd4", ["folder=mine", "steps=7", "objective.ratio=3", "data=other.txt"])
    assert isinstance(one, TrainConfig)
    teacher: Any = one.roles["teacher"].model
    assert (teacher.folder, one.data.tokenize.folder, one.data.file) == ("mine", "mine", "other.txt")
    assert (one.steps, one.objective.ratio) == (7, 3)
    links = load("soundstage.recipes.wan:progressive_16_8_4", ["folder=mine", "optim.lr=3e-6", "out=there"])
    assert isinstance(links, Chain)
    assert [config.optim.lr for config in links.configs] == [3e-6] * 3
    assert [str(config.folder) for config in links.configs] == ["there/16", "there/8", "there/4"]
    assert [config.init for config in links.configs] == [None, "there/16", "there/8"]
    with pytest.raises(ConfigError, match="did you mean 'steps'"):
        load("soundstage.recipes.wan:dmd4", ["stepz=7"])
    with pytest.raises(ConfigError, match="not a TrainConfig or a Chain"):
        load("soundstage.recipes.wan:walking")
    with pytest.raises(ConfigError, match=r"set run\.validate"):
        Chain(one, {"16": {}}, Gate("gap", at_most=1.0))
