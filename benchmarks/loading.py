"""Samples from shards, beside webdataset with PyAV and with torchcodec: same clips, same windows, same core, in turns.

    python benchmarks/loading.py                       # clips of the world at 640 x 360, 8 s each
    python benchmarks/loading.py --clips FOLDER        # those of a folder, 8 s or longer
    python benchmarks/loading.py --table               # only the table of what was measured

A sample is 2 s of picture at the model's size and of sound at its rate, from a random place of each clip. What is
timed is the processor's time of one thread; with workers, the time on the wall, of one after the other in turns, and
the processor's time of all processes. `start` is what a new process takes to its first decoded window, imports
included, with bytecode compiled as an installed package has it. The peers, all with webdataset:

whole             PyAV decodes the clip to RGB, torch scales it down, the window is cut: the usual way
range             the same written with care: PyAV seeks to the window and stops after it, torch scales what is left
torchcodec        torchcodec at its defaults gives the window, torch scales it
torchcodec, care  it seeks without a scan, scales (bilinear), crops and resamples itself

torchcodec needs the shared libraries of FFmpeg 4 to 8; where it cannot be imported it is left out, and a line says so.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from hashlib import file_digest
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from measure import Row, Timer, commit, compare, machine, rows, spread, table, today
from torch import Tensor

from soundstage.core.av import AV
from soundstage.data.clips import EXPECTED, Clips
from soundstage.data.flow import Item
from soundstage.data.reading import Shards, ShardSource, covering
from soundstage.data.records import ClipShape, media_of
from soundstage.data.shards import Pack, pack
from soundstage.media.clip import Clip
from soundstage.media.frames import cover
from soundstage.world import render, stream_item

Decode = Callable[[bytes, Fraction], AV[Tensor]]
"""A film and the second at which the window starts, to a sample."""
Reading = tuple[Callable[[], object], Callable[[], None]]
"""What gives the next batch, and what ends it."""
PEERS = ("av", "webdataset", "torchcodec")
OUT = Path(__file__).parent / "results" / "loading.json"
SHAPE = ClipShape(fps=24, size=(256, 448), num_frames=49, sample_rate=16000, channels=1)
SECONDS, SIZE = 8, (360, 640)
FIRST = """
import sys, time
begin = time.perf_counter()
from soundstage.data.reading import Shards
from soundstage.data.shapes import ClipShape
shape = ClipShape(fps=24, size=(256, 448), num_frames=49, sample_rate=16000, channels=1)
raw = Shards(sys.argv[1]).build(shape).window(0).read()
assert raw.frames.shape == (49, 256, 448, 3) and "torch" not in sys.modules
print(time.perf_counter() - begin)
"""


@dataclass(frozen=True)
class Case:
    """The windows to read: key of the clip and seconds at which each starts."""

    url: str
    urls: tuple[str, ...]
    starts: dict[str, Fraction]


def made(folder: Path, num: int) -> Iterator[Path]:
    """Clips of the world, enlarged."""
    for index in range(num):
        scene, _ = stream_item(21, index)
        clip = render(scene, size=256, fps=24, num_frames=SECONDS * 24, sample_rate=48000).clip
        assert clip.frames is not None
        yield Clip(cover(clip.frames, SIZE), clip.fps, clip.wave, clip.sample_rate).save(folder / f"{index}.mp4")


def prepared(files: Sequence[Path], folder: Path) -> Case:
    """The clips as shards, the sound within the film as the peers expect it."""
    items = []
    for path in files:
        with path.open("rb") as file:
            items.append(Item({"media": path}, {}, {"media": file_digest(file, "sha256").hexdigest()}))
    manifest = pack(items, folder / "shards", Pack(num=max(1, len(files) // 2), sound=None))
    rng = np.random.default_rng(0)
    seconds = np.minimum(manifest.numbers("video_seconds"), manifest.numbers("audio_seconds"))
    starts = {
        key: Fraction(int(rng.integers(int((length - float(SHAPE.seconds)) * 24))), 24)
        for key, length in zip(manifest.texts("key"), seconds, strict=True)
    }
    return Case(str(folder / "shards"), tuple(manifest.urls), starts)


# Ours


def ours(case: Case) -> AV[Tensor]:
    """Every window of the case as a batch, from a source that was just built."""
    source = Shards(case.url).build(SHAPE)
    keys = list(enumerate(source.manifest.texts("key")))
    windows = (replace(source.window(_first(source, row)), start=case.starts[key]) for row, key in keys)
    return media_of((window.read() for window in windows), len(keys))


def _first(source: ShardSource, row: int) -> int:
    """The first window of a clip."""
    return 0 if row == 0 else int(source._ends[row - 1])


# Peers


def peers(case: Case, decode: Decode) -> list[AV[Tensor]]:
    """The same windows through webdataset."""
    return list(_pipeline(case, decode))


def _pipeline(case: Case, decode: Decode) -> Any:  # noqa: ANN401
    import webdataset

    def one(sample: dict[str, Any]) -> AV[Tensor]:
        return decode(sample["mp4"], case.starts[sample["__key__"]])

    return webdataset.WebDataset(list(case.urls), shardshuffle=False, empty_check=False).map(one)


def whole(film: bytes, start: Fraction) -> AV[Tensor]:
    """All of the clip, then the window."""
    import av

    with av.open(io.BytesIO(film)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    with av.open(io.BytesIO(film)) as container:
        wave, rate = _sound(container, None, None)
    first = round(start * 24)
    return _sample(np.stack(frames[first : first + SHAPE.num_frames]), wave[:, round(start * rate) :], rate)


def ranged(film: bytes, start: Fraction) -> AV[Tensor]:
    """From the key frame before the window to its end."""
    import av

    end, frames = start + SHAPE.seconds, []
    with av.open(io.BytesIO(film)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        container.seek(int(start / stream.time_base), stream=stream)
        for frame in container.decode(stream):
            at = frame.pts * stream.time_base
            if at >= end - Fraction(1, 48):
                break
            if at >= start - Fraction(1, 48):
                frames.append(frame.to_ndarray(format="rgb24"))
    with av.open(io.BytesIO(film)) as container:
        wave, rate = _sound(container, start, end)
    return _sample(np.stack(frames), wave, rate)


def _sound(
    container: Any,  # noqa: ANN401
    start: Fraction | None,
    end: Fraction | None,
) -> tuple[np.ndarray, int]:
    stream = container.streams.audio[0]
    if start is not None:
        container.seek(max(0, int((start - Fraction(1, 10)) / stream.time_base)), stream=stream)
    parts, begin = [], None
    for frame in container.decode(stream):
        at = frame.pts * stream.time_base
        if end is not None and at >= end:
            break
        begin = at if begin is None else begin
        parts.append(frame.to_ndarray())
    wave, rate = np.concatenate(parts, axis=1), stream.codec_context.sample_rate
    return (wave if start is None else wave[:, max(0, round((start - (begin or 0)) * rate)) :]), rate


def coded(film: bytes, start: Fraction) -> AV[Tensor]:
    """torchcodec's range at its defaults."""
    from torchcodec.decoders import AudioDecoder, VideoDecoder

    half, end = 1 / 48, float(start + SHAPE.seconds)
    frames = VideoDecoder(film).get_frames_played_in_range(float(start) + half, end - half)
    heard = AudioDecoder(film).get_samples_played_in_range(float(start), end)
    return _scaled(frames.data.float(), heard.data.numpy(), heard.sample_rate)


