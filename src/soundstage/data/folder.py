"""Real clips in a folder: `clip.mp4` beside `clip.txt`, cut into windows of the model's shape."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from fractions import Fraction
from hashlib import file_digest, sha256
from pathlib import Path

from soundstage.core.av import MODALITIES
from soundstage.core.errors import ConfigError
from soundstage.data.reading import Window, covering
from soundstage.data.records import ClipShape, Sample, sample_of
from soundstage.media.errors import MediaError
from soundstage.media.probe import MediaInfo, probe

SUFFIXES = {".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".gif", ".wav", ".flac", ".mp3", ".m4a", ".ogg"}


@dataclass(frozen=True)
class Folder:
    """Clips under `path`, sub-folders too. The caption is the text of the .txt file of the same name, or empty.

    hop: seconds between the starts of two windows of one file (None = windows touch). modalities: what is read; a
    file that lacks one of them, is damaged, or is shorter than a window is left out with a warning.
    """

    path: str
    hop: float | None = None
    modalities: tuple[str, ...] = MODALITIES

    def build(self, shape: ClipShape) -> FolderSource:
        """Find and probe the files; raises ConfigError when no window can be had."""
        return FolderSource(self, shape)


class FolderSource:
    """The windows of a folder, in the order of the file names."""

    def __init__(self, config: Folder, shape: ClipShape) -> None:
        self._config, self._shape = config, shape
        root = Path(config.path).expanduser()
        if not root.is_dir():
            raise ConfigError(f"folder: {config.path} is not a folder; give one that holds clips")
        files = sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES)
        self._windows: list[tuple[MediaInfo, Fraction]] = []
        self._digests: dict[Path, str] = {}
        for path in files:
            self._windows += self._cut(path)
        if not self._windows:
            raise ConfigError(
                f"folder: none of {len(files)} files in {config.path} gives a clip of {float(shape.seconds):g} s with "
                f"{' and '.join(config.modalities)}; add clips, or set modalities="
            )
        self.size: int | None = len(self._windows)
        stamps = [(str(path.relative_to(root)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        texts = [_caption(path) for path in files]
        self.key = sha256(repr((config.hop, config.modalities, stamps, texts)).encode()).hexdigest()

    def window(self, index: int) -> Window:
        """What to decode for sample `index`."""
        info, start = self._windows[index]
        shape, names = self._shape, self._config.modalities
        video = info.video if "video" in names else None
        cover = covering((video.height, video.width), shape.size) if video else None
        path = Path(info.path)
        return Window(path, None, start, shape, cover, names, *self.words(index))

    def item(self, index: int) -> Sample:
        """Window `index`, decoded; raises MediaError for a file that is damaged within it."""
        return sample_of(self.window(index).read())

    def words(self, index: int) -> tuple[str, str]:
        """Caption and name of a sample, without decoding it."""
        info, start = self._windows[index]
        path = Path(info.path)
        return _caption(path), f"{path.stem}@{float(start):g}s"

    def digest(self, index: int) -> str:
        """What the pictures and sounds of a sample follow from: content of its file, and the place of the window."""
        info, start = self._windows[index]
        path = Path(info.path)
        if path not in self._digests:
            with path.open("rb") as file:
                self._digests[path] = file_digest(file, "sha256").hexdigest()
        return repr((self._digests[path], str(start), self._config.modalities))

    def _cut(self, path: Path) -> list[tuple[MediaInfo, Fraction]]:
        """Windows of one file; none, with a warning, where it cannot be used."""
        try:
            info = probe(path)
        except MediaError as error:
            warnings.warn(f"{path.name} is left out: {error}", stacklevel=4)
            return []
        streams = {"video": info.video, "audio": info.audio}
        lacking = [name for name in self._config.modalities if streams[name] is None]
        lengths = [Fraction(stream.duration) for name in self._config.modalities if (stream := streams[name])]
        # a stream may end half a frame early
        room = min(lengths, default=Fraction(0)) - self._shape.seconds + Fraction(1, 2) / self._shape.rate
        if lacking or room < 0:
            why = (
                f"it has no {' or '.join(lacking)}"
                if lacking
                else f"it is shorter than {float(self._shape.seconds):g} s"
            )
            warnings.warn(f"{path.name} is left out: {why}", stacklevel=4)
            return []
        hop = self._shape.seconds if self._config.hop is None else Fraction(str(self._config.hop))
        # windows start on whole frames
        starts = [round(i * hop * self._shape.rate) / self._shape.rate for i in range(int(room / hop) + 1)]
        return [(info, start) for start in starts]


def _caption(path: Path) -> str:
    text = path.with_suffix(".txt")
    return " ".join(text.read_text(encoding="utf-8").split()) if text.is_file() else ""
