"""What a file is by its first bytes, and how long it says it is."""

import io
import random
import struct
import wave
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from soundstage.data import parts
from soundstage.data.magic import HEAD, Kind, extent, sniff
from soundstage.media import encode
from soundstage.media.clip import Clip
from soundstage.testing.server import film

NOISE = random.Random(0).randbytes(64)


def test_files_that_are_really_written_are_known_and_know_their_length(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 255, (8, 32, 32, 3), dtype=np.uint8)
    wave_ = rng.uniform(-0.1, 0.1, (2, 16000)).astype(np.float32)
    clip = Clip(frames=frames, fps=Fraction(8), wave=wave_, sample_rate=16000)
    media = {".mp4": "video", ".webm": "video", ".gif": "image", ".wav": "audio", ".flac": "audio", ".m4a": "audio"}
    for suffix, medium in media.items():
        path = encode.write(clip, tmp_path / f"a{suffix}")
        assert sniff(path.read_bytes()[:HEAD]) == Kind(medium, suffix)
        if suffix in (".mp4", ".m4a", ".wav", ".webm"):
            size = path.stat().st_size
            assert extent(path) == size
            for cut in (size // 3, size - 1):
                short = tmp_path / f"short{suffix}"
                short.write_bytes(path.read_bytes()[:cut])
                assert (extent(short) or 0) > cut
        else:
            assert extent(path) is None


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (b"\0\0\0\x18ftypqt  " + NOISE, ("video", ".mov")),
        (b"\0\0\0\x08wide\0\0\0\0mdat", ("video", ".mov")),
        (b"RIFF\0\0\0\0AVI LIST", ("video", ".avi")),
        (b"RIFF\0\0\0\0WEBPVP8 ", ("image", ".webp")),
        (b"\xff\xfb\x90\x64" + NOISE, ("audio", ".mp3")),
        (b"\xff\xf1\x50\x80" + NOISE, ("audio", ".aac")),
        (b"OggS" + bytes(24) + b"\x80theora", ("video", ".ogv")),
        ((b"\x47" + bytes(187)) * 3, ("video", ".ts")),
        (b"\xff\xd8\xff\xe0\0\x10JFIF", ("image", ".jpg")),
        (b"\xef\xbb\xbf  <!DOCTYPE HTML>", ("text", ".html")),
        (b"#EXTM3U\nhttp://a/b", ("text", ".html")),
        (b"\xff\xff\xff\xff", None),
        (b"PK\x03\x04", None),
        (b"", None),
        (b"hello", None),
    ],
)
def test_kinds(head: bytes, kind: tuple[str, str] | None) -> None:
    assert sniff(head) == kind


def test_lengths_that_are_not_told(tmp_path: Path) -> None:
    path = tmp_path / "a"
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(1000))
    body = buffer.getvalue()
    for told in (0, 0xFFFFFFFF):  # a recorder that was switched off
        path.write_bytes(body[:4] + struct.pack("<I", told) + body[8:])
        assert extent(path) is None
    path.write_bytes(bytes.fromhex("1a45dfa3 80 18538067 01ffffffffffffff") + NOISE)
    assert extent(path) is None
    path.write_bytes(film(1000)[:-1])
    assert extent(path) == 1000
    path.write_bytes(film(1000)[:24])  # whole boxes, and no table of contents
    assert extent(path) == 25
    path.write_bytes(film(1000)[:32] + struct.pack(">I4s", 0, b"mdat") + NOISE)  # a last box without a length
    assert extent(path) == path.stat().st_size


def test_bytes_from_before_the_machine_started_are_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with parts.held(tmp_path, "http://a/b") as part:
        part.restart({"etag": '"1"'})
        part.write(b"abc")
    with parts.held(tmp_path, "http://a/b") as part:
        assert (part.size, part.validator) == (3, '"1"')
    boot = tmp_path / "boot"
    boot.write_text("another")
    monkeypatch.setattr(parts, "BOOT", boot)
    with parts.held(tmp_path, "http://a/b") as part:
        assert (part.size, part.told) == (0, {})
    assert [path for path in tmp_path.rglob("*") if path.suffix in (".part", ".json")] == []
