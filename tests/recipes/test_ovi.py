"""Ovi's recipes cut down: two steps, killed, resumed, exported as Ovi is published, four calls without guidance."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from soundstage.core.av import AV
from soundstage.core.causal import Chunking, is_causal
from soundstage.core.conditions import Conditions
from soundstage.core.errors import ConfigError, RequestError, WeightsError
from soundstage.core.system import load_system
from soundstage.data.prompts import Prompts, read_prompts
from soundstage.inference.generator import Generator
from soundstage.models.student import beside, read_student
from soundstage.recipes import ovi
from soundstage.recipes.published import Backbone, Negative, Texts, shared
from soundstage.testing.tiny import tiny
from soundstage.training.config import Stage, TrainConfig
from soundstage.training.engine import train
from soundstage.training.metrics import read

pytestmark = [
    pytest.mark.filterwarnings("ignore::soundstage.models.ovi_forms.SizeWarning"),
    pytest.mark.filterwarnings("ignore::soundstage.core.errors.Caution"),
    pytest.mark.usefixtures("here"),
]
SHAPE = AV(video=(6, 3, 4, 4), audio=(5, 10))
PROMPT = "drums rain <AUDCAP>drums<ENDAUDCAP>"


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def small(recipe: Callable[..., TrainConfig], folder: Path, prompts: Path, out: Path, steps: int) -> TrainConfig:
    config = recipe(str(folder), str(prompts))
    changes = {"data": replace(config.data, shape=SHAPE)}
    if recipe is ovi.self_forcing:  # a step of each stage, in two chunks
        forcing = config.stages[0].changes["objective"]
        changes["stages"] = (Stage(1, {"objective": replace(forcing, ratio=1)}),)
        changes["model"] = replace(config.model, causal=Chunking(Fraction(1, 4)))
    else:
        changes["objective"] = replace(config.objective, ratio=1)
    return tiny(config, out, steps, save_every=1, **changes)


def same_velocity(student: torch.nn.Module, folder: Path) -> None:
    """The exported model answers as the run's average does, up to bfloat16."""
    exported = load_system("ovi", weights=folder, dtype=torch.float32).denoiser
    x = SHAPE.map(lambda shape: torch.randn(1, *shape, generator=torch.Generator().manual_seed(1)))
    t = x.map(lambda _: torch.full((1,), 0.8333333))
    with torch.no_grad():
        ours, theirs = (net(x, t, Conditions()) for net in (student, exported))
    for name, made in ours.items():
        assert float((made - theirs[name]).norm() / made.norm()) < 2e-2


