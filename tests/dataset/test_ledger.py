"""The ledger by itself: what is added once, what is refused, leases, cleaning, and the arithmetic of funnels."""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from soundstage.core.errors import ConfigError
from soundstage.data.attempt import Job, Outcome, Work
from soundstage.data.claims import Claims
from soundstage.data.database import LedgerError, network_disk, plain
from soundstage.data.flow import Drop, Flow, Item, signature
from soundstage.data.ledger import Ledger
from soundstage.data.owners import gone, this_host, this_process
from soundstage.data.seat import Seat
from soundstage.testing.stages import Bundle, Gate, Once, Split, Write, numbers

MOUNTS = """\
/dev/vda / ext4 rw 0 0
server:/export /data nfs4 rw 0 0
/dev/vdb /data/fast\\040disk ext4 rw 0 0
me@host: /far fuse.sshfs rw 0 0
portal /doc fuse.portal rw 0 0
"""


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger.open(tmp_path / "set")


def finish(claims: Claims, flow: Flow) -> list[str]:
    """Work until nothing can be claimed, in this process; the states in order."""
    work, states = Work(flow, claims.ledger.folder, claims.owner), []
    claims.want(flow)
    while jobs := claims.claim(flow, 5):
        states += [state for _, state in claims.commit(flow, [(job, work(job)) for job in jobs])]
    return states


def test_items_are_added_once_and_their_files_are_hashed_once(ledger: Ledger, tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"one")
    items = [Item({"media": path}, {"source": "folder"}), *numbers(2)]
    assert (ledger.add(items), ledger.add(items), ledger.add([])) == (3, 0, 0)
    told = path.stat()
    path.write_bytes(b"two")
    os.utime(path, ns=(told.st_atime_ns, told.st_mtime_ns))
    assert ledger.add(items) == 0, "same size, same time: not read again"
    os.utime(path)
    assert ledger.add(items) == 1
    assert len(ledger.sources()) == 4
    moved = path.rename(tmp_path / "b.bin")
    assert ledger.add([Item({"media": moved}, {"source": "folder"})]) == 0
    assert Path(tmp_path / "b.bin") in [item.files.get("media") for item in ledger.sources()]


def test_a_source_file_that_changed_is_quarantined(ledger: Ledger, tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"one")
    flow = Flow({"pack": Bundle()})
    ledger.add([Item({"media": path})])
    path.write_bytes(b"longer")
    claims = Claims(ledger)
    claims.group(flow, 0)
    assert finish(claims, flow) == ["poisoned"]
    claims.close()
    assert "it changed since it was collected" in ledger.quarantine(flow)[0].reason


def test_network_disks_are_known_by_their_kind(tmp_path: Path) -> None:
    assert network_disk(Path("/data/x/ledger.sqlite"), MOUNTS) == "nfs4"
    assert network_disk(Path("/data/fast disk/ledger.sqlite"), MOUNTS) is None
    assert network_disk(Path("/far/ledger.sqlite"), MOUNTS) == "fuse.sshfs"
    assert network_disk(Path("/doc/ledger.sqlite"), MOUNTS) is None
    assert network_disk(tmp_path) is None


