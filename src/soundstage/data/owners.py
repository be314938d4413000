"""Who holds tasks: a run on a host, told apart from any other, and known to be gone at once where it can be."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from uuid import uuid4

__all__ = ["gone", "new_owner", "this_host", "this_process"]


def this_host() -> str:
    """A name under which process numbers mean the same: host, boot, and namespace of process numbers."""
    return "/".join([socket.gethostname(), _read("/proc/sys/kernel/random/boot_id"), _namespace()])


def this_process() -> str:
    """Number and start time of this process, so that a number given out again is not taken for it."""
    return f"{os.getpid()}/{_started(os.getpid())}"


def new_owner() -> str:
    """An id that no other run has; also the name of its folder of scratch files."""
    return f"{socket.gethostname()}-{os.getpid()}-{uuid4().hex[:8]}"


def gone(host: str, process: str) -> bool:
    """Is it sure that this process runs no more? Of another host that is never sure; its lease decides."""
    number, _, started = process.partition("/")
    if host != this_host() or not started:
        return False
    return _started(int(number)) != started


def _started(number: int) -> str:
    """When a process began, in clock ticks since boot; "" for none, a dead one that nobody has buried, or no /proc."""
    told = _read(f"/proc/{number}/stat").rpartition(")")[2].split()
    return told[19] if len(told) > 19 and told[0] not in "ZX" else ""


def _namespace() -> str:
    link = Path("/proc/self/ns/pid")
    return link.readlink().name if link.is_symlink() else ""


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""
