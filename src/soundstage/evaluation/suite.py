"""The suite "world": clips for prompts that training never draws, scored by the oracle beside what bounds them.

Rows: the subject (a model, or a folder of clips), the subject with the sound of another clip of its kind and with no
sound, a model given the true sound (a2v) or the true picture (v2a), a model on held-out cells, and real clips, as
rendered and with another's sound. Every clip's scores are appended to `scores.jsonl` and skipped when run again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from soundstage.core.errors import RequestError
from soundstage.evaluation.features import describe
from soundstage.evaluation.metric import Metric
from soundstage.evaluation.oracle import Oracle
from soundstage.inference.fitting import canvas
from soundstage.inference.generator import Generator, read_record
from soundstage.media.clip import Clip

SEED_OFFSET = 7_000_000_000  # of the evaluation streams; training seeds are small numbers
HELD_OUT = 4  # one held-out prompt for this many others
PER_BLOCK = 2  # items of each kind made, scored and written at once
REAL, REAL_SHUFFLED = "real clips", "real clips, shuffled sound"
TASKS = ("t2av", "a2v", "v2a")

Record = dict[str, Any]
Rows = Iterator[tuple[str, "Item", Clip]]


@dataclass(frozen=True, eq=False)
class Item:
    """One prompt and the truth it came from; path: the clip to be read in its place, where there is one."""

    id: str
    index: int
    kind: str
    caption: str
    scene: Any
    path: Path | None = None

    @property
    def wanted(self) -> str | Mapping[str, object]:
        """What the oracle scores against: the scene's fields, or for a clip of unknown origin its caption."""
        return self.caption if self.path else self.scene.fields


@dataclass(frozen=True)
class Format:
    """Size, rate and length of the real clips, those of the subject."""

    size: int = 64
    fps: Fraction = Fraction(16)
    num_frames: int = 33
    sample_rate: int = 16000

    @classmethod
    def of(cls, generator: Generator | None) -> Format:
        """The format of what a model makes; raises RequestError where the world cannot be rendered like it."""
        if generator is None:
            return cls()
        to = canvas(generator.system)
        if to.size[0] != to.size[1] or not 16 <= to.size[0] <= 256 or not to.num_frames or not to.num_samples:
            raise RequestError(
                f"model {generator.system.name}: makes {to.size[0]} x {to.size[1]} pixels and "
                f"{to.num_samples} samples; the world needs a square of 16 to 256 pixels, and sound"
            )
        return cls(to.size[0], to.fps, to.num_frames, to.sample_rate)

    def render(self, item: Item) -> Clip:
        """The real clip of an item."""
        from soundstage.world import render

        return render(item.scene, **vars(self)).clip


def stream_items(num: int, seed: int = 0, kinds: Sequence[str] | None = None, *, holdout: bool = False) -> list[Item]:
    """The first `num` items of the evaluation stream, kinds in turn, so that more items begin with the same ones.

    holdout: of the (material, size, colour) cells that training never sees; the others are in seen cells, with
    scenes that training never draws.
    """
    from soundstage.world import KINDS, stream_item
    from soundstage.world.spec import HOLDOUT_KINDS

    allowed = HOLDOUT_KINDS if holdout else KINDS
    chosen = [kind for kind in (KINDS if kinds is None else kinds) if holdout is False or kind in allowed]
    unknown = [kind for kind in chosen if kind not in KINDS]
    if unknown:
        raise RequestError(f"kinds: {unknown[0]!r} is not one of {', '.join(KINDS)}")
    made = []
    for index in range(num if chosen else 0):
        kind = chosen[index % len(chosen)]
        scene, caption = stream_item(SEED_OFFSET + 2 * seed + holdout, index, kinds=(kind,), holdout=holdout)
        made.append(Item(f"{'held-' if holdout else ''}{index:05d}", index, kind, caption, scene))
    return made


