"""What a run promises beside its outcomes: progress, refusals, a full disk, two runs at once."""

import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from soundstage.core.errors import ConfigError
from soundstage.data.flow import Flow, Item
from soundstage.data.ledger import Ledger
from soundstage.data.runner import Progress, run
from soundstage.data.store import DiskFull
from soundstage.testing.disks import SmallDisk
from soundstage.testing.stages import Bundle, Gate, Letters, Split, Stumble, Write, counted, numbers


def test_a_full_disk_stops_the_run_loses_nothing_and_the_next_run_goes_on(disk: SmallDisk) -> None:
    disk.fill(leave=6 * 2**20)
    flow = Flow({"letters": Letters(), "gate": Gate()})
    with Ledger.open(disk.folder / "set") as ledger:
        ledger.add(numbers(8))
        with pytest.raises(DiskFull, match="the disk is full; free some space and give the same command again"):
            run(flow, ledger, workers=2)
        before = ledger.funnel(flow)[0]
        assert before.passed <= 6  # of a megabyte each, beside the ledger
        assert (before.failed, before.poisoned, before.waiting) == (0, 0, 8 - before.passed)
        disk.relieve()
        letters, gate = run(flow, ledger, workers=2)
        assert (letters.passed, gate.passed) == (8, 8)
        for item in ledger.results(flow):
            assert item.files["media"].read_bytes() == bytes([item.facts["n"]]) * 1_000_000
        assert all(step.attempts == 1 for item in ledger.sources() for step in ledger.history(item.id)[1])


def test_progress_counts_up_to_the_end(tmp_path: Path) -> None:
    said: list[Progress] = []
    with Ledger.open(tmp_path / "set") as ledger:
        ledger.add(numbers(12))
        flow = Flow({"split": Split(pieces=2), "gate": Gate(even=True), "pack": Bundle()})
        run(flow, ledger, workers=1, on_progress=said.append)
    assert said[0].left == 12
    last = said[-1]
    assert (last.done, last.left, last.outcomes) == (38, 0, {"done": 26, "dropped": 12})
    assert last.stages == {"split": 12, "gate": 24, "pack": 2}
    assert [each.done for each in said] == sorted(each.done for each in said)


def test_two_runs_share_one_dataset(tmp_path: Path) -> None:
    log = tmp_path / "log"
    flow = Flow({"write": Write(seconds=0.01, log=str(log)), "split": Split(pieces=2), "pack": Bundle(size=4)})
    with Ledger.open(tmp_path / "set") as one, Ledger.open(tmp_path / "set") as two:
        one.add(numbers(40))
        other = threading.Thread(target=run, args=(flow, two), kwargs={"workers": 1, "batch": 4})
        other.start()
        funnel = run(flow, one, workers=1, batch=4)
        other.join()
        assert [line.passed for line in funnel] == [40, 40, 80]
        assert counted(log) == 40
        assert one.funnel(flow) == funnel


def test_a_busy_server_is_left_alone_as_long_as_it_asked(tmp_path: Path) -> None:
    flow = Flow({"stumble": Stumble(str(tmp_path), after=0.8)})
    with Ledger.open(tmp_path / "set") as ledger:
        ledger.add([Item(facts={"n": 1, "fate": "transient"})])
        start = time.monotonic()
        (line,) = run(flow, ledger, workers=1, backoff=0.01)
        assert (line.passed, time.monotonic() - start >= 0.8) == (1, True)


def test_what_a_run_refuses(tmp_path: Path) -> None:
    flow = Flow({"gate": Gate()})
    with Ledger.open(tmp_path / "set") as ledger:
        with pytest.raises(ConfigError, match="is not the ledger's"):
            run(flow, ledger, tmp_path / "other")
        with pytest.raises(ConfigError, match="workers: 0 is below 1"):
            run(flow, ledger, workers=0)
        with pytest.raises(ConfigError, match="there is none"):
            Flow({})
        with pytest.raises(ConfigError, match="no 'gat'"):
            flow.until("gat")


def test_a_stage_that_workers_cannot_import_is_told(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Here(Gate):
        """Of a function, not of a module."""

    with Ledger.open(tmp_path / "set") as ledger:
        ledger.add(numbers(2))
        with pytest.raises(ConfigError, match=r"a stage cannot go to workers: .*; define its class in a module"):
            run(Flow({"here": Here()}), ledger, workers=1)
        assert run(Flow({"gate": Gate()}), ledger, workers=1)[0].passed == 2
