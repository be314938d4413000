"""Runs that are killed with SIGKILL, whole or one of their workers: nothing is lost, doubled or damaged."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from soundstage.data.flow import Flow, Item
from soundstage.data.ledger import Ledger
from soundstage.data.runner import run
from soundstage.testing.kills import compare, disturb, undisturbed
from soundstage.testing.stages import Read, Stumble, Write, counted, numbers

SCRIPT = """
import sys
from soundstage.data.flow import Flow
from soundstage.data.ledger import Ledger
from soundstage.data.runner import run
from soundstage.testing.stages import Write

if __name__ == "__main__":
    with Ledger.open(sys.argv[1]) as ledger:
        run(Flow({"write": Write(seconds=0.05, log=sys.argv[2])}), ledger, workers=2)
"""


@pytest.mark.slow
def test_a_few_kills_change_nothing(tmp_path: Path) -> None:
    report = disturb(tmp_path / "wild" / "set", tmp_path / "wild", 60, kills=8, seed=1)
    undisturbed(tmp_path / "calm" / "set", tmp_path / "calm", 60)
    compare(tmp_path / "wild" / "set", tmp_path / "wild", tmp_path / "calm")
    assert sum(report.kills.values()) >= 4
    assert 0 < report.wasted <= report.allowed


@pytest.mark.trial
def test_a_hundred_kills_change_nothing(tmp_path: Path) -> None:
    report = disturb(tmp_path / "wild" / "set", tmp_path / "wild", 1500, kills=100, seed=2)
    undisturbed(tmp_path / "calm" / "set", tmp_path / "calm", 1500)
    compare(tmp_path / "wild" / "set", tmp_path / "wild", tmp_path / "calm")
    assert sum(report.kills.values()) >= 90
    assert 0 < report.wasted <= report.allowed


@pytest.mark.slow
def test_a_twentieth_of_broken_files_is_quarantined_to_the_file(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    broken = {20: "truncated", 40: "empty", 60: "wrong header", 10: "SIGSEGV", 80: "SIGSEGV", 110: "SIGSEGV"}
    for n in range(120):
        text = b"crash" if broken.get(n) == "SIGSEGV" else f"text {n}".encode()
        whole = b"TOY %d\n" % len(text) + text
        damaged = {20: whole[:-2], 40: b"", 60: b"RIFF" + whole}
        (raw / f"{n:03}.toy").write_bytes(damaged.get(n, whole))
    flow = Flow({"read": Read()})
    with Ledger.open(tmp_path / "set") as ledger:
        ledger.add(Item({"media": path}, {"name": path.name}) for path in sorted(raw.iterdir()))
        (line,) = run(flow, ledger, workers=2, backoff=0.01)
        found = {int(each.items[0].facts["name"][:3]): each for each in ledger.quarantine(flow)}
        assert set(found) == set(broken)
        assert (line.passed, line.poisoned, line.failed) == (114, 3, 3)
        for n, why in broken.items():
            assert why in found[n].reason
            assert (found[n].state, found[n].attempts) == (("failed", 3) if why == "SIGSEGV" else ("poisoned", 1))
        assert {int(item.facts["name"][:3]) for item in ledger.results(flow)} == set(range(120)) - set(broken)


def test_a_hanging_worker_is_stopped_at_the_limit(tmp_path: Path) -> None:
    flow = Flow({"stumble": Stumble(str(tmp_path))})
    with Ledger.open(tmp_path / "set") as ledger:
        ledger.add([Item(facts={"n": 1, "fate": "hang"}), Item(facts={"n": 2})])
        (line,) = run(flow, ledger, workers=1, limit=0.3, backoff=0.01)
        assert line.passed == 2
        assert sorted(item.facts["calls"] for item in ledger.results(flow)) == [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_by_signal_is_clean_and_the_next_run_goes_on(tmp_path: Path, number: signal.Signals) -> None:
    log, flow = tmp_path / "log", Flow({"write": Write(seconds=0.05, log=str(tmp_path / "log"))})
    with Ledger.open(tmp_path / "set") as ledger:
        ledger.add(numbers(40))
        process = _start(tmp_path)
        _until(lambda: counted(log) >= 8)
        process.send_signal(number)
        process.communicate(timeout=120)
        assert process.returncode in (1, -signal.SIGINT)
        (before,) = ledger.funnel(flow)
        assert 0 < before.passed < 40
        assert before.waiting == 40 - before.passed
        assert not list((tmp_path / "set" / "work").iterdir())
        (line,) = run(flow, ledger, workers=2)
        assert line.passed == 40
        assert counted(log) <= 40 + 2, "only what the two workers were at is done again"


@pytest.mark.slow
def test_workers_end_with_a_run_that_is_killed(tmp_path: Path) -> None:
    with Ledger.open(tmp_path / "set") as ledger:
        ledger.add(numbers(10_000))
    process = _start(tmp_path)
    _until(lambda: counted(tmp_path / "log") >= 4)
    process.kill()
    process.communicate()
    time.sleep(0.5)
    after = counted(tmp_path / "log")
    time.sleep(0.5)
    assert counted(tmp_path / "log") == after


def _start(folder: Path) -> subprocess.Popen[bytes]:
    script = folder / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    command = [sys.executable, str(script), str(folder / "set"), str(folder / "log")]
    return subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, stderr=subprocess.PIPE
    )


def _until(true: Callable[[], bool], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.02)
