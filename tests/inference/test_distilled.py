"""A distilled model says what it was distilled for, and refuses the rest in one sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from soundstage.cli.app import main
from soundstage.core.av import AV
from soundstage.core.errors import ConfigError, RequestError, WeightsError
from soundstage.core.system import Sampling, System, load_system
from soundstage.inference.generator import Generator
from soundstage.media.clip import Clip
from soundstage.models.codecs.audio import AudioCodecConfig
from soundstage.models.codecs.pair import PairCodec
from soundstage.models.codecs.video import VideoCodecConfig
from soundstage.models.system import save_system
from soundstage.models.text.bytes import ByteTextConfig
from soundstage.models.unified_dit import UnifiedDiTConfig
from soundstage.models.weights import fingerprint

TIMES = AV(video=(1.0, 0.9375, 0.8, 0.0), audio=(1.0, 0.9, 0.7, 0.0))
STUDENT = {"sampler": "renoise", "steps": 3, "times": TIMES, "guidance": AV(1.0, 1.0), "baked": AV(4.0, 3.0)}

Make = Callable[..., System]


def refused(generator: Generator, sentence: str, **request: object) -> None:
    with pytest.raises(RequestError, match=sentence):
        generator.generate("x", **request)


def test_it_is_asked_at_its_own_times(make_system: Make) -> None:
    system = make_system(**STUDENT)
    asked: list[tuple[float, float]] = []
    call = system.denoiser.forward

    def listening(x_t: AV, t: AV, *rest: object, **more: object) -> AV:
        asked.append((float(t["video"][0]), float(t["audio"][0])))
        return call(x_t, t, *rest, **more)

    system.denoiser.forward = listening
    made = Generator(system).generate("x")
    assert [video for video, _ in asked] == pytest.approx([1.0, 0.9375, 0.8])
    assert [audio for _, audio in asked] == pytest.approx([1.0, 0.9, 0.7])
    assert (made.record["steps"], made.record["sampler"]) == (3, "renoise")
    again = Generator(system).generate("x", steps=3, sampler="renoise", guidance=1)
    assert torch.equal(again.latents["video"], made.latents["video"])


def test_guidance_is_not_applied_twice(make_system: Make) -> None:
    generator = Generator(make_system(**STUDENT))
    refused(
        generator,
        r"guidance: 3 is asked of tiny, which has guidance of 4 for video, 3 for audio built in; leave",
        guidance=(1, 3),
    )
    refused(generator, "reads no negative; leave it out", negative="blurred")
    refused(generator, "reads no negative; leave it out", negative=(None, "noise"))
    generator.generate("x", negative=(None, None))


def test_steps_and_sampler_are_those_it_was_distilled_for(make_system: Make) -> None:
    generator = Generator(make_system(**STUDENT))
    refused(generator, "steps: tiny was distilled for 3 steps, not 4; leave steps out", steps=4)
    refused(generator, "sampler: tiny was distilled for renoise, not euler", sampler="euler")
    flow_map = Generator(make_system(**STUDENT, any_steps=True))
    assert flow_map.generate("x", steps=4, sampler="euler").record["steps"] == 4


def test_a_modality_or_task_it_never_saw(make_system: Make, clip: Clip) -> None:
    silent = Generator(make_system(**{**STUDENT, "times": TIMES.only("video")}))
    refused(silent, "task t2av: tiny was distilled for video alone and cannot generate audio; name another")
    assert silent.generate("x", task="t2v").clip.wave is None
    silent.generate("x", audio=clip)
    joint = Generator(make_system(**STUDENT, tasks=("t2av", "a2v")))
    refused(joint, "task t2a: tiny was distilled for t2av, a2v alone; ask for one of these", task="t2a")
    joint.generate("x", audio=clip)


def test_a_description_that_contradicts_itself() -> None:
    with pytest.raises(ConfigError, match="are of 3 steps, and steps is 50; make them agree"):
        Sampling("renoise", times=TIMES)
    with pytest.raises(ConfigError, match="acts a second time; set guidance to 1"):
        Sampling(guidance=AV(3.0, 1.0), baked=AV(3.0, 1.0))
    with pytest.raises(ConfigError, match="must descend"):
        Sampling("renoise", 2, times=AV((1.0, 1.2, 0.0)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A student's model folder."""
    codec = PairCodec(
        AV(
            video=VideoCodecConfig(channels=4, detail=8, encoder_width=16, decoder_width=16).build(),
            audio=AudioCodecConfig(channels=6, encoder_width=16, decoder_width=16, vocoder_width=16).build(),
        )
    )
    config = UnifiedDiTConfig(codec.geometry, 32, 1, 2, rank=8, text=ByteTextConfig(16, 1, 2), text_inner=16)
    denoiser = config.build()
    base = {"name": "world-tiny", "sha256": fingerprint(denoiser.state_dict())}
    sampling = Sampling(**STUDENT, tasks=("t2av", "t2a"))
    return save_system(tmp_path / "student", "small-3step", config, denoiser, codec, sampling, base=base)


def test_a_model_folder_describes_itself(folder: Path) -> None:
    system = load_system(folder)
    assert (system.sampling.sampler, system.sampling.steps) == ("renoise", 3)
    assert system.sampling.times.as_dict() == TIMES.as_dict()
    assert system.sampling.baked.as_dict() == {"video": 4.0, "audio": 3.0}
    assert (system.sampling.tasks, system.sampling.any_steps) == (("t2av", "t2a"), False)
    told = json.loads((folder / "model.json").read_text())
    assert told["sampling"]["baked"] == {"video": 4.0, "audio": 3.0}
    assert told["conventions"]["guidance"] == "v + (scale - 1) (v - v_negative), 1 = none"
    assert (told["base"]["name"], len(told["base"]["sha256"])) == ("world-tiny", 64)
    told["conventions"]["velocity"] = "x0 - noise"
    (folder / "model.json").write_text(json.dumps(told))
    with pytest.raises(WeightsError, match="under other conventions"):
        load_system(folder)


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--guidance", "3"], "guidance: 3 is asked of small-3step, which has guidance of 4 for video, 3 for audio"),
        (["--steps", "50"], "steps: small-3step was distilled for 3 steps, not 50; leave steps out"),
        (["--sampler", "euler"], "sampler: small-3step was distilled for renoise, not euler"),
        (["--negative", "blur"], "negative: small-3step has guidance of 4 for video, 3 for audio built in"),
        (["--task", "t2v"], "task t2v: small-3step was distilled for t2av, t2a alone; ask for one of these"),
    ],
)
def test_the_command_line_says_so(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], args: list[str], sentence: str
) -> None:
    out = tmp_path / "clip.mp4"
    with pytest.raises(SystemExit) as stopped:
        main(["generate", "a red ball bounces", "--model", str(folder), "--device", "cpu", "-o", str(out), *args])
    told, said = capsys.readouterr()
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert (stopped.value.code, told, len(errors)) == (2, "", 1)
    assert sentence in errors[0]
    assert not out.exists()


def test_what_it_was_distilled_for_runs(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "clip.wav"
    with pytest.raises(SystemExit) as stopped:
        main(["generate", "a red ball", "--model", str(folder), "--device", "cpu", "--task", "t2a", "-o", str(out)])
    assert stopped.value.code in (None, 0)
    assert out.stat().st_size > 1000
