from __future__ import annotations

import hashlib
import json
import tarfile
from fractions import Fraction
from pathlib import Path
from uuid import uuid4

import numpy as np
import pytest

from soundstage.core.errors import ConfigError
from soundstage.data.flow import Item, Poison
from soundstage.data.manifest import read_manifest
from soundstage.data.places import Local, place
from soundstage.data.reading import Shards
from soundstage.data.remote import filesystem
from soundstage.data.shapes import ClipShape
from soundstage.data.shards import Pack, pack, publish
from soundstage.data.validate import validate
from soundstage.media import decode
from soundstage.world import render, stream_item

pytest.importorskip("pyarrow")


SHAPE = ClipShape(fps=16, size=(32, 32), num_frames=8)


def committed(path: Path, **facts: object) -> Item:
    """A file as the ledger gives it."""
    return Item({"media": path}, facts, {"media": hashlib.sha256(path.read_bytes()).hexdigest()})


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> list[Item]:
    folder, found = tmp_path_factory.mktemp("clips"), []
    for index in range(7):
        scene, text = stream_item(5, index)
        path = render(scene, size=32, num_frames=16).clip.save(folder / f"{index}.mp4")
        found.append(committed(path, caption=text, tags=[scene.kind], licence="CC0", index=index))
    return found


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_same_items_give_the_same_bytes(items: list[Item], tmp_path: Path) -> None:
    config = Pack(num=3)
    one = pack(items, tmp_path / "one", config)
    pack(reversed(items), tmp_path / "two", config)
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")
    assert [shard.samples for shard in one.shards] == [3, 3, 1]
    assert sorted(bytes_of(tmp_path / "one")) == [*(f"clips-00000{i}.tar" for i in range(3)), "manifest.parquet"]
    assert one.texts("key") == sorted(item.id for item in items)


