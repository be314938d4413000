"""Every bad file and request ends in one MediaError that names the file, the reason and the remedy."""

from __future__ import annotations

import resource
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from soundstage.media.clip import Clip
from soundstage.media.decode import frames, read
from soundstage.media.encode import write
from soundstage.media.errors import MediaError
from soundstage.media.probe import probe

Noise = Callable[..., Clip]
TEXTS = ("hello, this is not a film\n" * 50, "#EXTM3U\n#EXTINF:1,\nclip.mp4\n", "ffconcat version 1.0\nfile clip.mp4\n")


@pytest.fixture
def film(noise: Noise, tmp_path: Path) -> Path:
    return write(noise(2.0, size=(64, 64)), tmp_path / "clip.mp4")


def refuses(path: Path, words: str, **options: object) -> MediaError:
    with pytest.raises(MediaError, match=words) as caught:
        read(path, **options)
    assert str(path) in str(caught.value)
    assert caught.value.path == path
    assert caught.value.reason
    assert caught.value.remedy
    return caught.value


@pytest.mark.parametrize("text", TEXTS)
def test_text_renamed(text: str, film: Path) -> None:
    path = film.with_name("text.mp4")
    path.write_text(text)
    refuses(path, "not a media file")
    with pytest.raises(MediaError, match="not a media file"):
        probe(path)


def test_missing_empty_and_folder(tmp_path: Path) -> None:
    refuses(tmp_path / "none.mp4", "no such file")
    (tmp_path / "empty.mp4").touch()
    refuses(tmp_path / "empty.mp4", "empty")
    (tmp_path / "zeros.mp4").write_bytes(bytes(4096))
    refuses(tmp_path / "zeros.mp4", "not a media file")
    (tmp_path / "folder").mkdir()
    refuses(tmp_path / "folder", "holds no 000000.png")


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_truncated(share: float, film: Path) -> None:
    path = film.with_name("short.mp4")
    path.write_bytes(film.read_bytes()[: int(share * film.stat().st_size)])
    error = refuses(path, "stops at|damaged")
    # The remedy works: what is there can be read.
    end = float(error.remedy.split("end=")[1].split(",")[0])
    assert len(read(path, end=end, audio=False).frames) == pytest.approx(24 * end, abs=1)
    with pytest.raises(MediaError, match=r"stops at|damaged"):
        list(frames(path))
    path.write_bytes(film.read_bytes()[:300])
    refuses(path, "short.mp4")


def test_truncated_webm(noise: Noise, tmp_path: Path) -> None:
    path = write(noise(2.0), tmp_path / "clip.webm")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    refuses(path, "declares 2.000 s of picture but it stops")


def test_damaged_data(film: Path) -> None:
    data = bytearray(film.read_bytes())
    middle = slice(len(data) // 3, len(data) // 2)
    data[middle] = bytes((7 * byte + 13) % 256 for byte in data[middle])
    film.write_bytes(data)
    refuses(film, "damaged|stops at")


def lie(path: Path, atom: bytes, offset: int, factor: float) -> None:
    """Multiply the 32-bit number `offset` bytes behind the name of the first `atom`."""
    data = bytearray(path.read_bytes())
    at = data.find(atom) + 4 + offset
    (value,) = struct.unpack(">I", data[at : at + 4])
    data[at : at + 4] = struct.pack(">I", int(value * factor))
    path.write_bytes(data)


def test_header_lies_about_the_frame_count(noise: Noise, tmp_path: Path) -> None:
    path = write(noise(2.0).without("audio"), tmp_path / "lie.mp4")
    lie(path, b"stts", 8, 2)
    refuses(path, "header declares 96 frames but holds 48")
    lie(path, b"mdhd", 16, 2)
    lie(path, b"elst", 8, 2)
    refuses(path, r"header declares 4.000 s of picture but it stops at 2.000 s")
    assert len(read(path, start=1, end=2).frames) == 24


def test_a_stream_that_is_not_there(noise: Noise, tmp_path: Path) -> None:
    sound = write(noise(0.5).without("video"), tmp_path / "sound.mp4")
    refuses(sound, "holds no picture; pass video=False")
    with pytest.raises(MediaError, match="holds no picture"):
        next(frames(sound))
    picture = write(noise(0.5).without("audio"), tmp_path / "picture.mp4")
    refuses(picture, "holds no sound", video=False)
    refuses(picture, "neither picture nor sound", video=False, audio=False)
    images = write(noise(0.5).without("audio"), tmp_path / "images")
    refuses(images, "holds no sound", video=False)


def test_zero_duration(tmp_path: Path) -> None:
    path = tmp_path / "nothing.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        container.start_encoding()
    refuses(path, "nothing.mp4")
    with pytest.raises(MediaError, match="no frames to write"):
        write(Clip(np.zeros((0, 8, 8, 3), np.uint8), Fraction(24)), tmp_path / "a.mp4")
    with pytest.raises(MediaError, match="no samples to write"):
        write(Clip(wave=np.zeros((1, 0), np.float32), sample_rate=16000), tmp_path / "a.wav")


def test_impossible_ranges(film: Path) -> None:
    refuses(film, "ends at 2.000 s", start=9)
    refuses(film, "ends at 2.000 s", start=9, video=False)
    refuses(film, "range 1 to 1 s is empty", start=1, end=1)
    refuses(film, "range -1", start=-1)
    assert len(read(film, start=1, end=99).frames) == 24
    with pytest.raises(MediaError, match="cannot make 5 of 2"):
        read(film, channels=5)


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """No file can grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("name", ["full.mp4", "full.webm", "full.wav", "full.gif", "full"])
def test_a_full_disk_leaves_nothing_behind(name: str, noise: Noise, tmp_path: Path) -> None:
    clip = noise(2.0, size=(64, 64))
    with disk_of(100 if name == "full" else 8000), pytest.raises(MediaError, match=r"cannot be written .*free some"):
        write(clip, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_keeps_the_old_file(noise: Noise, tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"the old one")
    with disk_of(2000), pytest.raises(MediaError, match="cannot be written"):
        write(noise(1.0), path)
    assert path.read_bytes() == b"the old one"
    assert [file.name for file in tmp_path.iterdir()] == ["clip.mp4"]


def test_what_a_format_cannot_hold(noise: Noise, tmp_path: Path) -> None:
    clip = noise(0.3)
    with pytest.raises(MediaError, match=r"suffix '.avi' is not a known format; use one of .mp4"):
        write(clip, tmp_path / "clip.avi")
    with pytest.raises(MediaError, match="needs frames"):
        write(clip.without("video"), tmp_path / "clip.gif")
    with pytest.raises(MediaError, match="needs a wave"):
        write(clip.without("audio"), tmp_path / "clip.wav")
    with pytest.raises(MediaError, match="preset: 'warp' is unknown; use one of ultrafast"):
        write(clip, tmp_path / "clip.mp4", preset="warp")
    with pytest.raises(MediaError, match="crf: 60 is not within 0 to 51"):
        write(clip, tmp_path / "clip.mp4", crf=60)
    with pytest.raises(MediaError, match="9 channels"):
        write(Clip(wave=np.zeros((9, 100), np.float32), sample_rate=16000), tmp_path / "clip.wav")