def coded_with_care(film: bytes, start: Fraction) -> AV[Tensor]:
    """torchcodec's range, sought without a scan, scaled, cropped and resampled by itself."""
    from torchcodec.decoders import AudioDecoder, VideoDecoder
    from torchcodec.transforms import CenterCrop, Resize

    half, end = 1 / 48, float(start + SHAPE.seconds)
    shown = [Resize(covering(SIZE, SHAPE.size)), CenterCrop(SHAPE.size)]
    decoder = VideoDecoder(film, seek_mode="approximate", transforms=shown)
    frames = decoder.get_frames_played_in_range(float(start) + half, end - half)
    sound = AudioDecoder(film, sample_rate=SHAPE.sample_rate, num_channels=1)
    wave = sound.get_samples_played_in_range(float(start), end).data[:, : SHAPE.samples]
    video = frames.data.permute(1, 0, 2, 3).float().div_(127.5).sub_(1)
    return AV(video, F.pad(wave, (0, SHAPE.samples - wave.shape[1])))


def with_torchcodec() -> bool:
    """Whether it can be imported; says so where it cannot."""
    try:
        import torchcodec.decoders
    except (ImportError, OSError, RuntimeError) as error:
        told = str(error).strip().splitlines()[:1]
        print(f"torchcodec cannot be imported, it is left out: {''.join(told)}", file=sys.stderr)  # noqa: T201
        return False
    return bool(torchcodec.decoders)


