"""Curation measured: speed beside its peers, defects found, sync and signal-to-noise against the world's truth.

    python benchmarks/scan.py                    # everything; about an hour of processor time on one core
    python benchmarks/scan.py --only speed       # speed, judge, gates, sync, noise: one part, the others are kept
    python benchmarks/scan.py --clips 10         # of each kind

Speed: the fused scan against PySceneDetect (ContentDetector at its defaults) and a motion filter by Farneback's optical
flow (OpenCV, two frames a second at full size, the defaults of data-juicer), which need scenedetect-headless and
opencv-python-headless. All run in this process on one thread, in turns, and are counted in the processor's own time.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from measure import commit, machine, today

from soundstage.data.gates import LIMITS, judge, report, table
from soundstage.data.scan import measure, scan
from soundstage.media.clip import Clip
from soundstage.media.encode import write
from soundstage.media.streams import streams
from soundstage.testing.spoil import SPOILT, add_noise
from soundstage.world.render import render, stream_item

OUT = Path(__file__).parent / "results" / "scan.json"
KINDS = ("bounce", "metronome", "drums", "engine", "typing", "talker", "roll")
Row = dict[str, Any]


def texture(seed: int, seconds: int = 4) -> Clip:
    """720p at 24 frames a second with stereo sound: a panning texture of many scales, and a square that circles."""
    rng = np.random.default_rng(seed)
    wide = np.zeros((800, 1600, 3), np.float32)
    for cell in (3, 5, 9, 17, 67, 131):
        coarse = rng.normal(size=(800 // cell + 1, 1600 // cell + 1, 3)).astype(np.float32)
        wide += 3 * np.sqrt(cell) * coarse.repeat(cell, axis=0).repeat(cell, axis=1)[:800, :1600]
    canvas = np.clip(wide + 120, 0, 255).astype(np.uint8)
    frames = []
    for n in range(24 * seconds):
        top, left = n % 80, 3 * n % 320
        image = canvas[top : top + 720, left : left + 1280].copy()
        y, x = int(300 + 200 * np.cos(n / 7)), int(580 + 400 * np.sin(n / 10))
        image[y : y + 120, x : x + 120] = (230, 60, 40)
        frames.append(image)
    clock = np.arange(48_000 * seconds) / 48_000
    tones = [np.sin(2 * np.pi * hz * clock) * np.exp(-8 * (clock % 0.5)) for hz in (440, 660)]
    wave = 0.5 * np.stack(tones) + rng.normal(0, 0.003, (2, len(clock)))
    return Clip(np.stack(frames), Fraction(24), wave.astype(np.float32), 48_000)


def camera(kind: str, index: int, stream: int = 11) -> Clip:
    """A clip of the world as of a camera: 480 lines, 24 frames a second, 48 kHz stereo, a room's noise, 3.1 s."""
    scene, _ = stream_item(stream, index, kinds=[kind])
    clip = render(scene, size=240, fps=24, num_frames=75, sample_rate=48_000).clip
    wave = np.concatenate([clip.wave, 0.8 * clip.wave + 0.1 * np.roll(clip.wave, 20, axis=1)])
    wave += np.random.default_rng([stream, index]).normal(0, 5e-4, wave.shape)  # a microphone at -66 dB full scale
    return replace(clip, frames=clip.frames.repeat(2, axis=1).repeat(2, axis=2), wave=wave.astype(np.float32))


def speed(folder: Path, clips: int) -> Row:
    """Processor seconds per 4 s clip of 720p24 with sound, in turns, and the median of the ratios of one round."""
    paths = [write(texture(n), folder / f"{n}.mp4", crf=23, preset="medium", threads=1) for n in range(max(3, clips))]
    tools: dict[str, Callable[[Path], object]] = {"scan": lambda path: measure(scan(path)[0])}
    tools |= {"decode": _decode, "scenedetect": _scenes(), "farneback": _flow()}
    taken: dict[str, list[float]] = {name: [] for name in tools}
    for tool in tools.values():
        tool(paths[0])  # imports and first calls are nobody's
    for path in paths:
        for name, tool in tools.items():
            start = time.process_time()
            tool(path)
            taken[name].append(time.process_time() - start)
    ratios = [(a + b) / c for a, b, c in zip(taken["scenedetect"], taken["farneback"], taken["scan"], strict=True)]
    seconds = {name: round(statistics.median(each), 4) for name, each in taken.items()}
    row = {"clips": len(paths), "seconds": seconds, "ratio": round(statistics.median(ratios), 2)}
    row |= {"fastest": {name: round(min(each), 4) for name, each in taken.items()}}
    return row | {"clips_per_core_second": round(1 / seconds["scan"], 2), "versions": _versions()}


