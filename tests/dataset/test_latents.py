from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from soundstage.core.errors import ConfigError
from soundstage.data import latents
from soundstage.data.batching import Order
from soundstage.data.clips import Clips
from soundstage.data.latent_cache import LatentCache
from soundstage.data.latents import Latents
from soundstage.data.records import ClipShape
from soundstage.media.clip import Clip
from soundstage.testing.records import MeanCodec, Ramps, RampSource, tokenize

SHAPE = ClipShape(num_frames=4, size=(16, 16), num_samples=4000)


def data(tmp_path: Path, **changes: Any) -> Latents:  # noqa: ANN401
    settings = {"num": 10, "cache": str(tmp_path), "batch_size": 3, "shape": SHAPE, **changes}
    return Latents(Ramps(), MeanCodec(), tokenize, **settings)


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latents, "SHARD", 4)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Indices of the clips that were read from the source."""
    seen: list[int] = []
    item = RampSource.item

    def note(self: RampSource, index: int) -> Any:  # noqa: ANN401
        seen.append(index)
        return item(self, index)

    monkeypatch.setattr(RampSource, "item", note)
    return seen


def test_an_order_holds_every_index_once_per_epoch() -> None:
    order = Order(10, seed=3)
    epochs = order.take(0, 30).reshape(3, 10)
    assert torch.equal(epochs.sort(1).values, torch.arange(10).expand(3, 10))
    assert not torch.equal(epochs[0], epochs[1])
    assert torch.equal(Order(10, seed=3).take(7, 6), epochs.flatten()[7:13])
    assert not torch.equal(Order(10, seed=4).take(0, 10), epochs[0])


def test_a_batch_is_a_function_of_the_step(tmp_path: Path) -> None:
    pool, again = data(tmp_path).build(), data(tmp_path).build()
    for step in (5, 0, 2):
        one, two = pool.batch(step, 4), again.batch(step, 4)
        assert one.ids == two.ids
        assert torch.equal(one.x0["video"], two.x0["video"])
    seen = [name for step in range(5) for name in pool.batch(step, 2).ids]
    assert sorted(seen, key=int) == [str(i) for i in range(10)]


def test_latents_captions_and_ids_belong_together(tmp_path: Path, small_shards: None) -> None:
    del small_shards
    batch = data(tmp_path).build().batch(0, 10)
    assert batch.x0["video"].shape == (10, 3, 4, 2, 2)
    assert batch.x0["audio"].shape == (10, 1, 4)
    assert batch.x0["video"].dtype == torch.float32
    assert batch.cond.text is not None
    for i, name in enumerate(batch.ids):
        assert float(batch.x0["audio"][i].mean()) == pytest.approx(int(name) / 16)
        assert bytes(batch.cond.text["video"][i].tolist()).rstrip(b"\0").decode() == f"level {name}"


def test_the_cache_is_used_and_grows(tmp_path: Path, small_shards: None, reads: list[int]) -> None:
    del small_shards
    data(tmp_path, num=8).build()
    assert reads == list(range(8))
    data(tmp_path, num=8).build()
    assert reads == list(range(8))
    pool = data(tmp_path, num=11).build()
    assert reads[8:] == [8, 9, 10]
    assert len(pool) == 11
    assert len(data(tmp_path, num=5).build()) == 5
    assert len(reads) == 11


def test_another_codec_or_shape_has_its_own_cache(tmp_path: Path, reads: list[int]) -> None:
    data(tmp_path, num=2).build()
    data(tmp_path, num=2, shape=replace(SHAPE, num_frames=8)).build()
    assert reads == [0, 1, 0, 1]
    one, two = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    assert latents.fingerprint(one) != latents.fingerprint(two)
    two.load_state_dict(one.state_dict())
    assert latents.fingerprint(one) == latents.fingerprint(two)


def test_a_killed_encoding_goes_on_where_it_was(tmp_path: Path, small_shards: None, reads: list[int]) -> None:
    del small_shards

    class Killed(BaseException):
        pass

    def kill(done: int, total: int) -> None:
        del total
        if done > 8:
            raise Killed

    with pytest.raises(Killed):
        data(tmp_path).prepare(kill)
    reads.clear()
    assert len(data(tmp_path).build()) == 10
    assert reads == [8, 9]
    damaged = sorted(tmp_path.rglob("clips-*.safetensors"))[0]
    damaged.write_bytes(damaged.read_bytes()[:50])
    reads.clear()
    whole = data(tmp_path).build()
    assert tuple(reads) in {(0, 1, 2, 3), (4, 5, 6, 7), (8, 9)}
    assert [float(whole.batch(0, 10).x0["audio"][i].mean() * 16) for i in range(10)] == pytest.approx(
        [int(name) for name in whole.batch(0, 10).ids], abs=0.01
    )


def test_progress_reaches_the_end(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    data(tmp_path).prepare(lambda done, total: told.append((done, total)))
    assert told == [(3, 10), (6, 10), (9, 10), (10, 10)]
    told.clear()
    data(tmp_path).prepare(lambda done, total: told.append((done, total)))
    assert told == [(10, 10)]


def test_an_endless_source_needs_a_number(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.num: an endless source needs a number"):
        data(tmp_path, num=None).build()
    assert len(replace(data(tmp_path, num=None), source=Ramps(size=6)).build()) == 6


def test_a_folder_takes_the_place_of_the_source(tmp_path: Path) -> None:
    found = data(tmp_path).parse("folder:some/clips")
    assert found.source.path == "some/clips"  # type: ignore[attr-defined]
    assert found.num is None
    assert found.codec == MeanCodec()
    with pytest.raises(ConfigError, match=r"'clips' is not folder:PATH"):
        data(tmp_path).parse("clips")


def test_media_batches_for_codecs() -> None:
    stream = Clips(Ramps(), SHAPE).build()
    batch = stream.batch(3, 4)
    assert batch.ids == ("12", "13", "14", "15")
    assert batch.x0["video"].shape == (4, 3, 4, 16, 16)
    assert batch.x0["audio"].shape == (4, 1, 4000)
    finite = Clips(Ramps(size=5), SHAPE, modalities=("video",), hold=5).build()
    names = [name for step in range(5) for name in finite.batch(step, 1).ids]
    assert sorted(names) == ["0", "1", "2", "3", "4"]
    first, second = (finite.batch(step, 5) for step in (0, 0))
    assert first.x0.modalities == ("video",)
    assert torch.equal(first.x0["video"], second.x0["video"])


def test_the_cache_holds_safetensors_alone(tmp_path: Path) -> None:
    cache, keys = data(tmp_path).prepare()
    assert {file.suffix for file in tmp_path.rglob("*") if file.is_file()} == {".safetensors"}
    assert all(key in LatentCache(cache.folder) for key in keys)


def test_a_pool_too_large_for_memory_reads_from_the_disk(tmp_path: Path) -> None:
    held, read = data(tmp_path).build(), data(tmp_path, hold=0).build()
    for step in range(3):
        one, two = held.batch(step, 4), read.batch(step, 4)
        assert one.ids == two.ids
        assert torch.equal(one.x0["video"], two.x0["video"])
        assert torch.equal(one.x0["audio"], two.x0["audio"])


def test_what_is_encoded_is_known_by_content(tmp_path: Path) -> None:
    """A clip that moves to another source, or gets other words, is not encoded again."""
    from soundstage.data.folder import Folder, FolderSource

    seen: list[str] = []
    window = FolderSource.window

    def note(self: FolderSource, index: int) -> Any:  # noqa: ANN401
        seen.append(self.words(index)[1])
        return window(self, index)

    shape = ClipShape(fps=8, size=(16, 16), num_frames=8, sample_rate=16000)
    frames = [np.full((8, 16, 16, 3), level, np.uint8) for level in (0, 100, 200)]
    wave = np.zeros((1, 16000), np.float32)
    for name, picture in zip("abc", frames, strict=True):
        Clip(picture, Fraction(8), wave, 16000).save(tmp_path / "one" / f"{name}.mp4")

    def pool(folder: str) -> Any:  # noqa: ANN401
        source = Folder(str(tmp_path / folder))
        return Latents(source, MeanCodec(), tokenize, shape, cache=str(tmp_path / "cache")).build()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FolderSource, "window", note)
        pool("one")
        assert seen == ["a@0s", "b@0s", "c@0s"]
        (tmp_path / "two").mkdir()
        (tmp_path / "two" / "renamed.mp4").write_bytes((tmp_path / "one" / "b.mp4").read_bytes())
        (tmp_path / "two" / "renamed.txt").write_text("other words")
        Clip(frames[0], Fraction(8), wave + 0.5, 16000).save(tmp_path / "two" / "new.mp4")
        found = pool("two")
        assert seen[3:] == ["new@0s"]
        assert (found.captions, found.ids) == (["", "other words"], ["new@0s", "renamed@0s"])