def folder_items(folder: Path, num: int | None, seed: int = 0, kinds: Sequence[str] | None = None) -> list[Item]:
    """The clips of a folder, each with its caption in a .txt beside it or in its own tags, by name.

    Raises RequestError for a folder without clips, a clip without caption, or a caption that names no kind.
    """
    from soundstage.world import parse, stream_item

    if not folder.is_dir():
        raise RequestError(f"clips: {folder} is not a folder; give one of clips with a .txt caption beside each")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".mp4", ".webm", ".mkv", ".mov"))
    made: list[Item] = []
    for index, path in enumerate(paths):
        caption = _caption(path)
        kind = str(parse(caption).get("kind", ""))
        if not kind:
            raise RequestError(f"{path}: its caption {caption!r} names no kind of the world; mend or remove it")
        if kinds is None or kind in kinds:
            scene, _ = stream_item(SEED_OFFSET + 2 * seed, index, kinds=(kind,))
            made.append(Item(path.stem, index, kind, caption, scene, path))
    if not made:
        raise RequestError(f"clips: {folder} holds no mp4, webm, mkv or mov of these kinds; give another folder")
    return made[:num]


def _caption(path: Path) -> str:
    from soundstage.media.probe import probe

    beside = path.with_suffix(".txt")
    if beside.is_file():
        return beside.read_text(encoding="utf-8").strip()
    prompt = read_record(probe(path).metadata).get("prompt")
    if not isinstance(prompt, str):
        raise RequestError(f"{path}: has no caption; write one into {beside.name} beside it")
    return prompt


def run(
    items: Sequence[Item],
    out: Path,
    *,
    generator: Generator | None = None,
    held_out: Sequence[Item] = (),
    tasks: Sequence[str] = TASKS,
    seed: int = 0,
    to: Format | None = None,
    request: Mapping[str, Any] | None = None,
    metric: Metric | None = None,
    on_item: Callable[[int, int], None] | None = None,
) -> list[Record]:
    """Score every row over the items; with no generator and no paths, the real rows alone.

    tasks: of the generator, any of t2av, a2v, v2a. seed: item i is generated with 100 000 seed + i. request: further
    arguments of Generator.generate (steps, guidance, sampler). Records hold row, id, kind, caption, scores, features.
    """
    metric = Oracle() if metric is None else metric
    for task in tasks:
        if task not in TASKS:
            raise RequestError(f"tasks: {task!r} is not one of {', '.join(TASKS)}")
    maker = _Maker(generator, tuple(tasks), seed, to or Format(), dict(request or {}))
    out.mkdir(parents=True, exist_ok=True)
    path = out / "scores.jsonl"
    records = read_records(path)
    done = {(record["row"], record["id"]) for record in records}
    blocks = _blocks(items, 1 if generator is None else PER_BLOCK) + _blocks(held_out, PER_BLOCK)
    wanted = {item.id for item in (*items, *held_out)}
    total, seen = sum(len(block) for block in blocks), 0
    with path.open("a", encoding="utf-8") as file:
        for block in blocks:
            planned = {(row, item.id) for row, item in maker.planned(block)}
            for row, item, clip in maker.rows(block) if planned - done else ():
                if (row, item.id) in done:
                    continue
                records.append(_record(row, item, clip, metric))
                file.write(json.dumps(records[-1]) + "\n")
                file.flush()
            seen += len(block)
            if on_item is not None:
                on_item(seen, total)
    return [record for record in records if record["id"] in wanted]


def claim(out: Path, settings: Mapping[str, Any]) -> None:
    """Make a folder for the scores of these settings, or find it so; raises RequestError when it holds others."""
    path = out / "settings.json"
    out.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        path.write_text(json.dumps(dict(settings), indent=1) + "\n", encoding="utf-8")
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    other = [name for name in {**before, **settings} if before.get(name) != settings.get(name)]
    if other:
        name = other[0]
        raise RequestError(
            f"out: {out} holds scores with {name} {before.get(name)!r}, not {settings.get(name)!r}; "
            "choose another folder with --out"
        )


