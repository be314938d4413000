"""`soundstage generate`: files, records, what is printed, and one sentence with exit code 2 for a mistake."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from soundstage.cli.app import main
from soundstage.cli.generate import measure
from soundstage.core.system import System
from soundstage.inference.generator import Generator, read_record
from soundstage.media.clip import Clip
from soundstage.media.decode import read
from soundstage.world import caption, render, sample_scene


@pytest.fixture(autouse=True)
def tiny(make_system: Callable[..., System], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Generator, "load", lambda *_, **__: Generator(make_system()))
    monkeypatch.chdir(tmp_path)


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        main(["generate", *args])
    return int(stopped.value.code or 0), *capsys.readouterr()


def test_one_clip_with_its_record(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "a harp's song", "-o", "made/ball.mp4", "--seed", "3", "--steps", "2")
    assert code == 0
    assert out.startswith("made/ball.mp4  1.12 s  sync")
    record = read_record(read("made/ball.mp4").metadata)
    assert (record["prompt"], record["seed"], record["steps"]) == ("a harp's song", 3, 2)


def test_the_recorded_command_makes_the_clip_again(capsys: pytest.CaptureFixture[str], saved: Path) -> None:
    extra = ["--video", str(saved), "--task", "inpaint", "--range", "0.3:0.5", "--num", "2", "--guidance", "2,1.25"]
    run(capsys, "a harp", "-o", "a.mp4", *extra)
    record = read_record(read("a-02.mp4").metadata)
    words = shlex.split(str(record["command"]))
    assert words[:2] == ["soundstage", "generate"]
    code, _, _ = run(capsys, *words[2:], "-o", "b.mp4")
    assert code == 0
    np.testing.assert_array_equal(read("a-02.mp4").frames, read("b.mp4").frames)
    assert read_record(read("b.mp4").metadata) == record


def test_several_clips_are_numbered_and_told_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    Path("prompts.txt").write_text("a xylophone\n\n  a harp \n", encoding="utf-8")
    code, out, _ = run(capsys, "--prompts", "prompts.txt", "--num", "2", "--json", "--steps", "1")
    assert code == 0
    told = [json.loads(line) for line in out.splitlines()]
    assert [t["path"] for t in told] == [f"clip-{i:02d}.mp4" for i in (1, 2, 3, 4)]
    assert [(t["prompt"], t["seed"]) for t in told] == [(p, s) for p in ("a xylophone", "a harp") for s in (0, 1)]
    assert all(Path(t["path"]).stat().st_size > 500 for t in told)


def test_a_sheet_beside_each_clip(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, _ = run(capsys, "a harp", "-o", "made/harp.mp4", "--num", "2", "--steps", "1", "--sheet")
    assert code == 0
    for name in ("harp-01", "harp-02"):
        assert Path(f"made/{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ([], "nothing to make"),
        (["x", "--task", "a2v"], "task a2v needs a sound: give audio (--audio PATH)"),
        (["x", "--audio", "silent.mp4"], "silent.mp4 has no sound track"),
        (["x", "--video", "absent.mp4"], "absent.mp4: no such file"),
        (["x", "--steps", "-3"], "steps: -3 is not from 1 to 1000"),
        (["x", "--sampler", "eular"], "sampler: 'eular' is not one of"),
        (["x", "--guidance", "strong"], "guidance: 'strong' is not a number or VIDEO,AUDIO"),
        (["x", "--num", "0"], "num: 0 is not from 1 to 10000"),
        (["x", "-o", "ball.mp5"], "out: 'ball.mp5' is not one of"),
        (["x", "--prompts", "empty.txt"], "are both given"),
        (["--prompts", "empty.txt"], "empty.txt: holds 0 prompts"),
        (["--prompts", "binary.txt"], "binary.txt: is not a text file"),
        (["--prompts", "absent.txt"], "absent.txt: there is no such file"),
        (["x", "--video", "silent.mp4", "--task", "inpaint", "--range", "1:0.5"], "range: '1:0.5' is not START:END"),
        (["x", "--duration", "100"], "duration: 100 s is not above 0 and at most 4.5 s"),
    ],
)
def test_mistakes(args: list[str], sentence: str, clip: Clip, capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty.txt").write_text("\n \n", encoding="utf-8")
    Path("binary.txt").write_bytes(bytes([0xFF, 0xFE, 0x00, 0xD8]))
    clip.without("audio").save("silent.mp4")
    code, out, err = run(capsys, *args)
    assert (code, out) == (2, "")
    said = [line for line in err.splitlines() if not line.startswith("generating:")]
    assert len(said) == 1
    assert said[0].startswith("error: ")
    assert sentence in said[0]
    assert not list(Path().glob("clip*"))


def test_the_sync_of_a_clip_is_measured() -> None:
    scene = sample_scene(np.random.default_rng(0), kinds=("bounce",))
    clip = render(scene).clip
    found = measure(clip, caption(scene))
    assert abs(found["offset_ms"]) < 5
    late = Clip(frames=clip.frames, fps=clip.fps, wave=np.pad(clip.wave, ((0, 0), (960, 0))), sample_rate=16000)
    assert measure(late, caption(scene))["offset_ms"] == pytest.approx(60 + found["offset_ms"], abs=2)
    assert measure(clip.without("audio"), caption(scene)) == {}
    assert "lag_ms" in measure(render(sample_scene(np.random.default_rng(0), kinds=("engine",))).clip, "an engine revs")


def test_guidance_of_one_modality_is_in_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "x", "--task", "t2a", "-o", "x.wav", "--guidance", "3,2")
    record = read_record(read("x.wav", video=False).metadata)
    assert "--guidance 3,2 " in str(record["command"])
