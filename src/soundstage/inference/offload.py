"""Block-wise offload: the weights of `module.blocks` wait in host memory and visit the device one block at a time.

While block i computes, the weights of block i + 1 are copied on a stream of their own; at most these two blocks hold
memory on the device. On a CPU the same steps are taken with plain copies.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from soundstage.core.errors import Caution, ConfigError
from soundstage.inference.quantize import blocks_of, parts, rebuilt

ALIGNED = 256  # bytes; where each tensor starts in the buffer of its block, as the kernels of every device like it


def offload(module: nn.Module, device: torch.device | str) -> nn.Module:
    """Keep the parameters of `module.blocks` in host memory, and put the rest of the module on `device`.

    In place; names, state_dict and outputs stay the same. For a CUDA device the host memory is page-locked; it is only
    read. Blocks may run in any order, and be left out; the copy begun for a block that does not run is dropped. One
    call at a time. To be done after quantise; afterwards the weights can be neither moved, cast nor replaced. What a
    block holds itself, beside its submodules, stays on the device: small tables, which a backbone may read outside of
    the block.
    Raises ConfigError for a module without blocks, offloaded before, or with weights not loaded yet.
    """
    blocks = list(dict.fromkeys(blocks_of(module, "offload")))
    if offloaded(module) is not None:
        raise ConfigError("offload: the blocks are offloaded already; do it once")
    device = torch.device(device)
    hosted = {id(sub) for block in blocks for sub in block.modules()}
    for sub in module.modules():
        if id(sub) not in hosted:
            sub._apply(lambda x: x.to(device), recurse=False)
    hosts: list[_Host] = []
    for block in blocks:
        hosts.append(_Host(block, device, hosts))
    state = Offload(hosts, device)
    for block in blocks:
        block._offload = state  # type: ignore[assignment]
        block.__class__ = _front(type(block))
    return module


def offloaded(module: nn.Module) -> Offload | None:
    """The state of the blocks' offload, or None where there is none."""
    blocks = getattr(module, "blocks", ())
    return next((block._offload for block in blocks if isinstance(block, _Offloaded)), None)


class _Offloaded(nn.Module):
    """Put in front of a block's own class, so that its weights come before anything of its call runs.

    A hook would be inside what `block.compile` compiles; this stays outside, and leaves at any exception.
    """

    _offload: Offload

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        with self._offload.on_device(self):
            return super().__call__(*args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:  # noqa: ANN401, ARG002
        raise ConfigError("offload: an offloaded module cannot be moved or cast; do that first, then offload")


@cache
def _front(kind: type) -> type:
    """One class for all blocks of a kind, so that what is compiled for one serves the others."""
    return type(kind.__name__, (_Offloaded, kind), {})


class Offload:
    """Which block's weights are on the device. most: the largest number of blocks that ever were at once."""

    def __init__(self, hosts: list[_Host], device: torch.device) -> None:
        self.hosts = hosts
        self.device = device
        self.most = 0
        self._place = {id(host.block): i for i, host in enumerate(hosts)}
        self._copies: dict[int, _Copy] = {}
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory that the blocks' weights take."""
        return sum(host.buffer.numel() for host in self.hosts)

    @property
    def device_bytes(self) -> int:
        """Most bytes of device memory that they can take: two neighbours."""
        sizes = [host.buffer.numel() for host in self.hosts]
        return max(sum(sizes[i : i + 2]) for i in range(len(sizes)))

    @property
    def pinned(self) -> bool:
        """Whether the copies can overlap with computing."""
        return all(host.pinned for host in self.hosts)

    def report(self) -> dict[str, Any]:
        """Number of blocks, bytes on the host and at most on the device, whether copies overlap; as JSON."""
        return {
            "blocks": len(self.hosts),
            "host_bytes": self.host_bytes,
            "device_bytes": self.device_bytes,
            "device": str(self.device),
            "pinned": self.pinned,
        }

    @contextmanager
    def on_device(self, block: nn.Module) -> Iterator[None]:
        """Give `block` its weights on the device, and begin to copy those of the next one."""
        i = self._place[id(block)]
        self.hosts[i].check()
        for other in [j for j in self._copies if j != i]:
            self._drop(other)
        try:
            copy = self._copy(i)
            copy.wait()
            self.hosts[i].put(copy.buffer)
            if i + 1 < len(self.hosts):
                self._copy(i + 1)
            yield
        finally:
            self.hosts[i].put_back()
            self._drop(i)

    def release(self) -> None:
        """Free what the device still holds, such as the copy begun for a block that did not run."""
        for i in list(self._copies):
            self._drop(i)

    def _copy(self, i: int) -> _Copy:
        if i not in self._copies:
            self._copies[i] = _Copy(self.hosts[i].buffer, self.device, self._stream)
            self.most = max(self.most, len(self._copies))
        return self._copies[i]

    def _drop(self, i: int) -> None:
        """Its memory goes back to the allocator, which gives it to work queued after all that is queued now."""
        copy = self._copies.pop(i, None)
        if copy is not None:
            copy.wait()


class _Copy:
    """A block's buffer on the device, and the event of its arrival there.

    The memory belongs to the stream that computes, and the copying stream waits for what is queued on that one first.
    So memory freed there can be filled here at once, without record_stream, and a host that runs ahead of the device
    never holds more than two buffers.
    """

    def __init__(self, host: Tensor, device: torch.device, stream: torch.cuda.Stream | None) -> None:
        self.buffer = torch.empty_like(host, device=device)
        self.arrival: torch.Event | None = None
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(device))
        side: AbstractContextManager[Any] = nullcontext() if stream is None else torch.cuda.stream(stream)
        with side, torch.no_grad():
            self.buffer.copy_(host, non_blocking=True)
        if stream is not None:
            self.arrival = stream.record_event()

    def wait(self) -> None:
        """Let the computing stream wait for the arrival; the host goes on."""
        if self.arrival is not None:
            torch.cuda.current_stream(self.buffer.device).wait_event(self.arrival)
            self.arrival = None


