"""The command line as a user meets it: fast help, examples, one sentence per error, exit codes."""

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from typer.main import get_command

from soundstage.cli.app import app, main


def commands(
    group: typer.core.TyperGroup, path: tuple[str, ...] = ()
) -> dict[tuple[str, ...], typer.core.TyperCommand]:
    """Every command by its path, such as ("world", "render")."""
    found = {}
    for name, command in group.commands.items():
        inner = (*path, name)
        found.update(commands(command, inner) if hasattr(command, "commands") else {inner: command})
    return found


COMMANDS = commands(get_command(app))
Run = Callable[..., tuple[int, str, str]]


def test_the_commands_are_those_of_the_plan() -> None:
    names = {" ".join(path) for path in COMMANDS}
    models = {f"models {name}" for name in ("list", "describe", "fetch", "check")}
    stages = ("collect", "fetch", "scan", "curate", "pack")
    data = {f"data {name}" for name in (*stages, "index", "funnel", "limits", "report", "show", "validate")}
    wanted = {"generate", "evaluate", "train", "sweep", "world render", "world show", "plan", "probe", *models, *data}
    assert names == wanted


def test_help_takes_less_than_half_a_second_and_no_torch(tmp_path: Path) -> None:
    script = """
import sys
from soundstage.cli.app import main
try:
    main(["--help"])
except SystemExit:
    assert not {"torch", "numpy", "av"} & set(sys.modules)
"""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5
    assert all(path[0] in done.stdout for path in COMMANDS)


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_command_has_help_with_examples_of_itself(path: tuple[str, ...], run: Run) -> None:
    code, out, _ = run(*path, "--help")
    assert code == 0
    examples = out.partition("Examples:\n")[2].splitlines()
    assert any(line.strip().startswith(" ".join(("soundstage", *path))) for line in examples)


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_option_says_what_it_is(path: tuple[str, ...]) -> None:
    silent = [parameter.name for parameter in COMMANDS[path].params if not getattr(parameter, "help", None)]
    assert not silent


def test_no_argument_shows_the_help(run: Run) -> None:
    code, out, err = run()
    assert code == 0
    assert out.startswith("Usage: soundstage")
    assert err == ""


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["probbe", "a.mp4"], "error: No such command 'probbe'. Did you mean 'probe'?; see soundstage --help\n"),
        (["probe"], "error: Missing argument 'FILE...'; see soundstage probe --help\n"),
        (
            ["probe", "--jsn", "a.mp4"],
            "error: No such option: --jsn (Possible options: --json); see soundstage probe --help\n",
        ),
        (["probe", "absent.mp4"], "error: absent.mp4: no such file; check the path\n"),
        (["world"], "error: Missing command; see soundstage world --help\n"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    args: list[str], said: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*args) == (2, "", said)


def test_a_file_that_is_no_media_file_is_named(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "notes.mp4"
    path.write_text("this is text")
    code, out, err = run("probe", str(path))
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {path}: ")
    assert err.count("\n") == 1


def test_a_full_disk_is_one_sentence(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: Path) -> None:
        raise OSError(28, "No space left on device", "ball.mp4")

    monkeypatch.setattr("soundstage.media.probe.probe", full)
    said = "error: ball.mp4: the disk is full; free some space, or write to another disk\n"
    assert run("probe", "ball.mp4") == (2, "", said)


def test_a_missing_extra_is_told_with_its_remedy(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: Path) -> None:
        raise ImportError('contact sheets need Pillow: pip install "soundstage[media]"')

    monkeypatch.setattr("soundstage.media.probe.probe", missing)
    assert run("probe", "a.mp4") == (2, "", 'error: contact sheets need Pillow: pip install "soundstage[media]"\n')


def test_debug_keeps_the_traceback_and_a_defect_always_does(monkeypatch: pytest.MonkeyPatch) -> None:
    from soundstage.media.errors import MediaError

    with pytest.raises(MediaError):
        main(["--debug", "probe", "absent.mp4"])

    def broken(_: Path) -> None:
        raise KeyError("a defect")

    monkeypatch.setattr("soundstage.media.probe.probe", broken)
    with pytest.raises(KeyError):
        main(["probe", "absent.mp4"])


def test_an_interrupt_exits_with_130(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(_: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("soundstage.media.probe.probe", stopped)
    assert run("probe", "a.mp4")[0] == 130


def test_version(run: Run) -> None:
    from soundstage import __version__

    assert run("--version") == (0, f"{__version__}\n", "")


def test_probe_reads_a_clip_as_text_and_as_json(run: Run, tmp_path: Path) -> None:
    from fractions import Fraction

    import numpy as np

    from soundstage.media.clip import Clip

    wave = np.sin(np.arange(16000) * 0.1).astype(np.float32)[None]
    clip = Clip(np.zeros((16, 32, 48, 3), np.uint8), Fraction(16), wave, 16000)
    path = clip.save(tmp_path / "a.mp4")
    code, out, err = run("probe", "--json", str(path))
    told = json.loads(out)
    assert (code, err, told["path"]) == (0, "", str(path))
    assert (told["video"]["width"], told["video"]["height"], told["video"]["fps"]) == (48, 32, "16")
    assert (told["audio"]["sample_rate"], told["audio"]["channels"]) == (16000, 1)
    assert told["duration"] == pytest.approx(1.0, abs=0.1)
    assert "48x32, 16 fps" in run("probe", str(path))[1]
