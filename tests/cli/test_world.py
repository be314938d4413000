"""`soundstage world` and `soundstage models`: what they write is what the world says."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., tuple[int, str, str]]


def test_rendered_clips_have_captions_and_truth_beside_them(run: Run, tmp_path: Path) -> None:
    from soundstage.media.probe import probe
    from soundstage.world import stream_item

    args = ("--num", 2, "--seed", 5, "--size", 32, "--fps", "23.976", "--duration", 3, "-o", tmp_path / "a")
    code, out, err = run("world", "render", *args, "--json")
    assert (code, err.splitlines()[-1].startswith("rendering: 2/2")) == (0, True)
    lines = [json.loads(line) for line in out.splitlines()]
    assert len(lines) == 2
    for index, told in enumerate(lines):
        scene, caption = stream_item(5, index)
        path = Path(told["path"])
        assert (path.parent, told["caption"]) == (tmp_path / "a", caption)
        assert path.with_suffix(".txt").read_text() == caption + "\n"
        truth = json.loads(path.with_suffix(".json").read_text())
        assert (truth["caption"], truth["scene"]["seed"]) == (caption, scene.seed)
        info = probe(path)
        assert info.video is not None
        assert (info.video.height, str(info.video.fps), info.video.declared_frames) == (32, "24000/1001", 72)
    assert (tmp_path / "a" / "sheet.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--kinds", "bouncy"), "kinds: 'bouncy' is not one of bounce, "),
        (("--fps", "fast"), "fps: 'fast'"),
        (("--num", "0"), "Invalid value for '--num'"),
        (("--duration", "100"), "not 1 to 8"),
        (("--kinds", "drums", "--held-out"), "kinds: 'drums' is not one of"),
    ],
)
def test_what_the_world_refuses_is_one_sentence(args: tuple[str, ...], said: str, run: Run, tmp_path: Path) -> None:
    code, out, err = run("world", "render", *args, "-o", tmp_path)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert said in err
    assert err.count("\n") == 1


def test_show_draws_the_scene_that_a_caption_names(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr("soundstage.world.show.contact_sheet", lambda _, path, **marks: drawn.append((path, marks)))
    caption = "a large blue glass ball bounces twice"
    path = tmp_path / "ball.png"
    assert run("world", "show", caption, "-o", path) == (0, f"{path}  {caption}\n", "")
    assert (drawn[0][0], drawn[0][1]["title"], len(drawn[0][1]["events"])) == (path, caption, 2)
    code, _, err = run("world", "show", "hello", "-o", path)
    assert (code, err.startswith("error: prompt: 'hello' names no kind")) == (2, True)


def test_show_writes_a_picture(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "sheets" / "drums.png"
    code, out, _ = run("world", "show", "--kinds", "drums", "--seed", 3, "-o", path)
    assert code == 0
    assert out.startswith(str(path))
    assert path.read_bytes().startswith(b"\x89PNG")


def test_models_are_listed_and_described(run: Run, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(3, 5), "b": torch.zeros(2)}, tmp_path / "m.safetensors")
    (tmp_path / "model.json").write_text('{"loader": "soundstage.models.system:load", "name": "toy"}')
    (tmp_path / "README.md").write_text("# The card\n")
    code, out, _ = run("models", "describe", tmp_path, "--json")
    told = json.loads(out)
    assert (code, told["name"], told["parameters"]) == (0, "toy", 17)
    assert told["files"]["m.safetensors"]["bytes"] == (tmp_path / "m.safetensors").stat().st_size
    assert "# The card" in run("models", "describe", tmp_path)[1]
    code, _, err = run("models", "describe", "wrld-tiny")
    assert code == 2
    assert err.startswith("error: model: 'wrld-tiny' is not")
    assert run("models", "list", "--json")[0] == 0
