"""What each kind of scene does on the stage."""

from __future__ import annotations

from collections.abc import Callable

from soundstage.world.kinds import bounce, controls, drums, engine, metronome, roll, talker, typing
from soundstage.world.spec import Scene
from soundstage.world.stage import Stage

PERFORM: dict[str, Callable[[Stage, Scene], None]] = {
    "bounce": bounce.perform,
    "duet": bounce.duet,
    "metronome": metronome.perform,
    "drums": drums.perform,
    "engine": engine.perform,
    "typing": typing.perform,
    "talker": talker.perform,
    "roll": roll.perform,
    "silent": controls.silent,
    "offscreen": controls.offscreen,
}
