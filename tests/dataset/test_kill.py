"""Runs that are killed with SIGKILL, whole or one of their workers: nothing is lost, doubled or damaged."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from soundstage.data.flow import Flow, Item
from soundstage.data.ledger import Ledger
from soundstage.data.runner import run
from soundstage.data.scan import Scan
from soundstage.testing.disks import SmallDisk
from soundstage.testing.films import BROKEN, raw_films
from soundstage.testing.kills import Case, Report, Trouble, compare, disturb, drive, repeated, toy, undisturbed
from soundstage.testing.stages import Stumble, Write, counted, numbers

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


def killed(folder: Path, case: Case, kills: int, seed: int) -> Report:
    """A disturbed run that ended as a quiet one, and repeated no more than each kill allows."""
    calls = undisturbed(case, folder / "calm" / "set", folder / "calm")
    report = disturb(case, folder / "wild" / "set", folder / "wild", calls, kills, seed=seed)
    assert compare(case, folder / "wild" / "set", folder / "wild", folder / "calm") > 0
    assert report.tasks == calls
    assert [each for each in report.rounds if each.repeated > report.bound(each)] == []
    return report


@pytest.mark.slow
def test_a_few_kills_change_nothing(tmp_path: Path) -> None:
    report = killed(tmp_path, toy(60), 8, 1)
    assert sum(report.kills.values()) >= 4


@pytest.mark.trial
def test_a_hundred_kills_change_nothing(tmp_path: Path) -> None:
    report = killed(tmp_path, toy(1500), 100, 2)
    assert sum(report.kills.values()) >= 90


@pytest.mark.slow
def test_kills_on_a_disk_that_is_full_now_and_then_change_nothing(disk: SmallDisk, tmp_path: Path) -> None:
    case, wild = toy(60), disk.folder / "wild"
    calls = undisturbed(case, tmp_path / "calm" / "set", tmp_path / "calm")
    full = {"full disk": Trouble(disk.fill, disk.relieve)}
    report = disturb(case, wild / "set", wild, calls, 8, seed=4, others=full, logs=tmp_path)
    compare(case, wild / "set", wild, tmp_path / "calm")
    assert report.kills["full disk"] >= 1
    assert [each for each in report.rounds if each.repeated > report.bound(each)] == []


@pytest.mark.slow
def test_what_a_kill_costs_is_counted(tmp_path: Path) -> None:
    case = Case({"hang": Stumble(str(tmp_path))}, [Item(facts={"n": 1, "fate": "hang"})])
    flow, calls = case.flow(tmp_path), tmp_path / "1"
    with Ledger.open(tmp_path / "set") as ledger:
        ledger.add(case.items)
        driver = multiprocessing.get_context("forkserver").Process(
            target=drive, args=(tmp_path / "set", tmp_path, flow, 1)
        )
        driver.start()
        _until(lambda: counted(calls) == 1)
        assert not repeated(tmp_path)
        driver.kill()
        driver.join()
        (line,) = run(flow, ledger, workers=1, backoff=0.01)
        assert (line.passed, counted(calls)) == (1, 2)
    assert repeated(tmp_path) == {driver.pid: 1}


@pytest.mark.slow
def test_a_twentieth_of_broken_films_is_quarantined_to_the_file(tmp_path: Path) -> None:
    broken: dict[int, str] = raw_films(tmp_path / "raw", 120, distinct=8)
    assert sorted(Counter(broken.values())) == sorted(BROKEN)
    crashing = {25, 65}  # a decoder that takes its process down, every time
    fates = {n: {"fate": "segfault"} for n in crashing}
    flow = Flow({"decode": Stumble(str(tmp_path), times=99), "scan": Scan()})
    with Ledger.open(tmp_path / "set") as ledger:
        paths = sorted((tmp_path / "raw").iterdir())
        ledger.add(Item({"media": path}, {"n": n, **fates.get(n, {})}) for n, path in enumerate(paths))
        decode, scan = run(flow, ledger, workers=2, backoff=0.01)
        found = {each.items[0].facts["n"]: each for each in ledger.quarantine(flow)}
        assert set(found) == {*broken, *crashing}
        assert (decode.entered, decode.passed, decode.poisoned, decode.failed) == (120, 118, 0, 2)
        assert (scan.entered, scan.passed, scan.poisoned, scan.failed) == (118, 112, 6, 0)
        for n, each in found.items():
            assert (each.state, each.attempts) == (("failed", 3) if n in crashing else ("poisoned", 1))
            assert "SIGSEGV" in each.reason if n in crashing else each.reason
        assert {item.facts["n"] for item in ledger.results(flow)} == set(range(120)) - set(found)


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
