"""`soundstage evaluate` on a folder of clips, and its mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from soundstage.cli.app import main
from soundstage.evaluation.suite import Format, stream_items


@pytest.fixture(autouse=True)
def clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("clips").mkdir()
    for item in stream_items(2, kinds=("bounce",)):
        Format().render(item).save(f"clips/{item.id}.mp4")
        Path(f"clips/{item.id}.txt").write_text(item.caption, encoding="utf-8")


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", *args])
    return int(stopped.value.code or 0), *capsys.readouterr()


def test_a_folder_is_scored_and_reported(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--clips", "clips", "--json", "--out", "scores")
    assert code == 0
    told = json.loads(out)
    assert told["rows"]["clips"]["all"]["f1@45"]["value"] > 0.9
    assert told["rows"]["clips, no sound"]["all"]["recall@45"]["value"] == 0
    assert (told["settings"]["clips"], told["settings"]["num"], told["settings"]["seed"]) == ("clips", 2, 0)
    assert told["settings"]["threads"] >= 1
    code, out, _ = run(capsys, "--clips", "clips", "--out", "scores")
    assert code == 0
    table = {line[: line.find("  ")]: line.split()[-6:] for line in out.splitlines()}
    assert table["clips"][:2] == ["2", "1"]
    assert table["clips, no sound"][:2] == ["2", "0"]
    assert "# Suite world" in Path("scores/report.md").read_text(encoding="utf-8")
    code, _, err = run(capsys, "--clips", "clips", "--out", "scores", "--seed", "1")
    assert code == 2
    assert "scores holds scores with seed 0, not 1; choose another folder with --out" in err


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--suite", "real"], "suite: 'real' is not one of world"),
        (["--clips", "absent"], "clips: absent is not a folder"),
        (["--clips", "clips", "--model", "x"], "are both given"),
        (["--clips", "clips", "--num", "0"], "num: 0 is not at least 1"),
        (["--clips", "clips", "--kinds", "drums"], "of these kinds"),
        (["--model", "absent/model"], "there is no folder 'absent/model'"),
    ],
)
def test_mistakes(args: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, *args)
    assert (code, out) == (2, "")
    assert sentence in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
