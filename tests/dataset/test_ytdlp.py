"""yt-dlp for real, against a server on loopback: listed, fetched, and its failures told apart."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from soundstage.core.errors import ConfigError, RequestError
from soundstage.data.fetch import Fetch
from soundstage.data.flow import Drop, Item, Poison, Transient
from soundstage.data.sources import YtDlp
from soundstage.data.sources.ytdlp import YtDlpFetch
from soundstage.data.web import AGENT, Manners
from soundstage.testing.server import Page, Server, film

# what yt-dlp leaves open
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
QUICK = Manners(per_second=2000.0, timeout=5.0)
PLAIN = ("--use-extractors", "generic,html5")
BODY = film(60_000)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        yield running


def html(*sources: str) -> Page:
    films = "".join(f'<video src="{source}"></video>' for source in sources)
    head = '<meta property="og:title" content="A bell"><title>page</title>'
    return Page(f"<!DOCTYPE html><html><head>{head}</head><body>{films}</body></html>".encode(), "text/html")


def listed(server: Server, path: str, *options: str) -> list[Item]:
    return list(YtDlp(server.url(path), licence="LicenseRef-own", options=(*PLAIN, *options), manners=QUICK))


def fetched(item: Item, folder: Path, *options: str, largest: int = 1 << 30) -> Item | Drop:
    pages = YtDlpFetch(options=(*PLAIN, *options))
    scratch = folder / "scratch"
    scratch.mkdir(exist_ok=True)
    (outcome,) = Fetch(pages=pages, parts=str(folder / "parts"), manners=QUICK, largest=largest)(item, scratch)
    return outcome


def test_a_page_with_a_film(server: Server, tmp_path: Path) -> None:
    server.pages |= {"/page.html": html("/a.mp4"), "/a.mp4": Page(BODY)}
    (item,) = listed(server, "/page.html")
    assert item.files == {}
    assert item.facts["source"] == "ytdlp"
    assert item.facts["url"] == server.url("/page.html")
    assert (item.facts["title"], item.facts["licence"]) == ("A bell (1)", "LicenseRef-own")
    outcome = fetched(item, tmp_path)
    assert isinstance(outcome, Item)
    assert outcome.files["media"].read_bytes() == BODY
    assert outcome.files["media"].parent == tmp_path / "scratch"
    assert outcome.facts["fetched"]["bytes"] == len(BODY)
    assert {each.agent for each in server.asked} == {AGENT}  # its own name, not that of a browser
    assert [path for path in (tmp_path / "parts" / "pages").rglob("*") if path.suffix != ".lock"] == []


def test_a_page_with_two_films_gives_both(server: Server, tmp_path: Path) -> None:
    bodies = {"/a.mp4": film(50_000, 1), "/b.mp4": film(50_000, 2)}
    server.pages |= {"/page.html": html(*bodies)} | {path: Page(body) for path, body in bodies.items()}
    items = listed(server, "/page.html")
    assert len({item.facts["entry"] for item in items}) == 2
    found = []
    for item in items:
        outcome = fetched(item, tmp_path)
        assert isinstance(outcome, Item)
        found.append(outcome.files["media"].read_bytes())
    assert found == list(bodies.values())
    with pytest.raises(Poison, match="has 2 films; list it with ytdlp:"):
        fetched(Item({}, {"source": "ytdlp", "url": server.url("/page.html")}), tmp_path)


def test_an_archive_is_read_when_listing_and_ignored_when_fetching(server: Server, tmp_path: Path) -> None:
    server.pages |= {"/a.mp4": Page(BODY)}
    archive = tmp_path / "archive.txt"
    (item,) = listed(server, "/a.mp4", "--download-archive", str(archive))
    assert isinstance(fetched(item, tmp_path, "--download-archive", str(archive)), Item)
    assert not archive.exists()
    archive.write_text(f"{item.facts['id'].replace(':', ' ').lower()}\n")
    assert listed(server, "/a.mp4", "--download-archive", str(archive)) == []
    assert isinstance(fetched(item, tmp_path, "--download-archive", str(archive)), Item)


def test_what_is_forbidden_is_not_asked_for(server: Server, tmp_path: Path) -> None:
    server.pages |= {
        "/robots.txt": Page(b"User-agent: *\nDisallow: /no", "text/plain"),
        "/no.html": html("/a.mp4"),
        "/page.html": html("/no.mp4"),
        "/no.mp4": Page(BODY),
    }
    with pytest.raises(RequestError, match=r"robots\.txt"):
        listed(server, "/no.html")
    outcome = fetched(Item({}, {"source": "ytdlp", "url": server.url("/no.html")}), tmp_path)
    assert isinstance(outcome, Drop) and outcome.reason == "robots"
    assert server.paths() == []
    # a page that may be had, whose film may not: the page is read, and yt-dlp looks at the film's first bytes at most
    outcome = fetched(Item({}, {"source": "ytdlp", "url": server.url("/page.html")}), tmp_path)
    assert isinstance(outcome, Drop) and outcome.reason == "robots"
    assert server.sent("/no.mp4") == 0


@pytest.mark.parametrize(
    ("status", "kind"), [(403, "forbidden"), (404, "gone"), (429, Transient), (503, Transient), (418, Poison)]
)
def test_failures_are_told_apart(status: int, kind: str | type[Exception], server: Server, tmp_path: Path) -> None:
    server.pages["/a.mp4"] = Page(answers=[(status, "7")] * 9)
    item = Item({}, {"source": "ytdlp", "url": server.url("/a.mp4")})
    if isinstance(kind, str):
        outcome = fetched(item, tmp_path)
        assert isinstance(outcome, Drop) and outcome.reason == kind
    else:
        with pytest.raises(kind, match=f"answered {status}") as error:
            fetched(item, tmp_path)
        if isinstance(error.value, Transient):
            assert error.value.after == 7


def test_pages_without_films_and_false_films(server: Server, tmp_path: Path) -> None:
    server.pages |= {"/page.html": html(), "/a.mp4": Page(b"\0" * 60_000)}
    with pytest.raises(Poison, match="Unsupported URL"):
        fetched(Item({}, {"source": "ytdlp", "url": server.url("/page.html")}), tmp_path)
    with pytest.raises(Poison, match="a file of no known kind"):
        fetched(Item({}, {"source": "ytdlp", "url": server.url("/a.mp4")}), tmp_path)
    with pytest.raises(ConfigError, match="does not understand"):
        list(YtDlp("https://example.org", options=("--no-such-option",)))


def test_too_large_is_dropped(server: Server, tmp_path: Path) -> None:
    server.pages["/a.mp4"] = Page(BODY)
    outcome = fetched(Item({}, {"source": "ytdlp", "url": server.url("/a.mp4")}), tmp_path, largest=10_000)
    assert isinstance(outcome, Drop) and outcome.reason == "too large"


def test_a_cut_film_is_resumed(server: Server, tmp_path: Path) -> None:
    body = film(600_000)
    server.pages["/a.mp4"] = Page(body, cuts=[1_000, 200_000, None])  # the first is a look at what it is
    outcome = fetched(Item({}, {"source": "ytdlp", "url": server.url("/a.mp4")}), tmp_path)
    assert isinstance(outcome, Item)
    assert outcome.files["media"].read_bytes() == body
    last = server.asked[-1]
    assert last.status == 206 and 0 < int(last.span[6:-1]) <= 200_000
