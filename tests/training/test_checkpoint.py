from __future__ import annotations

import resource
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

from soundstage.core.errors import WeightsError
from soundstage.training import checkpoint
from soundstage.training.checkpoint import SaveError


def state(value: float) -> tuple[dict[str, nn.Module], dict[str, object]]:
    module = nn.Linear(2, 2)
    nn.init.constant_(module.weight, value)
    return {"student": module}, {"value": torch.tensor(value), "step": 3}


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    nets, values = state(2.0)
    path = checkpoint.save(tmp_path, 10, nets, values)
    assert checkpoint.latest(tmp_path) == path
    assert checkpoint.step_of(path) == 10
    other, _ = state(0.0)
    loaded = checkpoint.load(path, other)
    assert torch.equal(other["student"].weight, nets["student"].weight)
    assert loaded["value"] == 2.0


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in range(1, 6):
        checkpoint.save(tmp_path, step, *state(step), keep=2)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-00000004", "step-00000005"]


@pytest.mark.parametrize("at", ["save_model", "torch.save", "_flush", "rename"])
def test_a_crash_leaves_the_last_whole_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    first = checkpoint.save(tmp_path, 1, *state(1.0))

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    target = {"torch.save": (torch, "save"), "rename": (Path, "rename")}.get(at, (checkpoint, at))
    monkeypatch.setattr(*target, full)
    with pytest.raises(SaveError, match=r"step-00000002: could not be written .*No space left.*one before is kept"):
        checkpoint.save(tmp_path, 2, *state(2.0))
    monkeypatch.undo()
    assert checkpoint.latest(tmp_path) == first
    assert checkpoint.save(tmp_path, 2, *state(2.0)) == checkpoint.latest(tmp_path)


def test_a_full_disk_leaves_the_last_whole_checkpoint(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: every writer meets it as a failed write."""
    first = checkpoint.save(tmp_path, 1, *state(1.0))
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for limit in (10, 300):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            with pytest.raises(SaveError, match="Free some space"):
                checkpoint.save(tmp_path, 2, *state(2.0))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == [first]


def test_killed_while_writing_leaves_a_part_that_is_ignored_and_replaced(tmp_path: Path) -> None:
    first = checkpoint.save(tmp_path, 1, *state(1.0))
    part = tmp_path / "step-00000002.part"
    part.mkdir()
    (part / "student.safetensors").write_bytes(b"half")
    assert checkpoint.latest(tmp_path) == first
    checkpoint.save(tmp_path, 2, *state(2.0))
    assert not part.exists()


def test_weights_of_another_model_are_told_apart(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path / "checkpoints", 1, *state(1.0))
    with pytest.raises(WeightsError, match=r"1 missing \(extra\)"):
        module = nn.Linear(2, 2)
        module.register_parameter("extra", nn.Parameter(torch.zeros(1)))
        checkpoint.load_weights(module, path)
    with pytest.raises(WeightsError, match=r"of another shape \(.*weight \(2, 2\) for \(3, 2\)"):
        checkpoint.load_weights(nn.Linear(2, 3), tmp_path)
    with pytest.raises(WeightsError, match="there are no weights here"):
        checkpoint.load_weights(nn.Linear(2, 2), tmp_path / "nowhere")
    (path / "student.safetensors").write_bytes(b"not a file of weights")
    with pytest.raises(WeightsError, match=r"student.safetensors"):
        checkpoint.load_weights(nn.Linear(2, 2), tmp_path)
