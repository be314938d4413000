"""The one error of this package."""

from __future__ import annotations

from pathlib import Path


class MediaError(ValueError):
    """A file or a request that cannot be used: which one, why, and what to do about it.

    path: the file at fault, or None where the request itself is at fault.
    reason, remedy: one clause each, also available as attributes.
    """

    def __init__(self, reason: str, *, remedy: str = "", path: str | Path | None = None) -> None:
        self.path = None if path is None else Path(path)
        self.reason = reason
        self.remedy = remedy
        super().__init__((f"{path}: " if path is not None else "") + reason + (f"; {remedy}" if remedy else ""))
