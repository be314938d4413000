"""What counts as an attempt: not what came further than before, nor what a host asked to put off."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from soundstage.data import claims
from soundstage.data.fetch import Fetch
from soundstage.data.flow import Flow, Item
from soundstage.data.ledger import Ledger
from soundstage.data.runner import run
from soundstage.data.web import Manners
from soundstage.testing.server import Page, Server, film

QUICK = Manners(per_second=2000.0, at_once=4, timeout=5.0)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        yield running


def fetched(server: Server, folder: Path, page: Page) -> tuple[str, int, int]:
    """(state of the task, attempts that counted, requests for the page) of a run that allows two attempts."""
    server.pages["/a.mp4"] = page
    flow = Flow({"fetch": Fetch(manners=QUICK)})
    with Ledger.open(folder) as ledger:
        ledger.add([Item({}, {"url": server.url("/a.mp4")})])
        run(flow, ledger, workers=1, attempts=2, backoff=0.01)
        ((step,),) = [ledger.history(item.id)[1] for item in ledger.sources()]
        found = [item.files["media"].read_bytes() for item in ledger.results(flow)]
    assert found == ([page.body] if step.state == "done" else [])
    return step.state, step.attempts, server.paths().count("/a.mp4")


def test_a_download_that_goes_on_a_piece_at_a_time_is_no_failure(server: Server, tmp_path: Path) -> None:
    pieces = [cut for _ in range(5) for cut in (30_000, 0)]  # each attempt brings a piece, and then nothing
    page = Page(film(200_000), cuts=[*pieces, None])
    assert fetched(server, tmp_path / "set", page) == ("done", 1, 11)


def test_a_download_that_goes_no_further_is_given_up(server: Server, tmp_path: Path) -> None:
    page = Page(film(200_000), cuts=[30_000, 0])
    assert fetched(server, tmp_path / "set", page) == ("failed", 2, 4)  # the piece was free, two attempts were not


def test_a_server_that_begins_again_and_ends_as_early_brings_nothing(server: Server, tmp_path: Path) -> None:
    page = Page(film(200_000), ranges=False, cuts=[30_000])
    assert fetched(server, tmp_path / "set", page)[:2] == ("failed", 2)


@pytest.mark.parametrize("status", [429, 503])
def test_a_rest_that_a_host_asks_for_is_no_attempt(status: int, server: Server, tmp_path: Path) -> None:
    page = Page(film(20_000), answers=[(status, "0.05")] * 5)
    assert fetched(server, tmp_path / "set", page) == ("done", 1, 6)


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_host_that_does_not_say_for_how_long_costs_attempts(status: int, server: Server, tmp_path: Path) -> None:
    page = Page(film(20_000), answers=[(status, None)] * 5)
    assert fetched(server, tmp_path / "set", page) == ("failed", 2, 2)


def test_a_host_that_asks_for_rests_for_ever_does_not_keep_the_run(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "FREE_RETURNS", 5)
    page = Page(film(20_000), answers=[(429, "0")] * 100)
    assert fetched(server, tmp_path / "set", page) == ("failed", 2, 7)
