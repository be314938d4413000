"""Flows from what was collected to shards, and a run that begins with a folder of raw clips.

soundstage data curate set                                                    # clips(), the default flow
soundstage data curate set --flow soundstage.recipes.curate:small             # clips of any size, two seconds and more
soundstage train soundstage.recipes.curate:tiny raw=clips steps=20            # raw folder to shards to training
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from soundstage.cli import flows
from soundstage.data.dedup import Dedup
from soundstage.data.embed import Embed
from soundstage.data.fetch import Fetch
from soundstage.data.flow import Flow
from soundstage.data.gates import LIMITS, Gate
from soundstage.data.ledger import Ledger
from soundstage.data.licences import Allowed
from soundstage.data.reading import Shards
from soundstage.data.records import ClipShape, Source
from soundstage.data.scan import Scan
from soundstage.data.shards import Pack, publish
from soundstage.data.shots import Shots
from soundstage.data.sources import OncePerAddress, parse
from soundstage.data.views import Views
from soundstage.recipes import world
from soundstage.training.config import TrainConfig

OF_FILMS = ("small", "few frames", "short", "long", "low rate", "muffled", "still", "frozen", "blurred", "underexposed")
"""Limits that clips made for small models, such as the world's, are not held to."""


def clips() -> Flow:
    """Films of the wild: allowed, fetched, measured once, cut into shots, judged, told apart, encoded, packed."""
    return Flow(
        {
            "licence": Allowed(),
            "once": OncePerAddress(),
            "fetch": Fetch(),
            "scan": Scan(),
            "shots": Shots(),
            "gate": Gate(),
            "dedup": Dedup(),
            "views": Views(),
            "embed": Embed(),
            "pack": Pack(),
        }
    )


def small() -> Flow:
    """The same for clips that small models are trained on: their own size and rates, two seconds and more.

    A material whose licence is not told is let through: it is the user's own.
    """
    return Flow(
        {
            **clips().stages,
            "licence": Allowed(unknown=True),
            "shots": Shots(shortest=2.0),
            "gate": Gate({reason: limit for reason, limit in LIMITS.items() if reason not in OF_FILMS}),
            "views": Views(sizes=((64, 64),), fps="16", sample_rate=16_000, channels=1, loudness=None),
        }
    )


@dataclass(frozen=True)
class Curated:
    """Training clips from raw ones: what a source word names, through a flow, in shards under `folder`.

    All that was done before is found in the folder's ledger, and so are the settings that `soundstage data` gave it;
    `soundstage data funnel` and `report` on the folder tell what became of every clip.
    """

    raw: str
    folder: str = "runs/curated"
    workers: int | None = None

    def build(self, shape: ClipShape) -> Source:
        """Run what is left of the flow, and read the shards."""
        folder = Path(self.folder)
        chosen = flows.choose(folder, f"{__name__}:{small.__name__}")
        with Ledger.open(folder) as ledger:
            ledger.add(parse(self.raw))
            chosen.remember(folder)
            flow = chosen.flow()
            flows.run_shown(flow, ledger, workers=self.workers)
            publish(ledger.results(flow, "pack"), folder / "shards")
        return Shards(str(folder / "shards")).build(shape)


def tiny(raw: str = "clips", folder: str = "runs/curated") -> TrainConfig:
    """The tiny joint model on a folder of raw clips, captions in a .txt beside each: curated, packed, encoded, learnt.

    soundstage train soundstage.recipes.curate:tiny raw=clips steps=20

    Hardware: a CPU. Number reached: none, it begins where `world:tiny` does.
    """
    config = world.tiny()
    data = replace(config.data, source=Curated(raw, folder), codec=world.WorldCodec(model="world-tiny"), num=None)
    return replace(config, name="curated-tiny", data=data, steps=2000, batch_size=16, precision="fp32", validate=None)
