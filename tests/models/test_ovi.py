"""Ovi and Wan end to end, from folders in their published formats: loading, tasks, switches and bad input."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from soundstage.cli.app import main
from soundstage.core.attention import Memo
from soundstage.core.av import AV
from soundstage.core.errors import Caution, RequestError, WeightsError
from soundstage.core.system import Deferred, load_system
from soundstage.inference.accelerate import Switches
from soundstage.inference.generator import Generated, Generator, read_record
from soundstage.media.clip import Clip
from soundstage.media.decode import read

PROMPT = "a man says <S>hello<E> <AUDCAP>calm voice<ENDAUDCAP>"
SMALL = {"steps": 2, "size": (64, 64), "skip_layer": 1}

pytestmark = pytest.mark.filterwarnings("ignore::soundstage.models.ovi_forms.SizeWarning")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def generate(folder: Path, prompt: str = PROMPT, switches: str = "", **request: Any) -> Generated:  # noqa: ANN401
    generator = Generator.load("ovi", "cpu", weights=folder, switches=Switches.parse(switches))
    made = generator.generate(prompt, **{**SMALL, **request})
    assert isinstance(made, Generated)
    return made


@pytest.fixture(scope="module")
def plain(ovi_folder: Path) -> Generated:
    """One clip, without any switch."""
    return generate(ovi_folder, switches="no-text-memo,together")


def same(a: Generated, b: Generated, atol: float = 1e-5) -> bool:
    return all(torch.allclose(x, b.latents[name], rtol=0, atol=atol) for name, x in a.latents.items())


def test_the_command_makes_a_playable_clip(ovi_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", "ovi", "--weights", str(ovi_folder), "--steps", "2", "--size", "64x64", "--skip-layer", "1"]
    with pytest.raises(SystemExit) as stopped:
        main(["generate", PROMPT, "-o", "clip.mp4", *options])
    assert stopped.value.code == 0, capsys.readouterr().err
    clip = read("clip.mp4")
    assert clip.frames.shape == (120, 64, 64, 3)
    assert clip.fps == 24
    assert clip.sample_rate == 16000
    assert abs(clip.wave.shape[1] - 80000) <= 1024  # AAC codes whole packets of 1024 samples
    assert clip.frames.std() > 1
    assert clip.wave.std() > 1e-3
    record = read_record(clip.metadata)
    assert (record["model"], record["sampler"], record["guidance"]) == (
        "ovi-720x720-5s",
        "unipc",
        {"video": 4, "audio": 3},
    )
    assert record["negative"]["audio"].startswith("robotic")
    assert record["duration"] == 5.0


def test_picture_and_sound_have_one_length(plain: Generated) -> None:
    assert plain.clip.frames.shape[0] == 120
    assert plain.clip.wave.shape == (1, 80000)
    assert plain.clip.video_duration == plain.clip.audio_duration == 5.0
    assert plain.latents["video"].shape == (6, 31, 4, 4)
    assert plain.latents["audio"].shape == (5, 157)


@pytest.mark.parametrize("switches", ["text-memo", "apart", "offload", "no-text-memo,tiles=2"])
def test_switches_that_change_nothing(ovi_folder: Path, plain: Generated, switches: str) -> None:
    made = generate(ovi_folder, switches=switches)
    assert same(made, plain)
    assert np.abs(made.clip.frames.astype(int) - plain.clip.frames).max() <= 1
    assert np.abs(made.clip.wave - plain.clip.wave).max() < 1e-4


def test_guidance_apart_equals_together(ovi_folder: Path) -> None:
    together, apart = (generate(ovi_folder, switches=how, skip_layer=-1, steps=1) for how in ("together", "apart"))
    assert same(together, apart, 2e-2)  # bfloat16 weights: batched products round otherwise
    assert not torch.equal(together.latents["video"], generate(ovi_folder, steps=1).latents["video"])


def test_nothing_of_a_text_is_kept_once_the_clip_is_done(ovi_folder: Path) -> None:
    generator = Generator.load("ovi", "cpu", weights=ovi_folder)
    generator.generate(PROMPT, **{**SMALL, "steps": 1})
    (backbone,) = generator._prepared
    memos = [part for part in backbone.modules() if isinstance(part, Memo)]
    assert [(part.enabled, part._kept) for part in memos] == [(True, [])] * 2


def test_a_clip_is_the_same_alone_and_in_a_batch(ovi_folder: Path) -> None:
    generator = Generator.load("ovi", "cpu", weights=ovi_folder)
    generator.batch = 2
    two = generator.generate([PROMPT, "drums rain <AUDCAP>drums<ENDAUDCAP>"], **SMALL)
    generator.batch = 1
    one = generator.generate("drums rain <AUDCAP>drums<ENDAUDCAP>", **SMALL)
    assert same(two[1], one, 2e-2)


def test_negatives_are_separate_for_picture_and_sound(ovi_folder: Path, plain: Generated) -> None:
    other = generate(ovi_folder, negative=(None, "drums"), switches="no-text-memo")
    assert not torch.equal(other.latents["audio"], plain.latents["audio"])
    assert other.record["negative"] == {"video": plain.record["negative"]["video"], "audio": "drums"}


def test_a_first_frame_is_kept(ovi_folder: Path) -> None:
    image = Clip(frames=np.random.default_rng(0).integers(0, 255, (1, 70, 64, 3), dtype=np.uint8), fps=24)
    made = generate(ovi_folder, image=image)
    codec = load_system("ovi", weights=ovi_folder).codec
    frame = torch.from_numpy(image.frames[0, 3:67].copy()).permute(2, 0, 1)[None, :, None].float() / 127.5 - 1
    torch.testing.assert_close(made.latents["video"][:, :1], codec.encode(AV(video=frame))["video"][0])
    assert made.task == "i2av"


@pytest.mark.parametrize("task", ["a2v", "v2a", "extension", "t2v", "t2a"])
def test_other_tasks_say_that_they_are_untrained(ovi_folder: Path, plain: Generated, task: str) -> None:
    given: dict[str, Any] = {
        "a2v": {"audio": plain.clip},
        "v2a": {"video": plain.clip},
        "extension": {"video": plain.clip},
    }
    with pytest.warns(Caution, match="out of distribution"):
        made = generate(ovi_folder, task=task, **given.get(task, {}))
    assert all(torch.isfinite(x).all() for x in made.latents.values())
    if task == "a2v":
        assert np.array_equal(made.clip.wave, plain.clip.wave)
    if task == "extension":
        assert made.clip.duration > 7
    assert made.latents.modalities == {"t2v": ("video",), "t2a": ("audio",)}.get(task, ("video", "audio"))


def test_prompts_are_put_into_the_models_form(ovi_folder: Path) -> None:
    form = load_system("ovi", weights=ovi_folder).form
    assert form is not None
    with pytest.warns(Caution, match="Audio:.*rewritten"):
        assert form("a man says <S>hello<E> Audio: calm voice") == PROMPT
    with pytest.warns(Caution, match="<E>"):
        form("a man says <S>hello <AUDCAP>calm voice<ENDAUDCAP>")
    assert form(PROMPT) == PROMPT


@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_lighter_weights_stay_near(ovi_folder: Path, plain: Generated, form: str) -> None:
    made = generate(ovi_folder, switches=form)
    for name, x in made.latents.items():
        error = (x - plain.latents[name]).norm() / plain.latents[name].norm()
        assert 0 < error < 0.1


# Wan


@pytest.mark.parametrize("name", ["wan2.2-5b", "wan2.1-t2v-1.3b"])
def test_wan_makes_silent_clips(wan_folder: Callable[..., Path], name: str) -> None:
    old = name.startswith("wan2.1")
    files = ("Wan2.1_VAE.pth", "wan21_vae", 16) if old else ("Wan2.2_VAE.pth", "wan22_vae", 6)
    folder = wan_folder(*files, in_channels=files[2])
    made = Generator.load(name, "cpu", weights=folder).generate(
        "waves on the shore", steps=2, size=(64, 64), duration=1.0
    )
    assert made.clip.frames.shape[1:] == (64, 64, 3)
    assert made.clip.wave is None
    assert made.clip.fps == (16 if old else 24)
    assert len(made.clip.frames) == (17 if old else 25)


def test_wan_image_to_video_is_told_its_first_frame(wan_folder: Callable[..., Path]) -> None:
    folder = wan_folder("Wan2.1_VAE.pth", "wan21_vae", 16, in_channels=36, image_width=160)
    generator = Generator.load("wan2.1-i2v-14b-480p", "cpu", weights=folder)
    request = {"steps": 2, "size": (64, 64), "duration": 0.5}
    with pytest.raises(RequestError, match="needs an image"):
        generator.generate("red ball rolls", **request)
    images = [Clip(frames=np.full((1, 64, 64, 3), value, np.uint8), fps=24) for value in (20, 230)]
    dark, light = (generator.generate("red ball rolls", image=image, **request) for image in images)
    assert dark.latents["video"].shape == (16, 3, 8, 8)
    assert not torch.allclose(dark.latents["video"], light.latents["video"])


# Bad input


def refused(capsys: pytest.CaptureFixture[str], folder: Path, *options: str, model: str = "ovi") -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(["generate", PROMPT, "-o", "clip.mp4", "--model", model, "--weights", str(folder), *options])
    error = capsys.readouterr().err
    assert stopped.value.code == 2, error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not Path("clip.mp4").exists()
    return error


@pytest.fixture
def copy(ovi_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(ovi_folder, tmp_path / "copy")


def test_a_wrong_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert "soundstage models fetch ovi" in refused(capsys, tmp_path / "empty")
    assert "there is no folder" in refused(capsys, tmp_path / "nothing")


def test_a_half_downloaded_file(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = copy / "Ovi" / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    error = refused(capsys, copy)
    assert (
        f"{len(whole) // 2} of {len(whole)} bytes" in error.replace(",", "").replace(" ", " ") or "truncated" in error
    )
    path.write_bytes(whole)
    vae = copy / "Wan2.2-TI2V-5B" / "Wan2.2_VAE.pth"
    vae.write_bytes(vae.read_bytes()[:-5000])
    assert "Wan2.2_VAE.pth" in refused(capsys, copy)


def test_a_checkpoint_of_another_model(
    copy: Path, wan_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    wan = wan_folder("Wan2.2_VAE.pth", "wan22_vae", 6, in_channels=6)
    assert "ovi" in refused(capsys, wan).lower()
    shard = next(wan.glob("*-00001-of-*.safetensors"))
    shutil.copy(shard, copy / "Ovi" / "model.safetensors")
    assert "model.safetensors" in refused(capsys, copy)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--size", "700x1280"), "the nearest possible is 704x1280"),
        (("--size", "wide"), "such as 704x1280, or an aspect"),
        (("--duration", "7"), "makes 5.00 s, the nearest to it; ovi-960x960-10s makes 10.04 s"),
        (("--skip-layer", "9"), "9 is not from 0 to 2"),
        (("--accelerate", "int9"), "did you mean 'int8'"),
        (("--accelerate", "attention=sage"), "CUDA"),
    ],
)
def test_impossible_requests(
    ovi_folder: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], expected: str
) -> None:
    assert expected in refused(capsys, ovi_folder, *options)


def test_nothing_large_is_read_before_the_request_is_known_to_be_possible(ovi_folder: Path) -> None:
    system = load_system("ovi", weights=ovi_folder)
    generator = Generator(system)
    with pytest.raises(RequestError):
        generator.generate(PROMPT, duration=7)
    backbone: Any = system.denoiser.denoiser  # type: ignore[attr-defined]
    assert isinstance(backbone, Deferred)
    assert backbone.built is False
    assert system.encode_text._model is None  # type: ignore[attr-defined]


def test_a_published_name_asks_for_its_folder() -> None:
    with pytest.raises(Exception, match=r"--weights FOLDER.*models fetch ovi"):
        load_system("ovi")
    with pytest.raises(WeightsError, match="there is no folder"):
        load_system("ovi", weights="nowhere")