def read_records(path: Path) -> list[Record]:
    """Records of a file of JSON lines; a last line cut short by an interruption is dropped."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    return [json.loads(line) for line in whole.splitlines()]


def _record(row: str, item: Item, clip: Clip, metric: Metric) -> Record:
    measured = metric(clip, item.wanted).items()
    scores = {key: round(float(value), 6) for key, value in measured if np.isfinite(value)}
    features = [round(float(value), 5) for value in describe(clip)]
    return {
        "row": row,
        "id": item.id,
        "kind": item.kind,
        "caption": item.caption,
        "scores": scores,
        "features": features,
    }


def _blocks(items: Sequence[Item], per_kind: int) -> list[list[Item]]:
    """Items in blocks that hold several of each kind, so that sounds can be exchanged within a block."""
    size = max(2, per_kind) * max(1, len({item.kind for item in items}))
    return [list(items[i : i + size]) for i in range(0, len(items), size)]


@dataclass(frozen=True, eq=False)
class _Maker:
    """Makes the clips of every row of a block."""

    generator: Generator | None
    tasks: tuple[str, ...]
    seed: int
    to: Format
    request: dict[str, Any]

    def planned(self, block: Sequence[Item]) -> Iterator[tuple[str, Item]]:
        """(row, item) of everything `rows` would make, without making it."""
        partners = _partners(block)
        for name, mixed, _ in self._subject_rows(block):
            for item, partner in zip(block, partners, strict=True):
                if not mixed or partner is not None:
                    yield name, item

    def rows(self, block: Sequence[Item]) -> Rows:
        """(row, item, clip), real clips first."""
        partners = _partners(block)
        made: dict[str, list[Clip]] = {}
        for name, mixed, source in self._subject_rows(block):
            if source not in made:
                made[source] = self._clips(source, block, made)
            clips = made[source]
            for item, clip, partner in zip(block, clips, partners, strict=True):
                if name.endswith("no sound"):
                    yield name, item, silenced(clip)
                elif not mixed:
                    yield name, item, clip
                elif partner is not None:
                    yield name, item, with_sound(clip, clips[partner])

    def _subject_rows(self, block: Sequence[Item]) -> list[tuple[str, bool, str]]:
        """(row, whether sounds are exchanged, which clips)."""
        if block[0].id.startswith("held-"):
            return [("model, held-out cells", False, "t2av")] if "t2av" in self.tasks else []
        rows = [(REAL, False, "real"), (REAL_SHUFFLED, True, "real")]
        subject = "clips" if block[0].path else "model" if self.generator else None
        if subject == "clips" or (subject and "t2av" in self.tasks):
            source = "clips" if subject == "clips" else "t2av"
            rows += [
                (subject, False, source),
                (f"{subject}, shuffled sound", True, source),
                (f"{subject}, no sound", False, source),
            ]
        elif subject is None:
            rows.append(("real clips, no sound", False, "real"))
        if subject == "model":
            rows += [(f"model, {task}", False, task) for task in ("a2v", "v2a") if task in self.tasks]
        return rows

    def _clips(self, source: str, block: Sequence[Item], made: dict[str, list[Clip]]) -> list[Clip]:
        if source == "real":
            return [self.to.render(item) for item in block]
        if source == "clips":
            from soundstage.media.decode import read

            return [read(item.path) for item in block]
        real = made["real"] if "real" in made else [self.to.render(item) for item in block]
        given: dict[str, Any] = {}
        if source == "a2v":
            given["audio"] = [clip.without("video") for clip in real]
        if source == "v2a":
            given["video"] = [clip.without("audio") for clip in real]
        seeds = [100_000 * self.seed + item.index for item in block]
        prompts = [item.caption for item in block]
        assert self.generator is not None
        made_clips = self.generator.generate(prompts, seed=seeds, task=source, **given, **self.request)
        return [generated.clip for generated in made_clips]


def _partners(block: Sequence[Item]) -> list[int | None]:
    """For each item the next of its kind in the block (in a circle), whose sound it is given; None when alone."""
    by_kind: dict[str, list[int]] = {}
    for i, item in enumerate(block):
        by_kind.setdefault(item.kind, []).append(i)
    partners: list[int | None] = [None] * len(block)
    for members in by_kind.values():
        for here, following in zip(members, members[1:] + members[:1], strict=True):
            partners[here] = following if following != here else None
    return partners


def with_sound(clip: Clip, other: Clip) -> Clip:
    """The clip with the sound of another."""
    return replace(clip, wave=other.wave, sample_rate=other.sample_rate)


def silenced(clip: Clip) -> Clip:
    """The clip with a sound of zeros."""
    rate = clip.sample_rate or 16000
    return replace(clip, wave=np.zeros((1, round(clip.duration * rate)), np.float32), sample_rate=rate)
