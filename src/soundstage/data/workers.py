"""Decoding ahead of time in processes of their own, into shared memory of a fixed size.

A worker imports no torch and gets windows that say all there is to know, so it is ready in a fraction of a second.
"""

from __future__ import annotations

import os
import signal
import threading
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from multiprocessing import connection, get_context, parent_process
from multiprocessing.shared_memory import SharedMemory
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from soundstage.core.errors import Caution, SoundstageError
from soundstage.data.reading import Raw
from soundstage.data.shapes import ClipShape

if TYPE_CHECKING:
    from torch import Tensor

    from soundstage.core.av import AV
    from soundstage.data.records import Source

__all__ = ["Ahead", "ReaderDied", "Readers"]

MEMORY = 2**30
"""Bytes of decoded clips that wait, at most."""
SHARED = "/dev/shm"


class ReaderDied(SoundstageError, RuntimeError):
    """A worker was killed, by a decoder or for want of memory."""


class Readable(Protocol):
    """Something that becomes a decoded clip, in any process."""

    id: str

    def read(self) -> Raw: ...


@dataclass(frozen=True, eq=False)
class Whole:
    """A sample of a source that makes its clips itself."""

    source: Source
    index: int
    sample_rate: int

    @property
    def id(self) -> str:
        return str(self.index)

    def read(self) -> Raw:
        """The sample as 8-bit pixels and sound."""
        from soundstage.data.records import raw_of

        return raw_of(self.source.item(self.index), self.sample_rate)