@pytest.mark.parametrize("recipe", [ovi.dmd4, ovi.dmd4_shared, ovi.self_forcing], ids=["whole", "shared", "causal"])
def test_it_runs_resumes_exports_and_generates(
    recipe: Callable[..., TrainConfig], ovi_folder: Path, prompts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    config = small(recipe, ovi_folder, prompts, out, 2)
    first = train(config, tensorboard=False).student.state_dict()
    last = out / "checkpoints" / "step-00000002"
    last.rename(last.with_name(f"{last.name}.part"))  # killed before the last checkpoint was whole
    state = train(config, tensorboard=False)
    logged = [entry for entry in read(out) if "loss" in entry]
    assert [entry["step"] for entry in logged] == [1, 2]
    first_stage = [recipe is ovi.self_forcing, False]
    assert [entry.keys() & {"dmd/video", "regression/video"} for entry in logged] == [
        {"regression/video" if begins else "dmd/video"} for begins in first_stage
    ]
    assert all(torch.equal(first[name], value) for name, value in state.student.state_dict().items())

    folder = ovi.pack(out, tmp_path / "student", config)
    assert sorted(path.name for path in folder.glob("model*")) == ["model.safetensors", "model.sampling.json"]
    same_velocity(state.student, folder)
    generator = Generator.load("ovi", "cpu", weights=folder)
    causal = recipe is ovi.self_forcing
    sampler = "streamed" if causal else "renoise"
    assert (generator.system.name, generator.system.sampling.sampler) == (config.name, sampler)
    assert is_causal(generator.system.denoiser) == causal
    assert generator.system.info["base"]["name"] == "ovi-720x720-5s"
    with pytest.raises(RequestError, match="which has guidance of 4 for video, 3 for audio built in"):
        generator.generate(PROMPT, guidance=4)
    with pytest.raises(RequestError, match="distilled for t2av alone"):
        generator.generate(PROMPT, task="t2v")
    if recipe is not ovi.dmd4_shared:
        made = generator.generate(PROMPT, size=(32, 32))
        assert (made.record["steps"], made.record["sampler"]) == (4, sampler)
        assert made.clip.frames.shape == (120, 32, 32, 3)
        assert made.clip.wave.shape == (1, 80000)


def test_the_teacher_stays_and_the_students_move(ovi_folder: Path, prompts: Path, tmp_path: Path) -> None:
    config = small(ovi.dmd4, ovi_folder, prompts, tmp_path / "run", 1)
    nets = train(config, tensorboard=False).nets
    first = Backbone("ovi", str(ovi_folder)).build().state_dict()
    for role, moved in (("teacher", False), ("student", True), ("fake_score", True)):
        changed = [not torch.equal(first[name], value.float()) for name, value in nets[role].state_dict().items()]
        assert any(changed) == moved, role


def test_a_causal_student_begins_as_its_teacher(ovi_folder: Path, prompts: Path) -> None:
    config = ovi.self_forcing(str(ovi_folder), str(prompts), begin="7")
    assert (config.stages[0].start, config.steps) == (7, 4007)
    student, teacher = (model.build() for model in (config.model, config.roles["teacher"].model))
    assert is_causal(student) and not is_causal(teacher)
    assert student.config.geometry["audio"].rate / student.config.geometry["audio"].stride == Fraction(16000, 512)
    theirs = teacher.state_dict()
    assert all(torch.equal(value, theirs[name].float()) for name, value in student.state_dict().items())
    with pytest.raises(ConfigError, match="as a causal student has none"):
        shared(config)


def test_audio_moves_three_times_as_fast_in_every_form() -> None:
    for config in (ovi.dmd4(), ovi.dmd4_shared()):
        (factor,) = config.optim.scale.values()
        assert factor == 3.0
        assert config.roles["fake_score"].optim.lr < config.optim.lr


def test_texts_are_encoded_once_and_each_modality_has_its_negative(ovi_folder: Path, tmp_path: Path) -> None:
    texts = Texts("ovi", str(ovi_folder), cache=str(tmp_path / "texts"), also=("jitter",))
    reached = []
    texts.prepare([PROMPT, PROMPT, "Audio: rain"], lambda done, total: reached.append((done, total)))
    assert reached == [(3, 3)]
    files = set((tmp_path / "texts").rglob("*.safetensors"))
    assert len(files) == 3
    cond = texts([PROMPT])
    negative = Negative(AV("jitter", "drums"), texts)(cond)
    assert torch.equal(negative.text["video"], texts(["jitter"]).text["video"])
    assert torch.equal(negative.text["audio"], texts(["drums"]).text["audio"])
    assert Negative(AV("jitter", "drums"), texts)(Conditions()).text is None


def test_lists_of_prompts(tmp_path: Path) -> None:
    lines = tmp_path / "prompts.jsonl"
    lines.write_text('{"prompt": "drums"}\n{"caption": "rain"}\n')
    assert read_prompts(lines) == ["drums", "rain"]
    lines.write_text('{"prompt": "drums"}\n{"text": 1}\n')
    with pytest.raises(ConfigError, match=r"line 2 of .* is not"):
        read_prompts(lines)
    with pytest.raises(ConfigError, match=r"there is no file 'absent.txt'; give a \.txt"):
        read_prompts(Path("absent.txt"))
    lines.write_text("\n")
    with pytest.raises(ConfigError, match="holds no prompt"):
        read_prompts(lines)
    many = tmp_path / "many.txt"
    many.write_text("\n".join(map(str, range(5))))
    pool = Prompts(str(many), lambda _: Conditions(), SHAPE, seed=3).build()
    assert sorted(name for step in range(5) for name in pool.batch(step, 1).ids) == [f"prompt-{i}" for i in range(5)]
    assert pool.batch(0, 2).x0["video"].shape == (2, 6, 3, 4, 4)


def test_a_folder_without_weights_and_a_description_of_no_student(tmp_path: Path) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in Backbone("ovi", "absent").build().parameters()) == 11_660_753_108
    with pytest.raises(WeightsError, match="there is no such folder"):
        Backbone("ovi", "absent").build()
    weights = tmp_path / "model.safetensors"
    assert read_student(weights) is None
    beside(weights).write_text(json.dumps({"name": "x"}))
    with pytest.raises(WeightsError, match="does not describe a student"):
        read_student(weights)