@dataclass(frozen=True)
class _Entry:
    """One parameter. owners: the modules that hold it, with its name there. spans: bytes of its parts in the buffer."""

    owners: list[tuple[nn.Module, str]]
    host: nn.Parameter
    spans: list[tuple[int, int]]


class _Host:
    """A block's parameters in one buffer of host memory; its other tensors are put on the device."""

    def __init__(self, block: nn.Module, device: torch.device, before: list[_Host]) -> None:
        """before: the blocks done already, which may share submodules with this one."""
        self.block = block
        kept = {id(entry.host) for host in before for entry in host.entries}
        owners: dict[int, list[tuple[nn.Module, str]]] = {}
        found: dict[int, nn.Parameter] = {}
        for sub in block.modules():
            if sub is block and any(block.children()):
                sub._apply(lambda x: x.to(device), recurse=False)
                continue
            for name, parameter in sub._parameters.items():
                if parameter is not None:
                    found[id(parameter)] = parameter
                    owners.setdefault(id(parameter), []).append((sub, name))
            for name, value in sub._buffers.items():
                sub._buffers[name] = None if value is None else value.to(device)
        spans, end = [], 0
        for parameter in found.values():
            spans.append([])
            for part in parts(parameter):
                spans[-1].append((end, end + part.numel() * part.element_size()))
                end += math.ceil(part.numel() * part.element_size() / ALIGNED) * ALIGNED
        self.buffer = torch.empty(end, dtype=torch.uint8)
        self.entries = []
        for (key, parameter), span in zip(found.items(), spans, strict=True):
            value = _over(self.buffer, parameter, span)
            for part, source in zip(parts(value), parts(parameter), strict=True):
                part.copy_(source.detach())
            host = parameter if key in kept else nn.Parameter(value, requires_grad=parameter.requires_grad)
            self.entries.append(_Entry(owners[key], host, span))
        self.put_back()
        self.pinned = device.type == "cuda" and _pin(self.buffer)

    def check(self) -> None:
        """Raises ConfigError where a call would use other weights than asked for, or lose gradients."""
        if torch.is_grad_enabled() and any(entry.host.requires_grad for entry in self.entries):
            raise ConfigError("offload: gradients do not reach offloaded weights; run under torch.no_grad()")
        if any(sub._parameters[name] is not entry.host for entry in self.entries for sub, name in entry.owners):
            raise ConfigError("offload: a block's weights were replaced since; load them first, then offload")

    def put(self, buffer: Tensor) -> None:
        """Let the block use the weights in `buffer`, which is laid out as the host's."""
        for entry in self.entries:
            value = nn.Parameter(_over(buffer, entry.host, entry.spans), requires_grad=False)
            for sub, name in entry.owners:
                sub._parameters[name] = value

    def put_back(self) -> None:
        """Let the block show its host weights again."""
        for entry in self.entries:
            for sub, name in entry.owners:
                sub._parameters[name] = entry.host


def _over(buffer: Tensor, like: Tensor, spans: list[tuple[int, int]]) -> Tensor:
    """A tensor like `like` whose parts are those spans of the buffer."""
    storage, new = buffer.untyped_storage(), []
    for part, (start, _) in zip(parts(like), spans, strict=True):
        empty = torch.empty(0, dtype=part.dtype, device=buffer.device)
        new.append(empty.set_(storage, start // part.element_size(), part.shape))  # a view would slow down tracing
    return rebuilt(like.detach(), iter(new))


def _pin(buffer: Tensor) -> bool:
    """Page-lock memory where it lies (PyTorch's own allocator of such memory rounds up to powers of two)."""
    if not buffer.numel():
        return True
    runtime, address = torch.cuda.cudart(), buffer.data_ptr()
    if int(runtime.cudaHostRegister(address, buffer.numel(), 0)) == 0:
        weakref.finalize(buffer, runtime.cudaHostUnregister, address).atexit = False
        return True
    with suppress(RuntimeError):  # CUDA would raise the failure again at its next kernel
        torch.zeros(1, device="cuda").add_(1)
    warnings.warn(
        "offload: host memory could not be page-locked, so copies will not overlap with computing; "
        "raise the limit of locked memory (ulimit -l)",
        Caution,
        stacklevel=2,
    )
    return False
