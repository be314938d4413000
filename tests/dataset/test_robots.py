"""What sites say to machines is heard: robots.txt, signals against training, and the headers of an answer."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from soundstage.data.fetch import Fetch
from soundstage.data.flow import Drop, Item, Transient
from soundstage.data.robots import Rules, refusal
from soundstage.data.web import AGENT, Manners
from soundstage.testing.server import Page, Server, film

QUICK = Manners(per_second=2000.0, timeout=5.0)
BODY = film(5_000)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        yield running


def told(server: Server, folder: Path, path: str, manners: Manners = QUICK) -> str:
    """ "" for a file that was fetched, else the reason of its drop."""
    (outcome,) = Fetch(parts=str(folder / "parts"), manners=manners)(Item({}, {"url": server.url(path)}), folder)
    if isinstance(outcome, Drop):
        return outcome.reason
    assert outcome.files["media"].read_bytes() == BODY
    return ""


def rules(text: str) -> Page:
    return Page(text.encode(), "text/plain")


def test_what_robots_txt_forbids_is_never_asked_for(server: Server, tmp_path: Path) -> None:
    server.pages["/robots.txt"] = rules(
        "User-agent: *\nDisallow: /\n\nUser-agent: soundstage\nDisallow: /private\nAllow: /private/open\n"
        "Disallow: /*.mov$\nDisallow: /list?secret\n"
    )
    paths = ["/a.mp4", "/private/a.mp4", "/private/open/a.mp4", "/b.mov", "/b.mov?x", "/list?secret=1", "/list?open=1"]
    for path in paths:
        server.pages[path] = Page(BODY)
    found = {path: told(server, tmp_path, path) for path in paths}
    assert [path for path, reason in found.items() if reason == "robots"] == [
        "/private/a.mp4",
        "/b.mov",
        "/list?secret=1",
    ]
    assert sorted(server.paths()) == sorted(path for path, reason in found.items() if not reason)
    assert server.paths(rules=True).count("/robots.txt") == 1


def test_a_redirect_is_asked_for_only_if_its_own_host_allows_it(server: Server, tmp_path: Path) -> None:
    with Server() as other:
        other.pages["/robots.txt"] = rules("User-agent: *\nDisallow: /no")
        other.pages["/no.mp4"] = other.pages["/yes.mp4"] = Page(BODY)
        for name in ("no", "yes"):
            server.pages[f"/{name}.mp4"] = Page(status=302, headers={"Location": other.url(f"/{name}.mp4")})
        server.pages["/round.mp4"] = Page(status=301, headers={"Location": "/yes.mp4"})
        assert told(server, tmp_path, "/no.mp4") == "robots"
        assert told(server, tmp_path, "/round.mp4") == ""
        assert other.paths() == ["/yes.mp4"]
        (item,) = Fetch(parts=str(tmp_path / "p"), manners=QUICK)(Item({}, {"url": server.url("/yes.mp4")}), tmp_path)
        assert isinstance(item, Item) and item.facts["fetched"]["at"] == other.url("/yes.mp4")


def test_a_circle_of_redirects_ends(server: Server, tmp_path: Path) -> None:
    server.pages["/a.mp4"] = Page(status=302, headers={"Location": "/a.mp4"})
    with pytest.raises(ValueError, match="redirected more than 10 times"):
        told(server, tmp_path, "/a.mp4")


@pytest.mark.parametrize(("status", "reason"), [(404, ""), (403, ""), (401, ""), (500, None), (503, None), (429, None)])
def test_rules_that_cannot_be_read(status: int, reason: str | None, server: Server, tmp_path: Path) -> None:
    server.pages["/robots.txt"] = Page(answers=[(status, None)], body=b"User-agent: *\nDisallow: /a")
    server.pages["/a.mp4"] = Page(BODY)
    if reason is None:  # nothing is fetched while it is not known what may be (RFC 9309, 2.3.1.4)
        with pytest.raises(Transient):
            told(server, tmp_path, "/a.mp4")
        assert told(server, tmp_path, "/a.mp4") == "robots"
        assert server.paths() == []
    else:
        assert told(server, tmp_path, "/a.mp4") == reason


@pytest.mark.parametrize(
    ("header", "value", "refused"),
    [
        ("X-Robots-Tag", "noai", True),
        ("X-Robots-Tag", "noarchive, NoImageAI", True),
        ("X-Robots-Tag", "noindex", True),
        ("X-Robots-Tag", "otherbot: noai", False),
        ("X-Robots-Tag", "otherbot: noindex, soundstage: noai", True),
        ("X-Robots-Tag", "max-snippet: 10, noai", True),
        ("X-Robots-Tag", "nofollow", False),
        ("tdm-reservation", "1", True),
        ("tdm-reservation", "0", False),
        ("Content-Usage", "train-ai=n", True),
        ("Content-Signal", "search=yes, ai-train=no", True),
        ("Content-Signal", "search=no, ai-train=yes", False),
    ],
)
def test_headers_that_forbid_training(header: str, value: str, refused: bool, server: Server, tmp_path: Path) -> None:
    server.pages["/a.mp4"] = Page(BODY, headers={header: value}, pace=0.01)
    assert told(server, tmp_path, "/a.mp4") == ("noai" if refused else "")
    assert (refusal([(header, value)], AGENT) is not None) == refused
    assert list((tmp_path / "parts" / "files").rglob("*.*")) == []


def test_signals_of_a_whole_site(server: Server, tmp_path: Path) -> None:
    server.pages["/robots.txt"] = rules("User-agent: *\nContent-Signal: search=yes,ai-train=no\nAllow: /\n")
    server.pages["/a.mp4"] = Page(BODY)
    assert told(server, tmp_path, "/a.mp4") == "noai"
    assert server.paths() == []
    # our own site
    assert told(server, tmp_path, "/a.mp4", replace(QUICK, noai=False)) == ""


def test_a_reservation_file(server: Server, tmp_path: Path) -> None:
    reserved = b'[{"location": "/films/*.mp4", "tdm-reservation": 1}, {"location": "/", "tdm-reservation": 0}]'
    server.pages["/.well-known/tdmrep.json"] = Page(reserved, "application/json")
    server.pages["/films/a.mp4"] = server.pages["/a.mp4"] = Page(BODY)
    assert (told(server, tmp_path, "/films/a.mp4"), told(server, tmp_path, "/a.mp4")) == ("noai", "")
    assert server.paths() == ["/a.mp4"]


def test_rules_are_those_of_the_group_that_names_us() -> None:
    text = "User-agent: a\nUser-agent: Soundstage\nContent-Usage: /x train-ai=n\nCrawl-delay: 3\n\nUser-agent: *\n"
    found = Rules(text + "Content-Signal: ai-train=no\nRequest-rate: 1/7\n")
    assert found.refuses("https://h/x/a.mp4", AGENT) == ("noai", "robots.txt says 'Content-Usage: /x train-ai=n'")
    assert found.refuses("https://h/y", AGENT) is None
    assert found.refuses("https://h/y", "other/1")
    assert (found.delay(AGENT), found.delay("other/1"), Rules().delay(AGENT)) == (3.0, 7.0, 0.0)
    assert Rules("", "not json").refuses("https://h/", AGENT) is None
    assert Rules("<!doctype html>\n<p>hello: there").refuses("https://h/", AGENT) is None


def test_a_delay_that_the_site_asks_for_is_kept(server: Server, tmp_path: Path) -> None:
    server.pages["/robots.txt"] = rules("User-agent: *\nCrawl-delay: 0.3")
    server.pages["/a.mp4"] = server.pages["/b.mp4"] = Page(BODY)
    assert told(server, tmp_path, "/a.mp4") == told(server, tmp_path, "/b.mp4") == ""
    first, second = (each.at for each in server.asked if each.path.endswith(".mp4"))
    assert second - first >= 0.2  # one request of 2000 a second otherwise
