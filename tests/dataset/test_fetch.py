"""Fetching from a server that misbehaves: what may be had arrives whole, and nothing else is asked for."""

import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest

from soundstage.core.errors import ConfigError
from soundstage.data.fetch import Fetch
from soundstage.data.flow import Drop, Flow, Item, Poison, Transient, signature
from soundstage.data.hosts import Host
from soundstage.data.ledger import Ledger
from soundstage.data.licences import Allowed
from soundstage.data.runner import run
from soundstage.data.sources import OncePerAddress
from soundstage.data.web import AGENT, Manners
from soundstage.testing.server import Page, Server, film

FORK = multiprocessing.get_context("fork")
QUICK = Manners(per_second=2000.0, at_once=4, timeout=5.0)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        yield running


class Run:
    """A stage with folders as the runner gives them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.stage, self.calls = folder, Fetch(manners=QUICK), 0

    def __call__(self, url: str, **facts: object) -> Item | Drop:
        self.calls += 1
        scratch = self.folder / "work" / "owner" / str(self.calls)
        scratch.mkdir(parents=True)
        (outcome,) = self.stage(Item({}, {"url": url, **facts}), scratch)
        return outcome

    def stubborn(self, url: str, attempts: int, **facts: object) -> Item | Drop:
        """As the runner, which tries again what was transient."""
        for _ in range(attempts - 1):
            try:
                return self(url, **facts)
            except Transient:
                continue
        return self(url, **facts)

    def left(self) -> list[str]:
        """Unfinished files."""
        return sorted(path.name for path in (self.folder / "parts" / "files").rglob("*") if path.is_file())


@pytest.fixture
def fetch(tmp_path: Path) -> Run:
    return Run(tmp_path)


def got(outcome: Item | Drop) -> bytes:
    assert isinstance(outcome, Item), outcome
    return outcome.files["media"].read_bytes()


def test_a_file_arrives_with_what_is_known_of_it(server: Server, fetch: Run) -> None:
    body = film(300_000)
    server.pages["/a.mp4"] = Page(body)
    outcome = fetch(server.url("/a.mp4"), licence="CC0-1.0")
    assert got(outcome) == body
    assert isinstance(outcome, Item)
    assert outcome.files["media"].suffix == ".mp4"
    etag = f'"{sha256(body).hexdigest()[:12]}"'
    assert outcome.facts["fetched"] == {"bytes": 300_000, "etag": etag, "type": "video/mp4"}
    assert outcome.facts["licence"] == "CC0-1.0"
    assert {each.agent for each in server.asked} == {AGENT}
    assert fetch.left() == []


def test_what_has_media_passes_and_what_has_no_address_is_poison(fetch: Run, tmp_path: Path) -> None:
    item = Item({"media": tmp_path / "here.mp4"}, {})
    assert list(fetch.stage(item, tmp_path)) == [item]
    with pytest.raises(Poison, match="neither media nor a url"):
        list(fetch.stage(Item(), tmp_path))


@pytest.mark.parametrize("seed", range(5))
def test_connections_cut_at_random_bytes_are_resumed(seed: int, server: Server, fetch: Run) -> None:
    body, rng = film(500_000, seed), random.Random(seed)
    cuts = [rng.randrange(1, 120_000) for _ in range(6)]
    server.pages["/a.mp4"] = Page(body, cuts=[*cuts, None])
    assert got(fetch(server.url("/a.mp4"))) == body
    spans = [each.span for each in server.asked if each.path == "/a.mp4"]
    assert spans == ["", *(f"bytes={sum(cuts[: n + 1])}-" for n in range(6))]
    assert server.sent("/a.mp4") == len(body)  # not a byte twice


def test_a_second_attempt_goes_on_where_the_first_ended(server: Server, fetch: Run) -> None:
    body = film(200_000)
    server.pages["/a.mp4"] = page = Page(body, cuts=[50_000, 0, None])
    with pytest.raises(Transient, match="ended after 50000 bytes"):
        fetch(server.url("/a.mp4"))
    assert len(fetch.left()) == 2
    assert got(fetch(server.url("/a.mp4"))) == body
    assert server.sent("/a.mp4") == len(body)
    assert page.cuts == [None]


def test_a_server_without_ranges_is_asked_for_all_of_it(server: Server, fetch: Run) -> None:
    body = film(200_000)
    server.pages["/a.mp4"] = Page(body, ranges=False, cuts=[50_000, 30_000, 120_000, None])
    assert got(fetch.stubborn(server.url("/a.mp4"), 3)) == body


def test_another_version_is_never_glued_to_the_first(server: Server, fetch: Run) -> None:
    server.pages["/a.mp4"] = Page(film(200_000, 1), cuts=[90_000, 0])
    with pytest.raises(Transient):
        fetch(server.url("/a.mp4"))
    server.pages["/a.mp4"] = Page(new := film(150_000, 2))
    assert got(fetch(server.url("/a.mp4"))) == new
    assert [each.span for each in server.asked if each.path == "/a.mp4"][-1] == "bytes=90000-"


@pytest.mark.parametrize("etags", [['"a"', '"b"', '"c"', '"d"'], ['W/"a"', 'W/"a"', 'W/"a"', 'W/"a"'], [""]])
def test_changing_weak_and_missing_etags_begin_again(etags: list[str], server: Server, fetch: Run) -> None:
    body = film(200_000)
    server.pages["/a.mp4"] = Page(body, etags=etags, cuts=[50_000, 80_000, 110_000, None])
    assert got(fetch(server.url("/a.mp4"))) == body
    assert server.sent("/a.mp4") == 240_000 + len(body)


def test_a_date_serves_where_there_is_no_etag(server: Server, fetch: Run) -> None:
    body = film(200_000)
    dated = {"Last-Modified": "Wed, 21 Oct 2015 07:28:00 GMT"}
    server.pages["/a.mp4"] = Page(body, etags=[""], headers=dated, cuts=[50_000, None])
    assert got(fetch(server.url("/a.mp4"))) == body
    assert server.sent("/a.mp4") == len(body)


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("lie", [-60_000, 60_000])
def test_lies_about_length_are_seen(lie: int, ranges: bool, server: Server, fetch: Run) -> None:
    body = film(200_000)
    server.pages["/a.mp4"] = Page(body, told=len(body) + lie, ranges=ranges)
    if lie < 0 and not ranges:
        with pytest.raises(Poison, match="has 140000 bytes, and should have 200000"):
            fetch(server.url("/a.mp4"))
    else:
        assert got(fetch(server.url("/a.mp4"))) == body


@pytest.mark.parametrize("framing", ["chunked", "close"])
def test_answers_without_a_length(framing: str, server: Server, fetch: Run) -> None:
    body = film(200_000)
    server.pages["/a.mp4"] = Page(body, framing=framing, cuts=[70_000, None])
    assert got(fetch(server.url("/a.mp4"))) == body
    assert server.sent("/a.mp4") == len(body)


def test_an_end_that_nobody_told_is_asked_about(server: Server, fetch: Run) -> None:
    body = b"ID3" + random.Random(0).randbytes(100_000)  # a kind of file that does not tell its length
    server.pages["/a.mp3"] = Page(body, kind="audio/mpeg", framing="close", cuts=[40_000, None])
    assert got(fetch(server.url("/a.mp3"))) == body
    assert [each.span for each in server.asked if each.path == "/a.mp3"] == ["", "bytes=40000-"]


def test_a_file_that_is_cut_short_at_its_source_is_poison(server: Server, fetch: Run) -> None:
    server.pages["/a.mp4"] = Page(film(200_000)[:150_000])
    with pytest.raises(Poison, match="cut short where it lies; it has 150000 bytes, and should have 200000"):
        fetch(server.url("/a.mp4"))
    assert fetch.left() == []


def test_a_checksum_is_kept_and_a_wrong_one_is_poison(server: Server, fetch: Run) -> None:
    body = film(100_000)
    # with a checksum, bytes may be put together though the server tells no version
    server.pages["/a.mp4"] = Page(body, etags=[""], cuts=[60_000, None])
    assert got(fetch(server.url("/a.mp4"), sha256=sha256(body).hexdigest().upper())) == body
    assert server.sent("/a.mp4") == len(body)
    server.pages["/b.mp4"] = Page(body)
    with pytest.raises(Poison, match=r"its sha256 is .* not 0000"):
        fetch(server.url("/b.mp4"), sha256="0" * 64)
    assert server.paths().count("/b.mp4") == 2  # once more, in case the way was at fault
    assert fetch.left() == []


def test_busy_answers_are_tried_again_when_the_server_says(server: Server, fetch: Run) -> None:
    body = film(50_000)
    server.pages["/a.mp4"] = Page(body, answers=[(429, "0.4"), (503, None)])
    with pytest.raises(Transient, match="answered 429") as busy:
        fetch(server.url("/a.mp4"))
    assert busy.value.after == 0.4
    with pytest.raises(Transient, match="answered 503") as busy:
        fetch(server.url("/a.mp4"))
    assert busy.value.after is None
    assert got(fetch(server.url("/a.mp4"))) == body
    times = [each.at for each in server.asked if each.path == "/a.mp4"]
    assert times[1] - times[0] >= 0.3  # the whole host was left alone


def test_a_long_rest_is_not_waited_for(server: Server, fetch: Run) -> None:
    server.pages["/a.mp4"] = Page(film(50_000), answers=[(429, "3600")])
    server.pages["/b.mp4"] = Page(film(50_000))
    fetch.stage = replace(fetch.stage, manners=replace(QUICK, patience=5.0))
    for path in ("/a.mp4", "/b.mp4"):
        with pytest.raises(Transient) as busy:
            fetch(server.url(path))
        assert 3500 < (busy.value.after or 0) <= 3600
    assert server.paths() == ["/a.mp4"]


@pytest.mark.parametrize("status", [401, 402, 403, 404, 410, 451, 400, 418])
def test_refusals_are_final(status: int, server: Server, fetch: Run) -> None:
    server.pages["/a.mp4"] = Page(film(5_000), answers=[(status, None)])
    if status in (400, 418):
        with pytest.raises(Poison, match=f"answered {status}"):
            fetch(server.url("/a.mp4"))
    else:
        outcome = fetch(server.url("/a.mp4"))
        assert isinstance(outcome, Drop)
        assert outcome.reason == ("gone" if status in (404, 410) else "forbidden")
        assert outcome.item.facts["refused"] == f"answered {status}"
    assert server.paths() == ["/a.mp4"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"<!DOCTYPE html><title>Please wait</title>" + b" " * 90_000, "is a page or text"),
        (b'{"error": "no"}', "is a page or text"),
        (b"PK\x03\x04" + bytes(90_000), "of no known kind"),
        (b"\x89PNG\r\n\x1a\n" + bytes(90_000), "is image, not video or audio"),
        (b"", "is empty"),
    ],
)
def test_false_media_is_poison_at_its_first_bytes(body: bytes, words: str, server: Server, fetch: Run) -> None:
    fetch.stage = replace(fetch.stage, media=("video", "audio"))
    server.pages["/a.mp4"] = Page(body, pace=0.01)
    with pytest.raises(Poison, match=words):
        fetch(server.url("/a.mp4"))
    assert fetch.left() == []
    with pytest.raises(ConfigError, match="'film' is not one of video"):
        Fetch(media=("film",))


def test_too_large_is_dropped_before_it_is_sent_and_while_it_is(server: Server, fetch: Run) -> None:
    fetch.stage = replace(fetch.stage, largest=100_000)
    server.pages["/told.mp4"] = Page(film(3_000_000))
    server.pages["/untold.mp4"] = Page(film(3_000_000), framing="chunked", pace=0.001)
    told, untold = fetch(server.url("/told.mp4")), fetch(server.url("/untold.mp4"))
    assert isinstance(told, Drop) and isinstance(untold, Drop)
    assert (told.reason, told.score) == ("too large", 3_000_000)
    assert untold.reason == "too large" and 100_000 < (untold.score or 0) <= 200_000
    assert fetch.left() == []


def test_packed_answers_are_unpacked(server: Server, fetch: Run) -> None:
    import gzip

    body = film(100_000)
    server.pages["/a.mp4"] = Page(gzip.compress(body), headers={"Content-Encoding": "gzip"}, cuts=[50_000, None])
    assert got(fetch(server.url("/a.mp4"))) == body


def test_a_dead_server_is_transient(fetch: Run) -> None:
    with Server() as server:
        url = server.url("/a.mp4")
    with pytest.raises(Transient, match="refused"):
        fetch(url)


def test_a_proxy_of_the_environment_is_used(server: Server, fetch: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    server.pages["/a.mp4"] = Page(film(5_000))
    for name in ("no_proxy", "NO_PROXY", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", server.url())
    assert got(fetch("http://nowhere.invalid/a.mp4")) == film(5_000)
    assert server.asked[-1].path == "http://nowhere.invalid/a.mp4"


def test_an_attempt_has_an_end(server: Server, fetch: Run) -> None:
    server.pages["/a.mp4"] = Page(film(2_000_000), pace=0.05)
    fetch.stage = replace(fetch.stage, longest=0.2)
    with pytest.raises(Transient, match="were not enough"):
        fetch(server.url("/a.mp4"))
    assert len(fetch.left()) == 2


def test_how_it_is_fetched_is_no_part_of_the_signature() -> None:
    plain = signature("fetch", Fetch())
    assert signature("fetch", Fetch(parts="elsewhere", manners=QUICK, resumes=3)) == plain
    assert signature("fetch", Fetch(largest=1)) != plain


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_the_rate_and_the_places_of_a_host_are_shared_by_processes(server: Server, tmp_path: Path) -> None:
    for n in range(6):
        server.pages[f"/{n}.mp4"] = Page(film(40_000, n), pace=0.05)
    stage = Fetch(parts=str(tmp_path / "parts"), manners=replace(QUICK, per_second=20.0, at_once=2))
    urls = [server.url(f"/{n}.mp4") for n in range(6)]
    with FORK.Pool(3) as pool:
        done = pool.starmap(_one, [(stage, url, tmp_path / str(n)) for n, url in enumerate(urls)], chunksize=1)
    assert done == [40_000] * 6
    begun = sorted(each.at for each in server.asked)
    assert begun[-1] - begun[0] >= 7 * 0.05 - 0.03  # eight requests, 20 a second
    assert server.most_at_once == 2
    assert len(server.paths(rules=True)) == 6 + 2  # rules were asked for once


def _one(stage: Fetch, url: str, folder: Path) -> int:
    folder.mkdir(exist_ok=True)
    (item,) = stage(Item({}, {"url": url}), folder)
    assert isinstance(item, Item)
    return item.files["media"].stat().st_size


def test_a_host_in_another_time_is_not_waited_for(tmp_path: Path) -> None:
    host = Host(tmp_path, "example.org:8080")
    (host.folder / "turn").write_text("nonsense")
    host.turn(0.0)
    (host.folder / "turn").write_text(repr(time.time() + 1e9))
    start = time.monotonic()
    host.turn(0.0)
    assert time.monotonic() - start < 1
    assert host.folder.name == "example.org_8080"


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_kill_9_in_the_middle_of_a_file(server: Server, tmp_path: Path) -> None:
    body = film(1_000_000)
    server.pages["/a.mp4"] = Page(body, pace=0.01)
    parts, folder = tmp_path / "parts", tmp_path / "scratch"
    stage = Fetch(parts=str(parts), manners=QUICK)
    for kills in range(2):
        child = FORK.Process(target=_one, args=(stage, server.url("/a.mp4"), folder))
        child.start()
        while not any(path.stat().st_size > 150_000 * (kills + 1) for path in parts.rglob("*.part")):
            assert child.is_alive()
            time.sleep(0.005)
        os.kill(child.pid or 0, signal.SIGKILL)
        child.join()
    assert list(folder.iterdir()) == []
    server.pages["/a.mp4"].pace = 0
    (item,) = stage(Item({}, {"url": server.url("/a.mp4")}), folder)
    assert got(item) == body
    last = server.asked[-1]
    assert last.status == 206 and last.sent < 700_000
    assert last.span == f"bytes={len(body) - last.sent}-"
    assert list((parts / "files").rglob("*.part")) == []


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_two_workers_with_one_address_do_not_mix_their_bytes(server: Server, tmp_path: Path) -> None:
    body = film(200_000)
    server.pages["/a.mp4"] = Page(body, pace=0.005)
    stage = Fetch(parts=str(tmp_path / "parts"), manners=QUICK)
    with FORK.Pool(2) as pool:
        done = pool.starmap(_one, [(stage, server.url("/a.mp4"), tmp_path / str(n)) for n in range(2)])
    assert done == [len(body)] * 2
    for path in tmp_path.glob("[01]/*.mp4"):
        assert path.read_bytes() == body


@pytest.mark.slow
def test_a_run_brings_everything_that_may_be_had(server: Server, tmp_path: Path) -> None:
    rng = random.Random(7)
    server.pages["/robots.txt"] = Page(b"User-agent: *\nDisallow: /no", "text/plain")
    bodies = {f"/{n}.mp4": film(rng.randrange(20_000, 120_000), n) for n in range(30)}
    for n, (path, body) in enumerate(bodies.items()):
        server.pages[path] = Page(body, cuts=[rng.randrange(1, len(body)) for _ in range(n % 4)] + [None])
        server.pages[path].answers = [(429, "0.1")] if n % 7 == 0 else [(503, None)] if n % 5 == 0 else []
    server.pages |= {"/no.mp4": Page(film(5_000)), "/page.mp4": Page(b"<html>")}
    rows = [*bodies, *bodies, "/no.mp4", "/page.mp4", "/gone.mp4"]
    items = [Item({}, {"url": server.url(path), "row": n, "licence": "CC0"}) for n, path in enumerate(rows)]
    items.append(Item({}, {"url": server.url("/never.mp4")}))
    flow = Flow({"licence": Allowed(), "once": OncePerAddress(), "fetch": Fetch(manners=replace(QUICK, at_once=8))})
    with Ledger.open(tmp_path / "set") as ledger:
        ledger.add(items)
        funnel = run(flow, ledger, workers=2, backoff=0.05)
        results = ledger.results(flow)
        found = {item.facts["url"].rpartition("/")[2]: item.files["media"].read_bytes() for item in results}
        reasons = Counter(drop.reason for drop in ledger.dropped(flow))
        poisoned = [each.reason for each in ledger.quarantine(flow)]
    assert found == {path[1:]: body for path, body in bodies.items()}
    assert reasons == {"licence": 1, "same address": 30, "robots": 1, "gone": 1}
    assert len(poisoned) == 1 and "is a page or text" in poisoned[0]
    assert funnel[-1].entered == 33
    assert not {"/no.mp4", "/never.mp4"} & set(server.paths())
    assert not list((tmp_path / "set" / "parts" / "files").rglob("*.part"))
    # again: nothing is asked for
    before = len(server.asked)
    with Ledger.open(tmp_path / "set") as ledger:
        ledger.add(items)
        run(flow, ledger, workers=1)
    assert len(server.asked) == before
