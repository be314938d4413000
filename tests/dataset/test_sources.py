"""Where items come from: folders, lists, shops; and one address for one thing."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from soundstage.core.errors import ConfigError, RequestError
from soundstage.data.fetch import Fetch
from soundstage.data.flow import Drop, Item
from soundstage.data.sources import (
    Bucket,
    Folder,
    Links,
    OncePerAddress,
    Shop,
    Urls,
    YtDlp,
    canonical,
    parse,
)
from soundstage.data.web import Manners
from soundstage.testing.server import Page, Server, film

QUICK = Manners(per_second=2000.0, timeout=5.0)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        yield running


@pytest.mark.parametrize(
    ("given", "same"),
    [
        ("HTTPS://Example.ORG:443/A/./b/../c.mp4#t=3", "https://example.org/A/c.mp4"),
        ("http://example.org", "http://example.org/"),
        ("http://example.org:8080/a//b/", "http://example.org:8080/a//b/"),
        ("https://example.org/a?utm_source=x&b=2&a=1&fbclid=y", "https://example.org/a?a=1&b=2"),
        ("https://example.org/a?b&a=", "https://example.org/a?a=&b"),
        ("https://example.org/%7eme/%c3%a9%2F?x=%3d", "https://example.org/~me/%C3%A9%2F?x=%3D"),
        ("https://example.org/é x", "https://example.org/%C3%A9%20x"),
        ("https://user:secret@bücher.example./a", "https://xn--bcher-kva.example/a"),
        ("http://[::1]:80/a/..", "http://[::1]/"),
        ("https://youtu.be/abcdefghijk?si=1", "https://www.youtube.com/watch?v=abcdefghijk"),
        ("https://m.youtube.com/watch?list=x&v=abcdefghijk&t=3", "https://www.youtube.com/watch?v=abcdefghijk"),
        ("https://www.youtube.com/shorts/abcdefghijk", "https://www.youtube.com/watch?v=abcdefghijk"),
        ("https://www.youtube.com/@someone", "https://www.youtube.com/@someone"),
        ("S3://Bucket/a b#c?d", "s3://Bucket/a b#c?d"),
    ],
)
def test_one_address_for_one_thing(given: str, same: str) -> None:
    assert canonical(given) == same
    assert canonical(same) == same


@pytest.mark.parametrize("wrong", ["a.mp4", "https:///a", "http://[/", "http://a:b/", "mailto:me"])
def test_what_is_no_address(wrong: str) -> None:
    with pytest.raises(ConfigError, match="url: "):
        canonical(wrong)


def test_a_folder_with_sidecars(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b.MP4", "sub/a.wav", "c.mkv", ".hidden.mp4", "d.mp4.part", "notes.doc"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "b.txt").write_text(" a bell\n rings ")
    (tmp_path / "b.json").write_text(json.dumps({"license": "CC BY 4.0", "uploader": "me", "scene": 3, "title": ""}))
    record = {"webpage_url": "https://x/1", "license": "CC0", "title": "T", "formats": [1], "tags": ["a"]}
    (tmp_path / "c.info.json").write_text(json.dumps(record))
    items = list(Folder(str(tmp_path), licence="LicenseRef-own"))
    assert [item.facts["name"] for item in items] == ["b.MP4", "c.mkv", "sub/a.wav"]
    assert all(item.files["media"].is_absolute() for item in items)
    first = {"source": "folder", "name": "b.MP4", "licence": "CC BY 4.0", "author": "me", "scene": 3}
    assert items[0].facts == first | {"caption": "a bell rings"}
    more = {"licence": "CC0", "url": "https://x/1", "title": "T", "tags": ["a"]}
    assert items[1].facts == {"source": "folder", "name": "c.mkv"} | more
    assert items[2].facts == {"source": "folder", "name": "sub/a.wav", "licence": "LicenseRef-own"}
    (tmp_path / "c.json").write_text("[1]")
    with pytest.raises(ConfigError, match=r"c\.json: holds no object"):
        list(Folder(str(tmp_path)))
    with pytest.raises(ConfigError, match="is not a folder"):
        list(Folder(str(tmp_path / "nowhere")))


def test_lists_of_every_kind_say_the_same(tmp_path: Path) -> None:
    rows = [
        {"url": "HTTP://A.org/1.mp4?utm_source=x", "text": "one,  two", "license": "CC0", "keywords": "a, b", "n": "7"},
        {"url": "http://a.org/2.mp4", "sha256": "AB" * 32},
    ]
    (tmp_path / "l.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    table = f'\ufeffurl,text,license,keywords,n,sha256\n{rows[0]["url"]},"one,  two",CC0,"a, b",7,\n'
    table += f"http://a.org/2.mp4,,,,,{'AB' * 32}\n"
    (tmp_path / "l.csv").write_text(table)
    with gzip.open(tmp_path / "l.csv.gz", "wt") as file:
        file.write(table)
    first = {"caption": "one, two", "licence": "CC0", "tags": ["a", "b"], "n": "7"}
    expected = [
        {"source": "urls", "url": "http://a.org/1.mp4", **first},
        {"source": "urls", "url": "http://a.org/2.mp4", "sha256": "ab" * 32, "licence": "CC-BY"},
    ]
    for name in ("l.jsonl", "l.csv", "l.csv.gz"):
        assert [item.facts for item in Urls(str(tmp_path / name), licence="CC-BY")] == expected
    (tmp_path / "l.txt").write_text("# mine\nhttp://a.org/1.mp4\n\nhttp://a.org/2.mp4\n")
    assert [item.facts["url"] for item in Urls(str(tmp_path / "l.txt"))] == [each["url"] for each in expected]


def test_a_list_of_files_beside_it_and_columns_of_other_names(tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "a.mp4").write_bytes(b"x")
    (tmp_path / "l.tsv").write_text("path\tname\tlabel\nclips/a.mp4\tA\tbell\n")
    (item,) = Urls(str(tmp_path / "l.tsv"), columns={"url": "path", "caption": "label"})
    assert item.files == {"media": tmp_path / "clips" / "a.mp4"}
    assert item.facts == {"source": "urls", "title": "A", "caption": "bell", "name": "clips/a.mp4"}


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("l.jsonl", '{"url": "http://a/1"}\n{"url": ', r"l\.jsonl:2: is not JSON"),
        ("l.jsonl", "[1]", "holds no object"),
        ("l.jsonl", '{"link2": "http://a/1"}', r"l\.jsonl:1: names no url; its columns are link2"),
        ("l.jsonl", '{"url": "http://a/1", "scan": {}}', "may not tell 'scan'"),
        ("l.jsonl", '{"url": "http://a/1", "md5": "12"}', "is not a md5 of 32"),
        ("l.jsonl", '{"url": "gone.mp4"}', "neither an address nor a file beside the list"),
        ("l.csv", 'url\n"http://a/1', "cannot be read"),
        ("l.doc", "", "is not a list"),
    ],
)
def test_a_row_that_cannot_be_read_stops_with_its_line(name: str, text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=words):
        list(Urls(str(tmp_path / name)))


def test_of_one_address_one_item_goes_on(tmp_path: Path) -> None:
    told = [
        {"url": "http://a.org/1.mp4"},
        {"url": "http://A.org:80/1.mp4#x", "licence": "CC0"},
        {"url": "http://a.org/2.mp4"},
        {"url": "http://a.org/1.mp4", "caption": "again"},
        {"name": "no address"},
    ]
    stage = OncePerAddress()
    items = [Item({}, facts) for facts in told]
    groups = list(stage.groups(items))
    assert sorted(len(group) for group in groups) == [1, 1, 3]
    outcomes = [each for group in groups for each in stage.gather(group, tmp_path)]
    kept = [each.facts for each in outcomes if isinstance(each, Item)]
    assert sorted(kept, key=str) == sorted((told[1], told[2], told[4]), key=str)
    assert [each.reason for each in outcomes if isinstance(each, Drop)] == ["same address"] * 2


def test_words_of_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_text("url\n")
    folder, table = str(tmp_path), str(tmp_path / "l.csv")
    assert parse(folder) == parse(f"folder:{folder}") == Folder(folder)
    assert parse(table) == parse(f"urls:{table}") == Urls(table)
    assert parse("https://a.org/1.mp4", licence="CC0") == Links(("https://a.org/1.mp4",), "CC0")
    assert parse("shop:https://a.org") == Shop("https://a.org")
    assert parse("ytdlp:ytsearch5:glass bell", options=("-4",)) == YtDlp("ytsearch5:glass bell", options=("-4",))
    assert parse("s3://b/raw") == Bucket("s3://b/raw")
    assert parse("s3://b/l.jsonl.gz") == Urls("s3://b/l.jsonl.gz")
    for wrong, words in {
        "nowhere": "no such folder or list",
        "shop:": "nothing follows",
        __file__: "neither a folder nor a list",
    }.items():
        with pytest.raises(ConfigError, match=words):
            parse(wrong)
    with pytest.raises(ConfigError, match="a Folder has no setting among colour"):
        parse(folder, colour=1)


def product(number: int, **more: object) -> dict:
    return {
        "id": number,
        "handle": f"lamp-{number}",
        "title": f"Lamp {number}",
        "vendor": "Light & Co",
        "product_type": "Lamps",
        "tags": ["warm", "brass"],
        "body_html": "<p>A <b>brass</b> lamp &amp; shade.</p>",
        "variants": [{"price": "19.90"}],
        "images": [{"src": f"/cdn/{number}.jpg?v=1", "alt": None}],
    } | more


def test_a_shop_is_read_page_by_page(server: Server) -> None:
    films = [
        {"height": 480, "format": "mp4", "url": "/cdn/s.mp4"},
        {"height": 1080, "format": "mp4", "url": "/cdn/l.mp4"},
        {"height": 2160, "format": "m3u8", "url": "/cdn/x.m3u8"},
    ]
    media = [{"media_type": "image"}, {"media_type": "video", "sources": films}]
    media.append({"media_type": "external_video", "host": "youtube", "external_id": "abcdefghijk"})
    pages = [[product(1), product(2)], [product(3), product(4, media=media)], [product(4), product(3)]]
    for number, products in enumerate(pages, 1):
        body = json.dumps({"products": products}).encode()
        server.pages[f"/collections/all/products.json?limit=2&page={number}"] = Page(body, "application/json")
    server.pages["/collections/all/products.json?limit=2&page=2"].answers = [(429, "0.1"), (503, "0")]
    server.pages["/products/lamp-2.js"] = Page(json.dumps({"media": media[:2]}).encode())
    shop = Shop(server.url("/collections/all/"), page_size=2, licence="LicenseRef-contract-17", manners=QUICK)
    items = list(shop)
    assert [item.facts["url"].removeprefix(server.url()) for item in items] == [
        *("/cdn/1.jpg?v=1", "/cdn/2.jpg?v=1", "/cdn/l.mp4", "/cdn/3.jpg?v=1", "/cdn/4.jpg?v=1", "/cdn/l.mp4"),
        "https://www.youtube.com/watch?v=abcdefghijk",
    ]
    assert items[0].facts["product"] == {
        "id": 1,
        "handle": "lamp-1",
        "title": "Lamp 1",
        "vendor": "Light & Co",
        "type": "Lamps",
        "tags": ["warm", "brass"],
        "text": "A brass lamp & shade.",
        "price": "19.90",
    }
    facts = items[2].facts
    assert (facts["source"], facts["title"], facts["author"]) == ("shop", "Lamp 2", "Light & Co")
    assert (facts["page"], facts["shot"]) == (server.url("/products/lamp-2"), {"kind": "video", "place": 1})
    assert {item.facts["licence"] for item in items} == {"LicenseRef-contract-17"}
    assert items[-1].facts["source"] == "ytdlp"
    assert len(list(Shop(server.url("/collections/all"), page_size=2, videos=False, manners=QUICK))) == 4


def test_a_shop_that_says_no_or_is_none(server: Server) -> None:
    server.pages["/products.json"] = Page(b'{"products": "none"}')
    with pytest.raises(ConfigError, match="tells no products"):
        list(Shop(server.url(), manners=QUICK))
    with Server() as other:
        other.pages["/robots.txt"] = Page(b"User-agent: *\nDisallow: /products.json", "text/plain")
        with pytest.raises(RequestError, match=r"robots\.txt disallows it for soundstage"):
            list(Shop(other.url(), manners=QUICK))
        assert other.paths() == []


def test_from_a_list_to_files(server: Server, tmp_path: Path) -> None:
    bodies = {f"/{n}.mp4": film(3_000, n) for n in range(3)}
    server.pages |= {path: Page(body) for path, body in bodies.items()}
    urls = [server.url(path) for path in [*bodies, "/0.mp4#again", "/gone.mp4"]]
    (tmp_path / "l.txt").write_text("\n".join(urls))
    sieve, stage = OncePerAddress(), Fetch(parts=str(tmp_path / "parts"), manners=QUICK)
    sieved = [
        each for group in sieve.groups(list(Urls(str(tmp_path / "l.txt")))) for each in sieve.gather(group, tmp_path)
    ]
    outcomes = [each for item in sieved if isinstance(item, Item) for each in stage(item, tmp_path)]
    assert [each.files["media"].read_bytes() for each in outcomes if isinstance(each, Item)] == list(bodies.values())
    assert [each.reason for each in (*sieved, *outcomes) if isinstance(each, Drop)] == ["same address", "gone"]
    assert len(server.paths()) == 4