def _sample(frames: np.ndarray, wave: np.ndarray, rate: int) -> AV[Tensor]:
    return _scaled(torch.from_numpy(frames).permute(0, 3, 1, 2).float(), wave, rate)


def _scaled(frames: Tensor, wave: np.ndarray, rate: int) -> AV[Tensor]:
    """(F, 3, H, W) and sound at their own sizes -> a sample."""
    import soxr

    height, width = SHAPE.size
    scale = max(height / frames.shape[2], width / frames.shape[3])
    size = [round(side * scale) for side in frames.shape[2:]]
    video = F.interpolate(frames, size=size, mode="bicubic", antialias=True).clamp(0, 255)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    video = video[:, :, top : top + height, left : left + width].permute(1, 0, 2, 3) / 127.5 - 1
    mono = wave.mean(axis=0)[: round(float(SHAPE.seconds) * rate)]
    sound = soxr.resample(mono, rate, SHAPE.sample_rate)[None, : SHAPE.samples]
    return AV(video.contiguous(), torch.from_numpy(np.pad(sound, ((0, 0), (0, SHAPE.samples - sound.shape[1])))))


# Sections


def single(case: Case, rounds: int) -> list[Row]:
    """One thread of one process, by the processor's time."""
    cases = {"webdataset, whole": whole, "webdataset, range": ranged}
    if with_torchcodec():
        cases |= {"webdataset, torchcodec": coded, "webdataset, torchcodec, care": coded_with_care}
    runs: dict[str, Any] = {"ours": lambda: lambda: ours(case)}
    runs |= {name: (lambda decode=decode: lambda: _together(peers(case, decode))) for name, decode in cases.items()}
    found = compare(runs, Timer(torch.device("cpu"), rounds))
    kept = []
    for row in rows(found, torch.float32):
        row["samples_per_second"] = len(case.starts) / row.pop("seconds")
        kept.append(row | {"section": "one thread"})
    return kept


def _together(samples: list[AV[Tensor]]) -> AV[Tensor]:
    return samples[0].map(lambda *tensors: torch.stack(tensors), *samples[1:])


def parallel(case: Case, rounds: int, workers: int, batches: int) -> list[Row]:
    """With workers, on the wall: batches of 4 from a run that goes on, four of them read ahead by either.

    Each turn starts its own workers and ends them, so that none works while another is timed.
    """
    kinds: dict[str, Callable[[], Reading]] = {"ours": lambda: _stream(case, workers)}
    kinds["webdataset, range"] = lambda: _loader(case, ranged, workers)
    if with_torchcodec():
        kinds["webdataset, torchcodec, care"] = lambda: _loader(case, coded_with_care, workers)
    walls: dict[str, list[float]] = {name: [] for name in kinds}
    used: dict[str, list[float]] = {name: [] for name in kinds}
    for turn in range(rounds):
        for name in sorted(kinds, reverse=bool(turn % 2)):
            take, close = kinds[name]()
            for _ in range(EXPECTED + 1):  # what was read ahead while nothing was timed
                take()
            before, begin = _processor(), time.perf_counter()
            for _ in range(batches):
                take()
            walls[name].append(time.perf_counter() - begin)
            used[name].append(_processor() - before)
            del take
            close()
    kept = []
    for name, each in walls.items():
        row: Row = {"section": f"{workers} workers", "case": name}
        row["samples_per_second"] = 4 * batches / statistics.median(each)
        row["processor_per_sample"] = statistics.median(used[name]) / (4 * batches)
        if name != "ours":
            row |= spread(each, walls["ours"])
            row |= {f"processor_{key}": value for key, value in spread(used[name], used["ours"]).items()}
        kept.append(row)
    return kept


def _stream(case: Case, workers: int) -> Reading:
    stream = Clips(Shards(case.url), SHAPE, workers=workers, memory=16 * 22_000_000).build()
    step = iter(range(10**9))
    return lambda: stream.batch(next(step), 4), stream.close