class Readers:
    """`num` processes that read what is wanted, in that order, as far as `memory` bytes reach.

    largest: bytes of the largest clip, decoded.
    """

    def __init__(self, num: int, largest: int, memory: int = MEMORY) -> None:
        slots = max(num, memory // max(1, largest))
        self._largest, self._free = largest, list(range(slots))
        self._queue: dict[Hashable, Callable[[], Readable]] = {}
        self._running: dict[Hashable, tuple[Future[Any], int, str]] = {}
        self._shared = _shared(slots * largest)
        name = self._shared.name if self._shared else None
        self._pool = ProcessPoolExecutor(num, get_context("spawn"), initializer=_begin, initargs=(name,))
        self._close = weakref.finalize(self, _end, self._pool, self._shared)

    def want(self, jobs: Iterable[tuple[Hashable, Callable[[], Readable]]]) -> None:
        """Read these too, each known by a key; what is wanted already is not read twice."""
        for key, job in jobs:
            if key not in self._running:
                self._queue.setdefault(key, job)
        self._go()

    @contextmanager
    def take(self, key: Hashable, job: Callable[[], Readable]) -> Iterator[Raw]:
        """One that is read, or now will be, before all others; its arrays are gone at the end of the context.

        Raises what reading raised, or ReaderDied.
        """
        if key not in self._running:
            self._queue = {key: job, **{k: v for k, v in self._queue.items() if k != key}}
            self._go()
        while key not in self._running:  # every slot holds something that was wanted and never taken
            self._drop(next(iter(self._running)))
            self._go()
        future, slot, name = self._running.pop(key)
        try:
            raw, *shapes = future.result()
            yield raw if self._shared is None else self._view(raw, slot, *shapes)
        except BrokenProcessPool as error:
            raise self._died(name) from error
        finally:
            self._free.append(slot)
        self._go()

    def close(self) -> None:
        """End the processes."""
        self._close()

    def _go(self) -> None:
        while self._free and self._queue:
            key = next(iter(self._queue))
            job = self._queue.pop(key)()
            slot = self._free.pop()
            try:
                future = self._pool.submit(_read, job, slot * self._largest, self._largest)
            except BrokenProcessPool as error:
                raise self._died(job.id) from error
            self._running[key] = future, slot, job.id

    def _died(self, name: str) -> ReaderDied:
        held = [name, *(each for _, _, each in self._running.values())]
        return ReaderDied(
            f"a worker was killed while it read one of {', '.join(held[:8])}: give it more memory, use fewer workers, "
            "or find a damaged file with soundstage data validate"
        )

    def _drop(self, key: Hashable) -> None:
        future, slot, _ = self._running.pop(key)
        future.exception()
        self._free.append(slot)

    def _view(self, raw: Raw, slot: int, frames: tuple[int, ...] | None, wave: tuple[int, ...] | None) -> Raw:
        """The clip with its arrays as they lie in shared memory."""
        assert self._shared is not None
        at, found = slot * self._largest, {}
        for name, shape, kind in (("frames", frames, np.uint8), ("wave", wave, np.float32)):
            if shape is not None:
                found[name] = np.ndarray(shape, kind, self._shared.buf, at)
                at += found[name].nbytes + -found[name].nbytes % 8
        if frames is not None:
            found["frames"] = found["frames"].transpose(1, 2, 3, 0)
        return replace(raw, **found)


class Ahead:
    """Samples of a source by index; with workers, those that are expected are decoded beforehand."""

    def __init__(self, source: Source, shapes: Iterable[ClipShape], workers: int = 0, memory: int = MEMORY) -> None:
        self._source = source
        shapes = list(shapes)
        self._sample_rate = shapes[0].sample_rate
        largest = max(_bytes(shape) for shape in shapes)
        self._readers = Readers(workers, largest, memory) if workers else None

    def expect(self, indices: Iterable[int]) -> None:
        """These are asked for next."""
        if self._readers is not None:
            self._readers.want((index, self._job(index)) for index in indices)

    def batch(self, indices: Sequence[int]) -> tuple[AV[Tensor], list[str], list[str]]:
        """Media, captions and names of samples of one shape; raises MediaError for damaged media."""
        from soundstage.core.av import collate
        from soundstage.data.records import media_of

        if self._readers is None and not hasattr(self._source, "window"):
            samples = [self._source.item(index) for index in indices]
            return collate([s.media for s in samples]), [s.caption for s in samples], [s.id for s in samples]
        words: list[tuple[str, str]] = []
        media = media_of(self._raws(indices, words), len(indices))
        return media, [caption for caption, _ in words], [name for _, name in words]

    def _raws(self, indices: Sequence[int], words: list[tuple[str, str]]) -> Iterator[Raw]:
        """Decoded clips, each good until the next is asked for; their captions and names are added to `words`."""
        for index in indices:
            job = self._job(index)
            with self._readers.take(index, job) if self._readers else nullcontext(job().read()) as raw:
                words.append((raw.caption, raw.id))
                yield raw

    def close(self) -> None:
        """End the processes."""
        if self._readers is not None:
            self._readers.close()

    def _job(self, index: int) -> Callable[[], Readable]:
        window = getattr(self._source, "window", None)
        if window is None:
            return lambda: Whole(self._source, index, self._sample_rate)
        return lambda: window(index)


def _bytes(shape: ClipShape) -> int:
    """Of a decoded clip, both arrays on multiples of eight."""
    frames = shape.num_frames * shape.size[0] * shape.size[1] * 3
    return frames + -frames % 8 + (4 * shape.channels * shape.samples + 7) // 8 * 8


def _shared(size: int) -> SharedMemory | None:
    """Shared memory, or None with a warning where there is too little: pages that do not exist kill who writes them."""
    try:
        room = os.statvfs(SHARED)
        if room.f_bavail * room.f_frsize < size:
            warnings.warn(
                f"{SHARED} has less than {size / 2**20:.0f} MB: decoded clips are sent through pipes, which is slower; "
                "give it more (docker run --shm-size), or lower memory=",
                Caution,
                stacklevel=4,
            )
            return None
    except OSError:  # no such folder on this system, where shared memory is made otherwise
        pass
    return SharedMemory(create=True, size=size)


_memory: SharedMemory | None = None
"""In a worker: that of its parent."""


def _begin(name: str | None) -> None:
    global _memory
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_with_parent, daemon=True).start()
    _memory = SharedMemory(name) if name else None


def _with_parent() -> None:
    """A worker outlives its parent by nothing."""
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _read(job: Readable, offset: int, largest: int) -> tuple[Any, ...]:
    """In a worker: read, and leave the arrays in shared memory where there is any."""
    raw = job.read()
    if _memory is None:
        return (raw,)
    at, shapes = offset, []
    # colours first, as tensors have them: turned round here, where there are many hands
    frames = None if raw.frames is None else raw.frames.transpose(3, 0, 1, 2)
    for array in (frames, raw.wave):
        if array is None:
            shapes.append(None)
            continue
        if at + array.nbytes > offset + largest:
            raise ValueError(f"{raw.id}: a clip of {array.shape} is larger than the shape it was to have")
        np.ndarray(array.shape, array.dtype, _memory.buf, at)[...] = array
        shapes.append(array.shape)
        at += array.nbytes + -array.nbytes % 8
    return (replace(raw, frames=None, wave=None), *shapes)


def _end(pool: ProcessPoolExecutor, shared: SharedMemory | None) -> None:
    pool.shutdown(wait=True, cancel_futures=True)
    if shared is not None:
        shared.unlink()
        with suppress(BufferError):  # a clip that someone still looks at goes with the process
            shared.close()
