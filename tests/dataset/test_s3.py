"""S3 by a real server, and memory, as places that items come from."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from soundstage.core.errors import ConfigError
from soundstage.data.fetch import Fetch
from soundstage.data.flow import Drop, Item, Poison
from soundstage.data.remote import filesystem, listing
from soundstage.data.sources import Bucket, Urls, parse
from soundstage.testing.server import film

BODIES = {"clips/a.mp4": film(300_000, 1), "clips/sub/b.mp4": film(10_000, 2)}
BESIDE = {
    "clips/a.txt": b"a bell rings",
    "clips/a.json": json.dumps({"license": "CC0", "url": "https://x.org/a"}).encode(),
    "clips/.hidden.mp4": b"x",
    "clips/read.me": b"x",
}


@pytest.fixture
def bucket(s3: None) -> str:  # noqa: ARG001
    """An S3 bucket that holds clips, by its URL."""
    filesystem("s3://raw")[0].mkdir("raw")
    fill("s3://raw")
    return "s3://raw"


@pytest.fixture
def memory() -> Iterator[str]:
    fill("memory://raw")
    yield "memory://raw"
    files, path = filesystem("memory://raw")
    files.rm(path, recursive=True)


def fill(url: str) -> None:
    files, root = filesystem(url)
    for name, body in (BODIES | BESIDE).items():
        files.pipe_file(f"{root}/{name}", body)


def fetched(item: Item, folder: Path, **settings: object) -> Item | Drop:
    (outcome,) = Fetch(parts=str(folder / "parts"), **settings)(item, folder)  # type: ignore[arg-type]
    return outcome


def check(url: str, folder: Path) -> None:
    """The whole way of a bucket: listed with sidecars, fetched, resumed, and what is missing or wrong."""
    items = list(Bucket(f"{url}/clips", licence="CC-BY"))
    first = {"caption": "a bell rings", "licence": "CC0", "page": "https://x.org/a"}
    assert [item.facts for item in items] == [
        {"source": "bucket", "name": "a.mp4", "url": f"{url}/clips/a.mp4", **first},
        {"source": "bucket", "name": "sub/b.mp4", "url": f"{url}/clips/sub/b.mp4", "licence": "CC-BY"},
    ]
    for item, body in zip(items, BODIES.values(), strict=True):
        outcome = fetched(item, folder)
        assert isinstance(outcome, Item)
        assert outcome.files["media"].read_bytes() == body
        assert outcome.facts["fetched"]["bytes"] == len(body)
    (gone,) = parse(f"{url}/clips/a.mp4")
    outcome = fetched(gone.child(url=f"{url}/clips/none.mp4"), folder)
    assert isinstance(outcome, Drop) and outcome.reason == "gone"
    outcome = fetched(gone, folder, largest=1000)
    assert isinstance(outcome, Drop) and (outcome.reason, outcome.score) == ("too large", 300_000)
    with pytest.raises(Poison, match="is a page or text"):
        fetched(gone.child(url=f"{url}/clips/a.json"), folder)
    files, root = filesystem(url)
    files.pipe_file(f"{root}/list.jsonl", f'{{"url": "{url}/clips/a.mp4"}}\n'.encode())
    (listed,) = Urls(f"{url}/list.jsonl")
    assert isinstance(fetched(listed, folder), Item)
    with pytest.raises(ConfigError, match="there is nothing below"):
        list(Bucket(f"{url}/nowhere"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_s3(bucket: str, tmp_path: Path) -> None:
    check(bucket, tmp_path)
    # a part of the same version is gone on with, and a part of another is not
    (item,) = parse(f"{bucket}/clips/a.mp4")
    url, body = item.facts["url"], BODIES["clips/a.mp4"]
    for etag in (listing(f"{bucket}/clips")[0], None):
        leave_part(tmp_path / "parts" / "files", url, body[:200_000] if etag else b"another", etag is not None)
        outcome = fetched(item, tmp_path)
        assert isinstance(outcome, Item)
        assert outcome.files["media"].read_bytes() == body


def leave_part(folder: Path, url: str, body: bytes, same: bool) -> None:
    from soundstage.data.parts import held
    from soundstage.data.remote import version_of

    files, path = filesystem(url)
    with held(folder, url) as part:
        part.restart({"etag": version_of(files.info(path)) if same else "older"})
        part.write(body)


def test_memory(memory: str, tmp_path: Path) -> None:
    check(memory, tmp_path)


def test_a_kind_that_is_not_known() -> None:
    with pytest.raises(ConfigError, match="of no kind that fsspec knows"):
        list(parse("nonsense://bucket/a"))
