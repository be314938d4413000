"""Capacity and cost before a byte is fetched: clips to hours, bytes, days of download, cores and GPUs, and money.

Every figure is a product of rates that can be measured (`soundstage data ... ` prints them, benchmarks/results has
ours) and of the formulas below. Units are SI: 1 TB is 10^12 bytes, 1 Gbps is 10^9 bits a second.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil

from soundstage.core.errors import ConfigError

DAY = 86400.0
MONTH = 365.25 / 12


def video_tokens(frames: int, height: int, width: int, temporal: int = 4, spatial: int = 16, patch: int = 2) -> int:
    """Tokens of a clip under a causal video codec: (1 + (frames - 1) / temporal) rows of ceil(H / (spatial patch)) ...

    temporal, spatial: strides of the codec. Raises ConfigError for frames that are not 1 + a multiple of `temporal`.
    """
    if (frames - 1) % temporal:
        near = 1 + round((frames - 1) / temporal) * temporal
        raise ConfigError(f"frames: {frames} is not 1 + a multiple of {temporal}; use {near}")
    side = spatial * patch
    return (1 + (frames - 1) // temporal) * ceil(height / side) * ceil(width / side)


@dataclass(frozen=True)
class Tower:
    """A transformer over one modality. width; depth; ffn: hidden of the MLP (gated: with a third matrix).

    text, text_width: rows of text that every layer reads, 0 = none. other, other_width: tokens of the other modality
    that every layer reads, through an attention of this width, and their width.
    """

    width: int
    depth: int
    ffn: int
    text: int = 0
    text_width: int = 0
    other: int = 0
    other_width: int = 0
    gated: bool = False

    def forward(self, tokens: int) -> float:
        """FLOP of one call on one sample, two per multiply-add: projections, attention over all pairs, MLP, reading."""
        d, length = self.width, tokens
        own = 8 * length * d * d + 4 * length * length * d
        mlp = (6 if self.gated else 4) * length * d * self.ffn
        reading = 0.0
        if self.text:
            reading += 4 * length * d * d + 4 * self.text * self.text_width * d + 4 * length * self.text * d
        if self.other:
            reading += 4 * length * d * d + 4 * self.other * self.other_width * d + 4 * length * self.other * d
        return float(self.depth * (own + mlp + reading))


def training(forward: float, *, recompute: bool = True) -> float:
    """FLOP of one sample in training: a backward pass costs two forward ones, and full checkpointing one more."""
    return forward * (4 if recompute else 3)


@dataclass(frozen=True)
class Fleet:
    """Accelerators. peak: TFLOP/s of each in the type used. share: of it that is reached, 0.35 to 0.45 in training.

    price: money per hour of each.
    """

    gpus: int
    peak: float = 312.0
    share: float = 0.4
    price: float = 2.0

    def __post_init__(self) -> None:
        _positive("Fleet", gpus=self.gpus, peak=self.peak, share=self.share)

    def days(self, flop: float) -> float:
        """Of so many FLOP."""
        return flop / (self.gpus * self.peak * 1e12 * self.share) / DAY

    def cost(self, days: float) -> float:
        """Money for so many days."""
        return self.gpus * 24 * days * self.price


@dataclass(frozen=True)
class Data:
    """Clips as they are kept. mbps: of a clip's file. kept: share of what is fetched that passes the filters.

    raw_mbps, raw_seconds: of what is fetched for one clip that is tried, None = the clip itself.
    """

    clips: float
    seconds: float
    mbps: float = 1.0
    kept: float = 0.3
    raw_mbps: float | None = None
    raw_seconds: float | None = None

    def __post_init__(self) -> None:
        _positive("Data", clips=self.clips, seconds=self.seconds, mbps=self.mbps, kept=self.kept)
        if self.kept > 1:
            raise ConfigError(f"Data.kept: {self.kept} is a share, at most 1")

    @property
    def hours(self) -> float:
        """Of picture and sound."""
        return self.clips * self.seconds / 3600

    @property
    def tried(self) -> float:
        """Clips that go into the filters."""
        return self.clips / self.kept

    @property
    def bytes(self) -> float:
        """Of the clips."""
        return self.clips * self.seconds * self.mbps * 1e6 / 8

    @property
    def fetched(self) -> float:
        """Bytes that are downloaded."""
        seconds = self.seconds if self.raw_seconds is None else self.raw_seconds
        mbps = self.mbps if self.raw_mbps is None else self.raw_mbps
        return self.tried * seconds * mbps * 1e6 / 8

    def download(self, gbps: float) -> float:
        """Days at so many gigabits a second."""
        _positive("bandwidth", gbps=gbps)
        return self.fetched * 8 / (gbps * 1e9) / DAY


@dataclass(frozen=True)
class Prices:
    """Money: per core-hour, per TB and month kept, per TB that comes in."""

    core_hour: float = 0.04
    tb_month: float = 20.0
    tb_in: float = 0.0


RATES: Mapping[str, float] = {"scan": 3.0, "cut and encode": 0.25, "pack": 20.0}
"""Clips that one core works on in a second, by stage: set them to what was measured on the machine at hand."""


def cores_days(data: Data, cores: int, rates: Mapping[str, float] = RATES) -> dict[str, float]:
    """Days of each stage on so many cores; the first is of all clips that are tried, the others of those kept."""
    _positive("cores", cores=cores, **rates)
    stages = list(rates)
    return {
        name: (data.tried if name == stages[0] else data.clips) / rate / cores / DAY for name, rate in rates.items()
    }


def _positive(what: str, **values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ConfigError(f"{what}.{name}: {value} must be above 0")


# A worked example: what was claimed, beside what these formulas give


@dataclass(frozen=True)
class Claim:
    """What was said, what comes out, and what went wrong."""

    said: str
    found: str
    error: str


SEED = Tower(2048, 24, 8192, text=512, text_width=4096)
A100 = Fleet(128, peak=312.0, share=0.4, price=2.0)


def example() -> tuple[Claim, ...]:
    """The arithmetic of a proposal for 78 million samples, computed again."""
    frame = replace(SEED, text=0).forward(1024)
    two, ten = (SEED.forward(tokens) for tokens in (16 * 1024, 80 * 1024))
    samples = 78e6
    wan = SEED.forward(21_800)
    small = SEED.forward(video_tokens(81, 512, 512, 4, 16, 2))
    quoted = Fleet(128, 312.0, 0.5).days(400e12 * samples)
    low, high = Fleet(64, price=2.0).cost(7 * 8), Fleet(128, price=3.0).cost(7 * 12)
    raw = Data(30e6, 10, mbps=12.0, kept=1.0)
    kept = Data(30e6, 10, mbps=0.8, kept=1.0)
    return (
        Claim(
            "400 TFLOP a sample",
            f"forward {frame / 1e12:.2f} TFLOP for one frame, {two / 1e12:.0f} for 2 s and {ten / 1e12:.0f} for 10 s; "
            f"training with checkpointing {training(two) / 1e12:.0f} and {training(ten) / 1e12:.0f}",
            "counted multiply-adds of one frame, forward only, without attention, text or sound",
        ),
        Claim(
            "78 M samples in 18 days on 128 A100",
            f"{quoted:.0f} days for 400 TFLOP each at half of the peak; {A100.days(training(ten) * samples):.0f} days "
            f"for 10 s clips; {A100.days(training(wan) * samples):.0f} behind a codec of 4x8x8, "
            f"{A100.days(training(small) * samples):.1f} behind one of 4x16x16",
            "took the forward pass of two seconds for the training of ten; the codec decides more than the fleet",
        ),
        Claim(
            "option A for 200 to 400 thousand dollars",
            f"{low / 1e3:.0f} to {high / 1e3:.0f} thousand, 64 GPUs for 8 weeks at 2 $ to 128 for 12 weeks at 3 $",
            "the dearest case was left out",
        ),
        Claim(
            "780 TB fetched in 60 days through a line of 100 Gbps",
            f"{780e12 * 8 / (60 * DAY) / 1e9:.1f} Gbps on average",
            "a factor of 83; and at 1 $ per GB such traffic alone costs 780 thousand dollars",
        ),
        Claim(
            "450 TB for 30 M clips of 10 s",
            f"{raw.bytes / 1e12:.0f} TB at 12 Mbps, {kept.bytes / 1e12:.0f} TB at 0.8",
            "the size of raw files for clips of 512 pixels at 8 frames a second",
        ),
        Claim(
            "1 PB over 10 Gbps in 10 days",
            f"{1e15 * 8 / 10e9 / DAY:.1f} days",
            "none",
        ),
        Claim(
            "600 thousand clips a day",
            f"{10 * 60 * 50 * 20 / 1e3:.0f} thousand: 10 a minute on 50 machines for 20 hours",
            "none",
        ),
    )
