from __future__ import annotations

import json
import math
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from soundstage.cli import app as cli
from soundstage.core.av import AV
from soundstage.core.errors import ConfigError
from soundstage.objectives.flow_matching import FlowMatching
from soundstage.testing.tiny import GaussianLatents, ToyConfig
from soundstage.training.config import TrainConfig
from soundstage.training.metrics import read
from soundstage.training.state import Validation
from soundstage.training.sweep import Range, Result, sweep

RECIPE = f"{__name__}:recipe"


def score(validation: Validation) -> dict[str, float]:
    """How far the rate is from 1e-3, in factors of ten, and a little more the sooner."""
    return {"far": abs(math.log10(validation.config.optim.lr) + 3) + 0.1 / validation.step}


def recipe() -> TrainConfig:
    data = GaussianLatents(GaussianLatents().shape.only("audio"))
    model = ToyConfig(AV(audio=3), 4, 1)
    return TrainConfig(
        "toy", model, FlowMatching(bins=0), data, steps=2, batch_size=2, log_every=9, validate=score, validate_every=1
    )


RATES = [Range.parse("optim.lr=1e-6..1e-1")]


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe of this file, by the name that the command imports."""
    monkeypatch.setitem(sys.modules, __name__, sys.modules[recipe.__module__])


def search(out: Path, trials: int, config: TrainConfig | None = None, **changes: Any) -> Result:  # noqa: ANN401
    config = config or recipe()
    settings: dict[str, Any] = {"metric": "validate/far", "device": "cpu", **changes}
    return sweep(config, settings.pop("ranges", RATES), settings.pop("metric"), out, trials=trials, **settings)


def numbers(result: Result) -> list[tuple[tuple[str, ...], float | None, str]]:
    return sorted((trial.settings, trial.value, trial.state) for trial in result.trials)


def test_ranges_are_read() -> None:
    assert Range.parse("a.b=2..16") == Range("a.b", 2.0, 16.0, whole=True)
    assert Range.parse("weights.cd/video=0.5..2") == Range("weights.cd/video", 0.5, 2.0)
    spans = {"1e-5..1e-3": True, "1..9": False, "0..1": False, "1..10": True}
    assert {span: Range.parse(f"x={span}").log for span in spans} == spans
    for text in ("x", "x=1", "x=2..1", "x=a..b", "=1..2", "x=1..inf"):
        with pytest.raises(ConfigError, match=r"is not key=low\.\.high with low below high, for example"):
            Range.parse(text)


@pytest.mark.slow
def test_a_study_finds_the_setting_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    whole = search(tmp_path / "whole", 6)
    assert whole.whole and whole.best is not None and whole.best.value is not None
    assert len(whole.trials) == 6 and whole.best is whole.trials[0]
    assert whole.best.value == min(trial.value for trial in whole.trials if trial.state == "done" and trial.value)
    states = [trial.state for trial in whole.trials]
    assert "pruned" in states and all(trial.step == 1 for trial in whole.trials if trial.state == "pruned")
    # checkpoints stay of the best alone
    assert len(list((tmp_path / "whole").glob("trial-*/metrics.jsonl"))) == 6
    (kept,) = (tmp_path / "whole").glob("trial-*/checkpoints")
    config = json.loads((kept.parent / "config.json").read_text())
    assert f"optim.lr={config['optim']['lr']!r}" == whole.best.settings[0]
    # in parts, the study is the same
    assert len(search(tmp_path / "parts", 4).trials) == 4
    assert numbers(search(tmp_path / "parts", 6)) == numbers(whole)
    assert numbers(search(tmp_path / "parts", 3)) == numbers(whole)


@pytest.mark.slow
def test_an_interrupted_trial_is_resumed(tmp_path: Path) -> None:
    seen: list[str] = []

    def stop(_: int, note: str) -> None:
        seen.append(note)
        if note.startswith("trial 1: step 1") and seen.count(note) == 1:
            os.kill(os.getpid(), signal.SIGINT)

    long = replace(recipe(), steps=4)
    cut = search(tmp_path / "cut", 2, long, on_trial=stop)
    assert not cut.whole and len(cut.trials) == 1
    (going,) = (folder for folder in (tmp_path / "cut").glob("trial-*") if read(folder)[-1]["step"] < 4)
    before = read(going)
    after = search(tmp_path / "cut", 2, long)
    assert after.whole and read(going)[: len(before)] == before
    whole = search(tmp_path / "whole", 2, long)
    assert numbers(after) == numbers(whole)


def test_a_run_that_stops_itself_is_a_trial_and_not_the_end(tmp_path: Path) -> None:
    def diverges(validation: Validation) -> Mapping[str, float]:
        return score(validation) | {"brightness": 9.0 * validation.step * (validation.config.optim.lr > 2e-4)}

    config = replace(recipe(), validate=diverges, steps=3)
    found = search(tmp_path, 2, config)
    stopped = [trial for trial in found.trials if trial.state == "stopped"]
    assert stopped and all("the brightness of the samples is" in trial.why for trial in stopped)
    assert found.best is not None and found.best.state == "done"


def test_what_cannot_be_searched_is_said_before_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"optim\.rl: 'rl' is not a setting; did you mean 'lr'"):
        search(tmp_path, 1, ranges=[Range.parse("optim.rl=1..2")])
    with pytest.raises(ConfigError, match="there is nothing to search"):
        search(tmp_path, 1, ranges=[])
    with pytest.raises(ConfigError, match="validation, which is off; set validate_every"):
        search(tmp_path, 1, replace(recipe(), validate_every=0))
    with pytest.raises(ConfigError, match="steps: 0 is not at least 1"):
        search(tmp_path, 1, ranges=[Range.parse("steps=0..4")])
    with pytest.raises(ConfigError, match=r"is not an? int"):
        search(tmp_path, 1, ranges=[Range.parse("steps=1.5..4")])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="it runs in one process"):
        search(tmp_path, 1)
    assert not list(tmp_path.iterdir())


def test_another_study_and_another_metric_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"metric: 'validate/fr' was not logged; there are .*validate/far"):
        search(tmp_path / "a", 1, metric="validate/fr")
    search(tmp_path / "b", 1)
    for changes in ({"maximize": True}, {"ranges": [Range.parse("optim.lr=1e-6..1e-2")]}):
        with pytest.raises(ConfigError, match=r"holds a study with other .*; choose another folder"):
            search(tmp_path / "b", 1, **changes)


def test_the_command(tmp_path: Path) -> None:
    def invoke(*words: str) -> str:
        fixed = ["optim.lr=1e-4..1e-2", "steps=1", "-m", "validate/far", "-o", str(tmp_path)]
        done = CliRunner().invoke(cli.app, ["sweep", RECIPE, *fixed, *words], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    assert invoke("-n", "1").count("done") == 1
    shown = invoke("-n", "2")
    assert f"soundstage train {RECIPE} steps=1 optim.lr=" in shown
    assert "validate/far" in shown and shown.count("done") == 2
    found = json.loads(next(line for line in invoke("-n", "2", "--json").splitlines() if line.startswith("{")))
    assert found["whole"] and found["best"].startswith("steps=1 optim.lr=")
    assert [trial["state"] for trial in found["trials"]] == ["done", "done"]
