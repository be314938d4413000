"""A real PostgreSQL server under the ledger, restarted and crashed in the middle of runs that are killed as well."""

from functools import partial
from pathlib import Path

import pytest

from soundstage.data.claims import Claims
from soundstage.data.database import LedgerError
from soundstage.data.flow import Flow
from soundstage.data.ledger import Ledger
from soundstage.testing.kills import Trouble, compare, disturb, toy, undisturbed
from soundstage.testing.postgres import Postgres
from soundstage.testing.stages import Gate, numbers

pytestmark = pytest.mark.slow


def test_restarts_in_the_middle_lose_and_double_nothing(postgres: Postgres, tmp_path: Path) -> None:
    case, url = toy(60), postgres.database()
    calls = undisturbed(case, tmp_path / "calm" / "set", tmp_path / "calm")
    others = {mode: Trouble(partial(postgres.restart, mode)) for mode in ("fast", "immediate")}
    report = disturb(case, url, tmp_path / "wild", calls, 9, seed=3, workers=2, others=others)
    compare(case, url, tmp_path / "wild", tmp_path / "calm")
    assert min(report.kills[mode] for mode in others) >= 1
    assert report.tasks == calls
    assert [each for each in report.rounds if each.repeated > report.bound(each)] == []


def test_a_database_that_there_is_not_is_told_at_once(postgres: Postgres, tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match='database "none" does not exist'):
        Ledger.open(f"postgresql://postgres@/none?host={postgres.folder}", tmp_path)


def test_hosts_claim_apart_and_agree_on_the_clock(postgres: Postgres, tmp_path: Path) -> None:
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