def _loader(case: Case, decode: Decode, workers: int) -> Reading:
    import webdataset

    data = _pipeline(case, decode).repeat().batched(4, collation_fn=_together)
    found = iter(webdataset.WebLoader(data, batch_size=None, num_workers=workers, prefetch_factor=EXPECTED // workers))
    return lambda: next(found), lambda: None  # its workers end when it is let go


def _processor() -> float:
    """Seconds that the processor has worked for this process and the workers it has."""
    total = time.process_time()
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def start(case: Case, rounds: int) -> list[Row]:
    """Seconds from a new process to the first decoded window: on the wall, and of the processor with Python's own."""
    walls, used = [], []
    with TemporaryDirectory() as compiled:
        told = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        told["PYTHONPYCACHEPREFIX"] = compiled
        for _ in range(rounds + 1):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            words = [sys.executable, "-c", FIRST, case.url]
            done = subprocess.run(words, check=True, capture_output=True, text=True, env=told)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            walls.append(float(done.stdout))
            used.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    walls, used = walls[1:], used[1:]  # the first compiles
    row = {"section": "start", "case": "first window", "wall": statistics.median(walls)}
    row |= {"wall_least": min(walls), "wall_most": max(walls)}
    return [row | {"processor": statistics.median(used), "nice": os.nice(0), "load": os.getloadavg()[0]}]


def command(
    clips: Annotated[Path | None, typer.Option(help="Folder of clips of 8 s or more; default: the world's.")] = None,
    num: Annotated[int, typer.Option(help="Clips.")] = 8,
    rounds: Annotated[int, typer.Option(help="Turns of each case.")] = 5,
    workers: Annotated[int, typer.Option(help="Of the section on the wall; 0 leaves it out.")] = 2,
    only: Annotated[str, typer.Option(help="single, parallel or start; the file keeps its other rows.")] = "",
    out: Annotated[Path, typer.Option(help="File of the results, JSON.")] = OUT,
    show: Annotated[bool, typer.Option("--table", help="Only print the table.")] = False,
) -> None:
    """Measure, keep and print."""
    if not show:
        torch.set_num_threads(1)
        warnings.filterwarnings("ignore", module="webdataset")
        with TemporaryDirectory() as folder:
            files = sorted(clips.glob("*.mp4"))[:num] if clips else list(made(Path(folder), num))
            case = prepared(files, Path(folder))
            found = single(case, rounds) if only in ("", "single") else []
            found += parallel(case, rounds, workers, 6) if only in ("", "parallel") and workers else []
            found += start(case, rounds) if only in ("", "start") else []
        measured = {row["section"] for row in found}
        before = json.loads(out.read_text(encoding="utf-8"))["rows"] if only and out.is_file() else []
        found = [row for row in before if row["section"] not in measured] + found
        about: Row = {"date": today(), **commit(), "machine": machine(torch.device("cpu"))}
        about["machine"]["packages"] |= {name: version(name) for name in PEERS if find_spec(name)}
        told = {"source": "folder" if clips else "world", "clips": len(files), "window": float(SHAPE.seconds)}
        told |= {"file_size": "as found" if clips else list(SIZE), "size": list(SHAPE.size), "load": os.getloadavg()[0]}
        out.parent.mkdir(exist_ok=True)
        out.write_text(
            json.dumps({**about, "timing": {"rounds": rounds}, "data": told, "rows": found}, indent=1) + "\n"
        )
    kept = json.loads(out.read_text(encoding="utf-8"))["rows"]
    columns = {
        "section": lambda row: row["section"],
        "case": lambda row: row["case"],
        "samples / s": lambda row: f"{row['samples_per_second']:.2f}" if "samples_per_second" in row else "",
        "time against ours": lambda row: (
            f"{row['ratio']:.2f} ({row['ratio_low']:.2f} to {row['ratio_high']:.2f})" if "ratio" in row else ""
        ),
        "processor against ours": lambda row: (
            f"{row['processor_ratio']:.2f} ({row['processor_ratio_low']:.2f} to {row['processor_ratio_high']:.2f})"
            if "processor_ratio" in row
            else ""
        ),
        "difference": lambda row: f"{row['difference']:.3f}" if row.get("difference") is not None else "",
        "wall s": lambda row: (
            f"{row['wall']:.2f} ({row['wall_least']:.2f} to {row['wall_most']:.2f})" if "wall" in row else ""
        ),
        "processor s": lambda row: f"{row['processor']:.2f}" if "processor" in row else "",
    }
    print(table(kept, columns))  # noqa: T201


if __name__ == "__main__":
    typer.run(command)
