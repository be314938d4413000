"""A real PostgreSQL server under the ledger, restarted and crashed in the middle of runs that are killed as well."""

from pathlib import Path
from typing import Protocol

import pytest

from soundstage.data.claims import Claims
from soundstage.data.database import LedgerError
from soundstage.data.flow import Flow
from soundstage.data.ledger import Ledger
from soundstage.testing.kills import compare, disturb, undisturbed
from soundstage.testing.stages import Gate, numbers

pytestmark = pytest.mark.slow


class Server(Protocol):
    """The fixture `postgres`."""

    folder: Path

    def database(self) -> str: ...
    def start(self) -> None: ...
    def stop(self, mode: str = "fast") -> None: ...


def test_restarts_in_the_middle_lose_and_double_nothing(postgres: Server, tmp_path: Path) -> None:
    modes = iter(["fast", "immediate"] * 50)

    def restart() -> None:
        postgres.stop(next(modes))
        postgres.start()

    url = postgres.database()
    undisturbed(tmp_path / "calm" / "set", tmp_path / "calm", 60)
    report = disturb(url, tmp_path / "wild", 60, kills=9, seed=3, workers=2, others=[restart])
    compare(url, tmp_path / "wild", tmp_path / "calm")
    assert report.kills["other"] >= 1
    assert report.wasted <= report.allowed


def test_a_database_that_there_is_not_is_told_at_once(postgres: Server, tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match='database "none" does not exist'):
        Ledger.open(f"postgresql://postgres@/none?host={postgres.folder}", tmp_path)


def test_hosts_claim_apart_and_agree_on_the_clock(postgres: Server, tmp_path: Path) -> None:
    url, flow = postgres.database(), Flow({"gate": Gate()})
    with Ledger.open(url, tmp_path / "set") as one, Ledger.open(url, tmp_path / "set") as two:
        one.add(numbers(30))
        first, second = Claims(one), Claims(two)
        first.want(flow)
        second.want(flow)
        jobs = [*first.claim(flow, 20), *second.claim(flow, 20)]
        assert len({job.key for job in jobs}) == len(jobs) == 30
        assert abs(one.database.now() - two.database.now()) < 0.5
        first.close()
        second.close()
        assert first.left(one.numbers(flow)).count == 30
