"""A procedural audio-video world: endless, deterministic by seed, with exact ground truth and a blind oracle."""

from soundstage.world.captions import caption, parse
from soundstage.world.render import Rendered, render, stream_item
from soundstage.world.spec import KINDS, Scene, is_held_out, sample_scene
from soundstage.world.stage import Event

__all__ = [
    "KINDS",
    "Event",
    "Rendered",
    "Scene",
    "caption",
    "is_held_out",
    "parse",
    "render",
    "sample_scene",
    "stream_item",
]
