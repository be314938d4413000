"""The blind oracle: reads a rendered or generated clip without its truth, and scores it against a prompt."""

from soundstage.world.oracle.matching import Match, chance_f1, match
from soundstage.world.oracle.observe import Observation, observe
from soundstage.world.oracle.score import evaluate_clip, score

__all__ = ["Match", "Observation", "chance_f1", "evaluate_clip", "match", "observe", "score"]
