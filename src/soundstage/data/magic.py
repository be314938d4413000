"""What a file is by its first bytes, whatever it is called, and how long it says it is."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO, NamedTuple

__all__ = ["HEAD", "Kind", "extent", "sniff"]

HEAD = 1024
EBML, SEGMENT = 0x1A45DFA3, 0x18538067


class Kind(NamedTuple):
    """A kind of file. medium: "video", "audio", "image" or "text"; suffix: as files of this kind are called."""

    medium: str
    suffix: str


BRANDS = {b"M4A ": Kind("audio", ".m4a"), b"M4B ": Kind("audio", ".m4a"), b"qt  ": Kind("video", ".mov")}
BRANDS |= {b"avif": Kind("image", ".avif"), b"heic": Kind("image", ".heic"), b"mif1": Kind("image", ".heic")}
PREFIXES = (
    (b"fLaC", Kind("audio", ".flac")),
    (b"ID3", Kind("audio", ".mp3")),
    (b"OggS", Kind("audio", ".ogg")),
    (b"caff", Kind("audio", ".caf")),
    (b"FLV\x01", Kind("video", ".flv")),
    (b"\x00\x00\x01\xba", Kind("video", ".mpg")),
    (b"\x00\x00\x01\xb3", Kind("video", ".mpg")),
    (bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c"), Kind("video", ".wmv")),
    (bytes.fromhex("060e2b34020501"), Kind("video", ".mxf")),
    (b"\x89PNG\r\n\x1a\n", Kind("image", ".png")),
    (b"\xff\xd8\xff", Kind("image", ".jpg")),
    (b"GIF87a", Kind("image", ".gif")),
    (b"GIF89a", Kind("image", ".gif")),
    (b"II*\x00", Kind("image", ".tiff")),
    (b"MM\x00*", Kind("image", ".tiff")),
)
CONTAINERS = {
    b"AVI ": Kind("video", ".avi"),
    b"WAVE": Kind("audio", ".wav"),
    b"WEBP": Kind("image", ".webp"),
    b"AIFF": Kind("audio", ".aiff"),
    b"AIFC": Kind("audio", ".aiff"),
}
PAGES = (b"<!doctype", b"<html", b"<head", b"<body", b"<script", b"<?xml", b"<error", b"{", b"[", b"#extm3u")


def sniff(head: bytes) -> Kind | None:
    """The kind of a file that begins with these bytes (HEAD of them are enough); None when it is not known."""
    if head[4:8] == b"ftyp":
        return BRANDS.get(head[8:12], Kind("video", ".mp4"))
    if head[4:8] in (b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot"):
        return Kind("video", ".mov")
    if head[:4] in (b"RIFF", b"RF64", b"FORM"):
        return CONTAINERS.get(head[8:12])
    if head[:4] == EBML.to_bytes(4, "big"):
        return Kind("video", ".webm" if b"webm" in head[:64] else ".mkv")
    for prefix, kind in PREFIXES:
        if head.startswith(prefix):
            return Kind("video", ".ogv") if prefix == b"OggS" and b"theora" in head[:64] else kind
    if head[:1] == b"\x47" and len(head) > 376 and head[188] == 0x47 and head[376] == 0x47:
        return Kind("video", ".ts")
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(PAGES):
        return Kind("text", ".html")
    # frame sync of MPEG audio: eleven bits, then a version, a layer, a bit rate and a sample rate that exist
    if len(head) > 3 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0:
        if head[1] & 0xF6 == 0xF0:
            return Kind("audio", ".aac")
        if head[1] & 0x18 != 0x08 and head[1] & 0x06 and head[2] & 0xF0 != 0xF0 and head[2] & 0x0C != 0x0C:
            return Kind("audio", ".mp3")
    return None


def extent(path: Path) -> int | None:
    """How many bytes the file should have by its own account; None for kinds that do not say.

    MP4 and QuickTime count in boxes, RIFF (wav, avi, webp) and Matroska in one figure. Of an MP4 without its table of
    contents it is one byte more than it has: something is to come.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(HEAD)
        kind = sniff(head)
        if kind is None:
            return None
        if kind.suffix in (".mp4", ".mov", ".m4a"):
            return _boxes(file, size)
        if head[:4] == b"RIFF":
            told = struct.unpack("<I", head[4:8])[0]
            return None if told in (0, 0xFFFFFFFF) else 8 + told  # a stream's writer did not know
        if head[:4] == EBML.to_bytes(4, "big"):
            return _matroska(head)
    return None


def _boxes(file: BinaryIO, size: int) -> int:
    """The end of the last box of the top level that is there."""
    at, contents = 0, False
    while at < size:
        file.seek(at)
        head = file.read(16)
        if len(head) < 8:
            return at + 8
        length, name = struct.unpack(">I4s", head[:8])
        contents |= name == b"moov"
        if length == 0:
            length = size - at
        elif length == 1:
            length = struct.unpack(">Q", head[8:16])[0] if len(head) == 16 else 16
        if length < 8:
            return size  # not a box: what follows is of no account
        at += length
    return at if contents else max(at, size + 1)


def _matroska(head: bytes) -> int | None:
    """Where the segment ends; None when its length was not known to its writer."""
    at = 0
    for wanted in (EBML, SEGMENT):
        if int.from_bytes(head[at : at + 4], "big") != wanted:
            return None
        at += 4
        if at >= len(head) or head[at] == 0:
            return None
        width = 9 - head[at].bit_length()
        value = int.from_bytes(head[at : at + width], "big") & ((1 << (7 * width)) - 1)
        if value == (1 << (7 * width)) - 1:
            return None
        at += width + value
    return at
