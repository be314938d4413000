from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path
from uuid import uuid4

import numpy as np
import pytest
import torch
from torch import Tensor

from soundstage.core.errors import Caution, ConfigError
from soundstage.data import places
from soundstage.data.buckets import Buckets
from soundstage.data.clips import Clips
from soundstage.data.flow import Item
from soundstage.data.latents import Latents
from soundstage.data.mixture import Mixture
from soundstage.data.reading import Raw, Shards, source_of
from soundstage.data.records import ClipShape, media_of
from soundstage.data.shards import Pack, pack
from soundstage.data.workers import ReaderDied
from soundstage.media import decode
from soundstage.media.clip import Clip
from soundstage.testing.records import MeanCodec, tokenize

pytest.importorskip("pyarrow")

SHAPE = ClipShape(fps=8, size=(16, 16), num_frames=8, sample_rate=16000)


def clip(seconds: float, size: tuple[int, int] = (32, 64), *, sound: bool = True, level: int = 0) -> Clip:
    """Frames whose brightness is the time, and a tone that grows louder."""
    count, samples = round(seconds * 8), round(seconds * 16000)
    frames = np.stack([np.full((*size, 3), min(255, level + 8 * i), np.uint8) for i in range(count)])
    wave = (np.linspace(0, 0.8, samples) * np.sin(np.arange(samples) * 0.2))[None].astype(np.float32)
    return Clip(frames, Fraction(8), wave if sound else None, 16000 if sound else None)


def committed(path: Path, **facts: object) -> Item:
    return Item({"media": path}, facts, {"media": hashlib.sha256(path.read_bytes()).hexdigest()})


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("shards")
    items = [
        committed(clip(3.5).save(folder / "a.mp4"), caption="wide", category="music"),
        committed(clip(1.0, (64, 32), level=100).save(folder / "b.mp4"), caption="tall", category="speech"),
        committed(clip(2.0, (48, 48), level=50).save(folder / "c.mp4"), caption="square", category="music"),
    ]
    pack(items, folder / "shards", Pack(num=2))
    return str(folder / "shards")


def test_a_range_of_a_member_is_the_range_of_the_file(shards: str) -> None:
    source = Shards(shards).build(SHAPE)
    assert source.size == 6
    for index in range(6):
        window = source.window(index)
        raw = window.read()
        whole = decode.read(window.film, fps=8, size=window.cover)
        first = round(window.start * 8)
        top, left = (whole.frames.shape[1] - 16) // 2, (whole.frames.shape[2] - 16) // 2
        wanted = whole.frames[first : first + 8, top : top + 16, left : left + 16]
        assert np.array_equal(raw.frames, wanted)
        sound = decode.read(window.sound, video=False).wave
        assert np.array_equal(raw.wave, sound[:, first * 2000 : first * 2000 + 16000])
        sample = source.item(index)
        assert sample.media["video"].shape == (3, 8, 16, 16)
        assert torch.equal(sample.media["audio"], torch.from_numpy(raw.wave))
        assert (sample.caption, sample.id) == source.words(index)
    levels = {source.words(i): float(source.item(i).media["video"].mean()) for i in range(6)}
    wide = sorted((name, level) for (caption, name), level in levels.items() if caption == "wide")
    assert [level for _, level in wide] == sorted(level for _, level in wide)


def test_only_the_range_is_read_from_a_long_member(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 255, (320, 64, 64, 3), np.uint8)
    film = Clip(frames, Fraction(8)).save(tmp_path / "noise.mp4", crf=10)
    pack([committed(film)], tmp_path / "s")
    monkeypatch.setattr(places.Local, "small", 2**16)
    monkeypatch.setattr(places, "AHEAD", 2**15)
    monkeypatch.setattr("soundstage.media.probe.BUFFER", 2**14)
    source = Shards(str(tmp_path / "s"), modalities=("video",)).build(SHAPE)
    read: list[int] = []
    original = places.Local.read

    def note(self: places.Local, name: str, offset: int = 0, size: int | None = None) -> bytes:
        read.append(size or 0)
        return original(self, name, offset, size)

    monkeypatch.setattr(places.Local, "read", note)
    raw = source.window(20).read()
    whole = decode.read(film, start=20, end=21, fps=8, size=(16, 16))
    assert np.array_equal(raw.frames, whole.frames)
    # 2 s of key-frame distance and what is read ahead, of 40 s
    assert sum(read) < film.stat().st_size / 4


def test_shards_from_a_store(shards: str) -> None:
    pytest.importorskip("fsspec")
    target = places.place(f"memory://{uuid4().hex}")
    for name in places.place(shards).names():
        target.write(name, places.place(shards).read(name))
    here, there = Shards(shards).build(SHAPE), Shards(target.url).build(SHAPE)
    assert here.key != "" and here.manifest.key == there.manifest.key
    assert [here.digest(i) for i in range(6)] == [there.digest(i) for i in range(6)]
    assert torch.equal(here.item(3).media["video"], there.item(3).media["video"])