def _decode(path: Path) -> None:
    """What no scan can do without: picture and sound decoded once and thrown away."""
    with streams(path) as opened:
        for _ in opened:
            pass


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("av", "numpy", "scenedetect-headless", "opencv-python-headless")}


def _scenes() -> Callable[[Path], object]:
    from scenedetect import ContentDetector, detect

    return lambda path: detect(str(path), ContentDetector())


def _flow() -> Callable[[Path], float]:
    import cv2

    cv2.setNumThreads(1)

    def mean_motion(path: Path) -> float:
        film = cv2.VideoCapture(str(path))
        step, place, before, found = round(film.get(cv2.CAP_PROP_FPS) / 2), 0, None, []
        while True:
            good, image = film.read()
            if not good:
                film.release()
                return float(np.mean(found))
            grey = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)
            if before is not None:
                field = cv2.calcOpticalFlowFarneback(before, grey, None, 0.5, 3, 15, 3, 5, 1.2, 0)
                found.append(float(np.mean(cv2.cartToPolar(field[..., 0], field[..., 1])[0])))
            before, place = grey, place + step
            film.set(cv2.CAP_PROP_POS_FRAMES, place)

    return mean_motion


def judging(folder: Path, clips: int) -> Row:  # noqa: ARG001
    """Seconds to judge ten thousand scanned clips anew, from their facts as they lie in a ledger (JSON)."""
    clip = camera("bounce", 0)
    facts = measure(scan(write(clip, folder / "a.mp4", threads=1))[0])
    rng, rows = np.random.default_rng(0), []
    for blur in 6 * rng.random(10_000):
        rows.append(json.dumps({**facts, "scan": facts["scan"] | {"blur": blur}}))
    start = time.process_time()
    columns = table(json.loads(row) for row in rows)
    read = time.process_time()
    counted = report(columns, {**LIMITS, "blurred": replace(LIMITS["blurred"], most=2.0)})
    done = time.process_time()
    return {"clips": len(rows), "read_s": round(read - start, 4), "judge_s": round(done - read, 4), "counts": counted}


def gates(folder: Path, clips: int) -> Row:
    """Of defects in all kinds of scenes, how many are rejected; of perfect clips, how many are."""
    good: dict[str, int] = {}
    found = {name: [0, 0, 0] for name in SPOILT}
    false = total = 0
    for kind in KINDS:
        for index in range(clips):
            clip = camera(kind, index)
            reasons = _reasons(clip, folder)
            false, total = false + bool(reasons), total + 1
            for reason in reasons:
                good[reason] = good.get(reason, 0) + 1
            for name, spoil in SPOILT.items():
                # Noise is judged in speech; lag where several events are seen, and not to an even beat.
                if (name == "noisy" and kind != "talker") or (name == "out of sync" and not _bounces(kind, index)):
                    continue
                reasons = _reasons(spoil(clip), folder)
                counts = found[name]
                counts[0], counts[1], counts[2] = (
                    counts[0] + 1,
                    counts[1] + bool(reasons),
                    counts[2] + (name in reasons),
                )
    asked, rejected, named = (sum(counts[n] for counts in found.values()) for n in range(3))
    row = {"perfect": total, "falsely_rejected": false, "by": good, "spoilt": asked}
    row |= {"recall": round(rejected / asked, 4), "recall_by_name": round(named / asked, 4)}
    return row | {
        "kinds": {name: dict(zip(("clips", "rejected", "named"), c, strict=True)) for name, c in found.items()}
    }


def _bounces(kind: str, index: int, stream: int = 11) -> bool:
    """Whether that clip of `camera` shows a ball bounce more than once."""
    return kind == "bounce" and (stream_item(stream, index, kinds=[kind])[0].count or 0) > 1