def test_a_ledger_on_a_network_disk_is_refused_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("soundstage.data.database.network_disk", lambda _: "nfs4")
    with pytest.raises(LedgerError, match=r"network disk \(nfs4\).*--ledger PATH.*postgresql://"):
        Ledger.open(tmp_path)


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("mysql://host/name", "neither a path nor a URL"),
        ("postgresql://nobody:secret@127.0.0.1:1/none", r"nobody:\*\*\*@127.0.0.1:1/none: connection .*refused"),
    ],
)
def test_a_server_that_is_none_is_told(where: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("soundstage.data.database.OPEN_SECONDS", 0.0)
    with pytest.raises(LedgerError, match=said):
        Ledger.open(where, tmp_path)
    with pytest.raises(ConfigError, match="dataset folder"):
        Ledger.open(where)


def test_other_files_and_versions_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.sqlite").write_text("this is no ledger, " * 100)
    with pytest.raises(LedgerError, match="not a database"):
        Ledger.open(tmp_path / "a.sqlite")
    with Ledger.open(tmp_path / "b.sqlite") as ledger:
        ledger.database.write(lambda c: c.exec_driver_sql("UPDATE about SET value = '99'"))
    with pytest.raises(LedgerError, match="version 99"):
        Ledger.open(tmp_path / "b.sqlite")


def test_a_dead_process_is_told_from_a_living_one_and_another_host() -> None:
    number, _, started = this_process().partition("/")
    assert not gone(this_host(), this_process())
    assert gone(this_host(), f"{number}/{int(started) + 1}")
    assert gone(this_host(), f"{2**22 + 5}/{started}")
    assert not gone("elsewhere", f"{2**22 + 5}/{started}")


def test_a_lease_that_ran_out_returns_the_items_and_late_results_are_not_written(ledger: Ledger) -> None:
    flow = Flow({"gate": Gate()})
    ledger.add(numbers(4))
    late = Claims(ledger, lease=0.2)
    late.want(flow)
    jobs = late.claim(flow, 4)
    assert len(jobs) == 4
    late._end.set()  # its heart stops, as on a host that is cut off
    late._beating.join()
    Seat(ledger.store, late.owner, "a").begin(jobs[0].ticket)
    time.sleep(0.25)
    heir = Claims(ledger, backoff=0.0)
    again = heir.claim(flow, 9)
    assert sorted((job.key, job.attempts) for job in again) == sorted((job.key, int(job is jobs[0])) for job in jobs)
    assert late.commit(flow, [(job, Outcome("error")) for job in jobs]) == []
    assert {state for _, state in heir.commit(flow, [(job, Work(flow, ledger.folder, "x")(job)) for job in again])} == {
        "done"
    }
    heir.close()
    assert ledger.funnel(flow)[0].passed == 4


def test_two_runs_never_hold_the_same_task(ledger: Ledger) -> None:
    flow = Flow({"gate": Gate()})
    ledger.add(numbers(20))
    one, two = Claims(ledger), Claims(ledger)
    one.want(flow)
    two.want(flow)
    first, second = one.claim(flow, 12), two.claim(flow, 12)
    assert (len(first), len(second)) == (12, 8)
    assert not {job.key for job in first} & {job.key for job in second}
    one.close()
    assert len(two.claim(flow, 30)) == 12
    two.close()


def test_files_that_no_item_names_are_cleaned_and_named_ones_stay(ledger: Ledger) -> None:
    flow = Flow({"write": Write()})
    ledger.add(numbers(3))
    claims = Claims(ledger)
    finish(claims, flow)
    claims.close()
    kept = {path for path in (ledger.folder / "store").rglob("*.txt")}
    orphan = next(iter(kept)).with_name("0" * 64 + ".txt")
    orphan.write_text("left by a run that was killed")
    alive = Claims(ledger)
    assert orphan.exists() is False
    orphan.write_text("another run may be about to name it")
    Claims(ledger).close()
    assert orphan.exists()
    alive.close()
    assert {path for path in (ledger.folder / "store").rglob("*.txt")} - {orphan} == kept
    assert len(kept) == 3


def test_a_result_whose_file_was_cleaned_away_is_made_again(ledger: Ledger) -> None:
    flow = Flow({"write": Write()})
    ledger.add(numbers(1))
    claims = Claims(ledger)
    claims.want(flow)
    (job,) = claims.claim(flow, 1)
    outcome = Work(flow, ledger.folder, claims.owner)(job)
    (ledger.folder / outcome.results[0].blobs[0][0]).unlink()
    assert claims.commit(flow, [(job, outcome)]) == [(job, "pending")]
    assert finish(claims, flow) == ["done"]
    claims.close()


def test_equal_outcomes_are_merged_and_the_funnel_says_so(ledger: Ledger) -> None:
    @dataclass(frozen=True)
    class Same:
        version: ClassVar[int] = 1

        def __call__(self, item: Item, folder: Path) -> list[Item | Drop]:  # noqa: ARG002
            return [Item(facts={"n": item.facts["n"] // 2}), Drop(item, "copy")]

    flow = Flow({"same": Same(), "gate": Gate()})
    ledger.add(numbers(10))
    claims = Claims(ledger)
    finish(claims, flow)
    claims.close()
    same, gate = ledger.funnel(flow)
    assert (same.entered, same.passed, same.made, same.merged, same.cut) == (10, 10, 10, 5, {"copy": 10})
    assert (gate.entered, gate.passed) == (5, 5)


def test_groups_must_hold_every_item_once(ledger: Ledger) -> None:
    class Half(Once):
        def groups(self, items: list[Item]) -> list[list[Item]]:  # type: ignore[override]
            return [list(items[::2])]

    ledger.add(numbers(4))
    claims = Claims(ledger)
    with pytest.raises(ConfigError, match="every item exactly once"):
        claims.group(Flow({"half": Half()}), 0)
    claims.close()


def test_history_goes_up_to_the_sources_and_down(ledger: Ledger) -> None:
    flow = Flow({"write": Write(), "split": Split(pieces=2), "pack": Bundle(size=4)})
    ledger.add(numbers(2))
    claims = Claims(ledger)
    finish(claims, flow.until("split"))
    claims.group(flow, 2)
    finish(claims, flow)
    claims.close()
    (shard,) = ledger.results(flow)
    up, down = ledger.history(shard.id)
    assert [step.stage for step in up] == ["pack", "split", "split", "write", "write"]
    assert (len(up[0].inputs), up[0].parameters["size"], down) == (4, 4, [])
    source = ledger.item(up[-1].inputs[0][:12])
    assert [step.stage for step in ledger.history(source.id)[1]] == ["write"]
    with pytest.raises(ConfigError, match="no item has an id that begins with 'xyz'"):
        ledger.item("xyz")


def test_facts_must_be_plain_and_text_of_any_kind_can_be_kept(ledger: Ledger) -> None:
    @dataclass(frozen=True)
    class Odd:
        version: ClassVar[int] = 1

        def __call__(self, item: Item, folder: Path) -> list[Item]:  # noqa: ARG002
            if item.facts["n"]:
                raise ValueError("nul \0 and half a pair \ud800")
            return [item.child(what=object())]

    flow = Flow({"odd": Odd()})
    ledger.add(numbers(2))
    claims = Claims(ledger, attempts=1)
    assert finish(claims, flow) == ["failed", "failed"]
    claims.close()
    said = sorted(each.reason for each in ledger.quarantine(flow))
    assert said == [
        "ConfigError: a fact is no plain JSON value: Object of type object is not JSON serializable; "
        "facts hold numbers, text, lists, dicts",
        "ValueError: nul \\0 and half a pair \\ud800",
    ]
    assert plain("ä\0") == "ä\\0"


def test_a_signature_depends_on_place_version_and_parameters() -> None:
    told = {signature("a", Gate()), signature("b", Gate()), signature("a", Gate(below=3)), signature("a", Once())}
    assert len(told) == 4
    assert signature("a", Gate()) == signature("a", Gate(below=1_000_000))
    job = Job(0, 3, "key", 0, ())
    assert job.ticket == "3-key"