def test_which_clips(shards: str) -> None:
    with pytest.warns(Caution, match="of 3 clips, 0 lack video or audio and 1 are shorter than 2 s"):
        long = Shards(shards).build(ClipShape(fps=8, size=(16, 16), num_frames=16))
    assert [long.words(i)[0] for i in range(long.size or 0)].count("wide") == 1
    assert Shards(shards, hop=0.5).build(SHAPE).size == 6 + 1 + 3
    pytest.importorskip("duckdb")
    assert Shards(shards, where="category = 'speech'").build(SHAPE).size == 1
    with pytest.raises(ConfigError, match="where: 'categry = 1' cannot be asked"):
        Shards(shards, where="categry = 1").build(SHAPE)
    with (
        pytest.warns(Caution, match="3 are shorter than 9 s"),
        pytest.raises(ConfigError, match=r"none of 3 clips in .* gives a window of 9 s"),
    ):
        Shards(shards).build(ClipShape(fps=8, num_frames=72))


def test_buckets_and_shares_from_a_manifest(shards: str, tmp_path: Path) -> None:
    buckets = Buckets(("2:1", "1:1", "1:2"), (1.0, 2.0), area=16 * 16, spatial=8, temporal=1)
    config = Clips(
        Shards(shards, buckets=buckets), SHAPE, hold=9, mixture=Mixture({"music": 3, "speech": 1}, {"0+": 1})
    )
    stream, source = config.build(), config.source.build(SHAPE)
    words = {name: caption for caption, name in map(source.words, range(source.size))}
    shapes, drawn = set(), []
    for step in range(40):
        batch = stream.batch(step, 4)
        shapes.add(tuple(batch.x0["video"].shape[1:]))
        drawn += batch.ids
    assert shapes == {(3, 16, 8, 24), (3, 8, 24, 8), (3, 16, 16, 16)}
    tall = sum(words[name] == "tall" for name in drawn)
    assert tall / len(drawn) == pytest.approx(1 / 4, abs=0.03)
    two = Latents(
        Shards(shards, buckets=buckets), MeanCodec(), tokenize, SHAPE, cache=str(tmp_path), mixture=config.mixture
    ).build()
    assert [two.batch(step, 4).ids for step in range(9)] == [stream.batch(step, 4).ids for step in range(9)]


def test_workers_give_the_same_batches(shards: str) -> None:
    alone = Clips(Shards(shards), SHAPE).build()
    helped = Clips(Shards(shards), SHAPE, workers=1, memory=100_000).build()
    try:
        for step in (0, 1, 2, 7):
            one, two = alone.batch(step, 4), helped.batch(step, 4)
            assert one.ids == two.ids
            assert torch.equal(one.x0["video"], two.x0["video"])
            assert torch.equal(one.x0["audio"], two.x0["audio"])
        halves = [helped.batch(9, 4, part, 2) for part in range(2)]
        assert halves[0].ids + halves[1].ids == alone.batch(9, 4).ids
    finally:
        helped.close()


def test_a_killed_worker_is_told(shards: str) -> None:
    stream = Clips(Shards(shards), SHAPE, workers=1).build()
    stream.batch(0, 1)
    readers = stream._reading._readers
    os.kill(next(iter(readers._pool._processes)), signal.SIGKILL)
    with pytest.raises(ReaderDied, match=r"a worker was killed while it read one of [0-9a-f]{32}@"):
        for step in range(1, 9):
            stream.batch(step, 4)
    stream.close()


def test_workers_do_not_outlive_their_run(shards: str) -> None:
    script = (
        "import os, signal; from soundstage.data.workers import Readers; from soundstage.data.reading import Shards;"
        "from soundstage.data.shapes import ClipShape\n"
        "if __name__ == '__main__':\n"
        f"    source = Shards({shards!r}).build(ClipShape(fps=8, size=(16, 16), num_frames=8))\n"
        "    readers = Readers(1, 10**6, 2 * 10**6)\n"
        "    with readers.take(0, lambda: source.window(0)): pass\n"
        "    print(next(iter(readers._pool._processes)), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    pid = int(done.stdout)
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists():
            return
        time.sleep(0.1)
    raise AssertionError("the worker is still there")


def test_decoding_needs_no_torch(shards: str) -> None:
    script = (
        "import sys; from soundstage.data.reading import Shards; from soundstage.data.shapes import ClipShape;"
        "import soundstage.data.workers;"
        f"source = Shards({shards!r}).build(ClipShape(fps=8, size=(16, 16), num_frames=8));"
        "print(source.window(0).read().frames.shape, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "(8, 16, 16, 3) False"


def test_sources_by_name() -> None:
    assert source_of("shards:s3://bucket/set") == Shards("s3://bucket/set")
    with pytest.raises(ConfigError, match=r"'clips' is not folder:PATH.*or shards:URL"):
        source_of("clips")


def test_a_large_batch_takes_the_memory_of_one_that_is_gone_and_of_no_other() -> None:
    frames = np.arange(60 * 128 * 128 * 3, dtype=np.uint32).astype(np.uint8).reshape(60, 128, 128, 3)

    def batch(add: int) -> Tensor:
        return media_of([Raw(frames + np.uint8(add), None, "", "", 16000)], 1)["video"]

    one = batch(0)
    kept, place = one[0, :, 5:7], one.data_ptr()
    before = kept.clone()
    del one
    two = batch(1)
    assert two.data_ptr() != place and torch.equal(kept, before)
    assert torch.equal(two[0], torch.from_numpy(frames + np.uint8(1)).permute(3, 0, 1, 2).float() / 127.5 - 1)
    again = two.data_ptr()
    del two
    assert batch(2).data_ptr() == again