def test_what_a_kill_left_behind_does_not_matter(
    items: list[Item], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Pack(num=2)
    pack(items, tmp_path / "calm", config)

    class Killed(BaseException):
        pass

    put = Local.put
    for survive in range(3):
        left = survive

        def dying(self: Local, name: str, path: Path) -> None:
            nonlocal left
            if left == 0:
                (self.folder / f".{name}.77.part").write_bytes(path.read_bytes()[:1000])
                raise Killed
            left -= 1
            put(self, name, path)

        monkeypatch.setattr(Local, "put", dying)
        with pytest.raises(Killed):
            pack(items[survive:], tmp_path / "torn", config)
        with pytest.raises(ConfigError, match=r"no manifest: the packing did not end"):
            read_manifest(tmp_path / "torn")
    monkeypatch.setattr(Local, "put", put)
    pack(items, tmp_path / "torn", config)
    assert bytes_of(tmp_path / "torn") == bytes_of(tmp_path / "calm")


def test_a_second_packing_moves_nothing_that_is_there(
    items: list[Item], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(items, tmp_path, Pack(num=3))
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    pack(items, tmp_path, Pack(num=3))
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    moved: list[str] = []
    put = Local.put

    def note(self: Local, name: str, path: Path) -> None:
        moved.append(name)
        put(self, name, path)

    monkeypatch.setattr(Local, "put", note)
    kept = sorted(items, key=lambda item: item.id)[:4]
    assert len(pack(kept, tmp_path, Pack(num=3))) == 4
    assert moved == ["clips-000001.tar"]
    assert sorted(bytes_of(tmp_path)) == ["clips-000000.tar", "clips-000001.tar", "manifest.parquet"]


def test_offsets_are_those_of_the_tar(items: list[Item], tmp_path: Path) -> None:
    manifest = pack(items, tmp_path, Pack(num=3))
    members: dict[str, tuple[str, bytes]] = {}
    for shard in manifest.shards:
        with tarfile.open(tmp_path / shard.name) as tar:
            for info in tar:
                assert (info.mtime, info.uid, info.gid, info.uname, info.gname, info.mode) == (0, 0, 0, "", "", 0o644)
                members[info.name] = (shard.name, tar.extractfile(info).read())  # type: ignore[union-attr]
    assert len(members) == 7 * 4
    by_id = {item.id: item for item in items}
    for index, row in enumerate(manifest.rows()):
        item = by_id[row["key"]]
        for ext, member in manifest.members(index).items():
            assert (member.name, member.read()) == members[f"{row['key']}.{ext}"]
        assert manifest.members(index)["mp4"].read() == item.files["media"].read_bytes()
        assert manifest.members(index)["txt"].read().decode() == row["caption"] == item.facts["caption"]
        told = json.loads(manifest.members(index)["json"].read())
        assert told == {"key": item.id, "facts": dict(item.facts), "digests": dict(item.digests)}
        assert (row["width"], row["height"], row["fps"], row["licence"]) == (32, 32, "16", "CC0")
        assert row["category"] == item.facts["tags"][0]


def test_sound_lies_apart_without_loss(items: list[Item], tmp_path: Path) -> None:
    manifest = pack(items[:1], tmp_path)
    parts = manifest.members(0)
    film, sound = decode.read(parts["mp4"], video=False), decode.read(parts["flac"], video=False)
    assert film.sample_rate == sound.sample_rate
    assert np.abs(film.wave - sound.wave).max() <= 1.01 / 32768  # type: ignore[operator]
    assert set(pack(items[:1], tmp_path / "b", Pack(sound=None)).members(0)) == {"mp4", "json", "txt"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_reads_them(items: list[Item], tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    manifest = pack(items, tmp_path, Pack(num=3))
    found = {
        sample["__key__"]: sample
        for sample in webdataset.WebDataset(manifest.urls, shardshuffle=False, empty_check=False)
    }
    assert set(found) == {item.id for item in items}
    for item in items:
        assert found[item.id]["mp4"] == item.files["media"].read_bytes()
        assert found[item.id]["txt"].decode() == item.facts["caption"]
        assert {"flac", "json"} <= set(found[item.id])


def test_places_by_url(items: list[Item], tmp_path: Path) -> None:
    pytest.importorskip("fsspec")
    pack(items, tmp_path, Pack(num=3))
    url = f"memory://{uuid4().hex}/shards"
    manifest = pack(items, url, Pack(num=3))
    assert {name: place(url).read(name) for name in place(url).names()} == bytes_of(tmp_path)
    assert manifest.members(2)["mp4"].read() == read_manifest(tmp_path).members(2)["mp4"].read()
    pack(items[:2], url)
    assert place(url).names() == ["clips-000000.tar", "manifest.parquet"]


def test_size_cuts_shards(items: list[Item]) -> None:
    sizes = [item.files["media"].stat().st_size for item in sorted(items, key=lambda item: item.id)]
    groups = list(Pack(bytes=sizes[0] + sizes[1]).groups(items))
    assert len(groups[0]) == 2
    assert sum(map(len, groups)) == len(items)
    assert all(
        sum(item.files["media"].stat().st_size for item in group) <= sizes[0] + sizes[1] or len(group) == 1
        for group in groups
    )


def test_what_cannot_be_packed(items: list[Item], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is there twice"):
        pack([items[0], items[0]], tmp_path)
    with pytest.raises(ConfigError, match="there is no item to pack"):
        publish([], tmp_path)
    with pytest.raises(Poison, match="has no file view or media to pack, only traces"):
        pack([Item({"traces": items[0].files["media"]}, {}, {"traces": "0"})], tmp_path)
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"not a film")
    with pytest.raises(Poison, match="is not a media file"):
        pack([committed(broken)], tmp_path)
    with pytest.raises(ConfigError, match="holds no shards"):
        read_manifest(tmp_path / "nowhere")


def test_a_picture_of_24000_1001(tmp_path: Path) -> None:
    scene, _ = stream_item(5, 0)
    clip = render(scene, size=32, fps=Fraction(24000, 1001), num_frames=24).clip
    manifest = pack([committed(clip.save(tmp_path / "a.mp4"))], tmp_path / "s")
    assert manifest.texts("fps") == ["24000/1001"]
    assert manifest.numbers("video_seconds")[0] == pytest.approx(1.001, abs=1e-3)


@pytest.mark.slow
@pytest.mark.usefixtures("s3")
def test_s3_by_a_real_server(items: list[Item], tmp_path: Path) -> None:
    filesystem("s3://packed")[0].mkdir("packed")
    url = "s3://packed/set/shards"
    with pytest.raises(ConfigError, match="holds no shards"):
        read_manifest(url)
    pack(items, tmp_path, Pack(num=3))
    pack(items, url, Pack(num=3))
    assert {name: place(url).read(name) for name in place(url).names()} == bytes_of(tmp_path)
    assert validate(url, decoded=2).whole
    source, here = (Shards(str(where)).build(SHAPE) for where in (url, tmp_path))
    one, two = source.window(0).read(), here.window(0).read()
    assert np.array_equal(one.frames, two.frames)
    assert np.array_equal(one.wave, two.wave)
    pack(items[:2], url)
    assert place(url).names() == ["clips-000000.tar", "manifest.parquet"]