def _reasons(clip: Clip, folder: Path) -> list[str]:
    path = write(clip, folder / "one.mp4", crf=20, preset="ultrafast", threads=1)
    columns = table([measure(scan(path)[0])])
    return [reason for reason, limit in LIMITS.items() if judge(columns, {reason: limit}).reason[0]]


def sync(folder: Path, clips: int) -> Row:
    """Error of the lag for known shifts, and how well the confidence tells a clip's own sound from another's."""
    errors, sure, own, other = [], [], [], []
    for shift, clip, stranger in _shifted(clips):
        told = scan(write(clip, folder / "a.mp4", threads=1))[0].sync()
        own.append(told["confidence"] if told else 0.0)
        if told:
            errors.append(abs(told["lag_ms"] - shift))
            sure.append(told["confidence"])
        told = scan(write(replace(clip, wave=stranger), folder / "b.mp4", threads=1))[0].sync()
        other.append(told["confidence"] if told else 0.0)
    error, confident = np.array(errors), np.array(sure) >= 0.9
    wins = [(a > b) + 0.5 * (a == b) for a in own for b in other]
    row = {"clips": len(own), "median_ms": round(float(np.median(error)), 2)}
    row |= {"within_50_ms": round(float((error <= 50).mean()), 4), "confident": round(float(confident.mean()), 4)}
    row |= {"confident_within_50_ms": round(float((error[confident] <= 50).mean()), 4)}
    return row | {"auc": round(float(np.mean(wins)), 4), "strangers_confident": float(np.mean(np.array(other) >= 0.9))}


def _shifted(clips: int) -> Iterator[tuple[float, Clip, np.ndarray]]:
    """(true lag in ms, clip, the sound of another clip of the same kind) of bouncing balls."""
    shifts = np.random.default_rng(1).uniform(-300, 300, 10_000)
    scenes = [stream_item(21, n, kinds=["bounce"])[0] for n in range(2 * clips + 40)]
    scenes = [scene for scene in scenes if scene.count and scene.count >= 2][: clips + 1]
    films = [render(scene, size=128, fps=24, num_frames=96).clip for scene in scenes]
    for n, film in enumerate(films[:-1]):
        late = round(shifts[n] * film.sample_rate / 1000)
        wave = np.roll(np.pad(film.wave, ((0, 0), (8_000, 8_000))), late, axis=1)[:, 8_000:-8_000]
        yield 1000 * late / film.sample_rate, replace(film, wave=wave), films[n + 1].wave


def noise(folder: Path, clips: int) -> Row:
    """Error of the estimated signal-to-noise ratio in decibels, in what pauses (speech, struck bodies)."""
    rows = {}
    for kind in ("talker", "bounce"):
        errors = []
        for index in range(clips):
            for snr in (0, 5, 10, 20, 30):
                clip = camera(kind, index, stream=31).without("video")
                clip = replace(clip, wave=0.5 * clip.wave[:1])
                told = measure(scan(write(add_noise(clip, snr, index), folder / "n.flac"))[0])["scan"]
                errors.append(abs(told.get("snr", 99.0) - snr))
        rows[kind] = {"clips": len(errors), "median_db": round(float(np.median(errors)), 3)}
        rows[kind] |= {"largest_db": round(max(errors), 3)}
    return rows


PARTS = {"speed": speed, "judge": judging, "gates": gates, "sync": sync, "noise": noise}


def command(
    only: Annotated[str, typer.Option(help=f"One of {', '.join(PARTS)}; all without.")] = "",
    clips: Annotated[int, typer.Option(help="Of each kind.")] = 6,
    out: Annotated[Path, typer.Option(help="File of the results, JSON.")] = OUT,
) -> None:
    """Measure, and write each part into the file of results when it is done."""
    torch.set_num_threads(1)
    found: Row = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
    for name, part in PARTS.items():
        if only and name != only:
            continue
        with tempfile.TemporaryDirectory() as folder:
            row = part(Path(folder), clips)
        found |= {"date": today(), **commit(), "machine": machine(torch.device("cpu"))}
        found[name] = row
        out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        typer.echo(f"{name}: {json.dumps(row)}")


if __name__ == "__main__":
    typer.run(command)
