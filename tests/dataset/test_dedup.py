"""One of each clip stays: known again after re-encoding, scaling, cropping and shifting; unlike clips stay apart."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from soundstage.data.dedup import Dedup
from soundstage.data.flow import Drop, Item
from soundstage.data.scan import Scan
from soundstage.media.clip import Clip
from soundstage.media.encode import write
from soundstage.media.frames import resize
from soundstage.world.render import render, stream_item


def world(index: int, kind: str = "bounce") -> Clip:
    return render(stream_item(4, index, kinds=[kind])[0], size=96, fps=24, num_frames=60).clip


def scanned(clip: Clip, folder: Path, name: str, **options: object) -> Item:
    path = write(clip, folder / f"{name}.mp4", **options)
    (folder / name).mkdir()
    (item,) = Scan()(Item({"media": path}, {"name": name}, {"media": name}), folder / name)
    return replace(item, digests={"media": name, "traces": f"traces of {name}"})


def names(items: list[Item], **options: object) -> list[set[str]]:
    return sorted(({item.facts["name"] for item in group} for group in Dedup(**options).groups(items)), key=min)


def changed(clip: Clip) -> dict[str, Clip]:
    size = clip.frames.shape[1:3]
    inner = clip.frames[:, 3:-3, 3:-3]
    return {
        "scaled": replace(clip, frames=resize(clip.frames, (160, 160))),
        "cropped": replace(clip, frames=resize(inner, size)),
        "shifted": Clip(clip.frames[10:], clip.fps, clip.wave[:, round(10 * 16_000 / 24) :], 16_000),
        "quieter": replace(clip, wave=0.4 * clip.wave),
        "slower": Clip(clip.frames[::2], Fraction(12), clip.wave, 16_000),
    }


def test_a_clip_is_known_again(tmp_path: Path) -> None:
    clip = world(0)
    items = [scanned(clip, tmp_path, "original"), scanned(clip, tmp_path, "again", crf=33)]
    items += [scanned(other, tmp_path, name) for name, other in changed(clip).items()]
    assert names(items) == [{item.facts["name"] for item in items}]


def test_unlike_clips_stay_apart(tmp_path: Path) -> None:
    kinds = ("bounce", "drums", "talker", "typing")
    items = [scanned(world(n, kind), tmp_path, f"{kind}{n}") for kind in kinds for n in range(2)]
    assert names(items) == sorted(({item.facts["name"]} for item in items), key=min)


def test_the_keeper_is_the_best_and_does_not_depend_on_the_order(tmp_path: Path) -> None:
    clip = world(1)
    items = [scanned(clip, tmp_path, "b"), scanned(clip, tmp_path, "a")]
    items.append(scanned(changed(clip)["scaled"], tmp_path, "large"))
    items.append(scanned(world(2), tmp_path, "other"))
    for order in (items, items[::-1]):
        out = [each for group in Dedup().groups(order) for each in Dedup().gather(group, tmp_path)]
        kept = {item.facts["name"] for item in out if isinstance(item, Item)}
        dropped = {drop.item.facts["name"]: drop for drop in out if isinstance(drop, Drop)}
        assert kept == {"large", "other"}
        assert set(dropped) == {"a", "b"}
        assert {(d.reason, d.item.facts["duplicate_of"]) for d in dropped.values()} == {("duplicate", "large")}


def test_the_same_bytes_and_near_embeddings(tmp_path: Path) -> None:
    rng, items = np.random.default_rng(0), []
    vectors = rng.normal(size=(3, 8))
    vectors[1] = vectors[0] + 0.01
    for n, x in enumerate(vectors / np.linalg.norm(vectors, axis=1, keepdims=True)):
        np.save(tmp_path / f"{n}.npy", x.astype(np.float32))
        items.append(Item({"embedding:look": tmp_path / f"{n}.npy"}, {"name": str(n), "url": str(n)}, {"media": "x"}))
    apart = [replace(item, digests={"media": item.facts["name"]}) for item in items]
    assert names(apart) == [{"0"}, {"1"}, {"2"}]
    assert names(apart, embedding="look") == [{"0", "1"}, {"2"}]
    assert names(items) == [{"0", "1", "2"}]
    spans = [replace(item, facts=item.facts | {"span": [n, n + 1]}) for n, item in enumerate(items)]
    assert names(spans) == [{"0"}, {"1"}, {"2"}]


@pytest.mark.parametrize("group", [0, 1])
def test_items_without_prints_are_left_alone(group: int) -> None:
    items = [Item(facts={"name": str(n)}) for n in range(group + 1)]
    assert len(names(items)) == group + 1
