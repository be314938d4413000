"""The grammar of captions: a scene in words, with paraphrases, and the fields that a text names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from soundstage.world.spec import COLOURS, DRUMS, VOWELS, Scene

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
TEMPO_WORDS = {60: "slowly", 90: "at a walking pace", 120: "briskly", 160: "fast", 200: "very fast"}

# In each list the first entry is the canonical one.
SIZE_WORDS = {
    "small": ("small", "little", "tiny"),
    "medium": ("medium", "medium-sized", "mid-sized"),
    "large": ("large", "big", "huge"),
}
MATERIAL_WORDS = {
    "metal": ("metal", "metallic"),
    "wood": ("wooden", "wood"),
    "glass": ("glass",),
    "rubber": ("rubber",),
}
SHAPE_WORDS = {"disc": ("ball", "disc"), "square": ("cube", "square", "block"), "triangle": ("triangle", "wedge")}
COLOUR_SYNONYMS = {"violet": "purple", "turquoise": "cyan"}
TREND_PHRASES = {
    "engine": {
        "idle": ("a {thing} idles", "a {thing} runs at a steady speed", "an idling {thing}"),
        "rev": ("a {thing} revs up", "a {thing} spins faster and faster", "revving up, a {thing} spins"),
        "brake": ("a {thing} slows down", "a {thing} spins slower and slower", "slowing down, a {thing} spins"),
    },
    "roll": {
        "start": (
            "a {thing} starts to roll to the {side}",
            "a {thing} rolls {side}, speeding up",
            "from rest, a {thing} rolls to the {side}",
        ),
        "stop": (
            "a {thing} rolls to the {side} and stops",
            "a {thing} rolls {side} until it stops",
            "rolling to the {side}, a {thing} comes to a halt",
        ),
        "back": (
            "a {thing} rolls to the {side} and comes back",
            "a {thing} rolls {side} and then back again",
            "rolling to the {side} and back, a {thing} rumbles",
        ),
    },
}
TEMPLATES = {
    "bounce": (
        "a {thing} bounces {times}",
        "a {thing} hits the floor {times}",
        "a falling {thing} bounces {times}",
        "a {thing} drops and bounces {times}",
        "{bounces} of a {thing}",
    ),
    "metronome": (
        "a {thing} ticks {tempo}",
        "a {thing} swings and ticks {tempo}",
        "a ticking {thing} swings {tempo}",
        "a {thing} keeps time {tempo}",
    ),
    "drums": (
        "{colour} drums play {pattern} {tempo}",
        "a {colour} drum kit plays {pattern} {tempo}",
        "{pattern} on {colour} drums {tempo}",
        "a stick hits {colour} drums {tempo}: {pattern}",
    ),
    "typing": (
        "the {side} hand types {keys} on a {thing}",
        "{keys} are pressed on the {side} of a {thing}",
        "a {side} hand presses {keys} of a {thing}",
        "typing {keys} with the {side} hand on a {thing}",
    ),
    "talker": (
        "a {thing} says {pattern}",
        "a {thing} sings {pattern}",
        "{pattern}, says a {thing}",
        "a talking {thing}: {pattern}",
    ),
    "silent": (
        "a {thing} floats silently",
        "a {thing} drifts without a sound",
        "in silence, a {thing} floats",
        "a silent {thing} hovers",
    ),
    "offscreen": (
        "something {material} knocks {times} off screen",
        "off screen, something {material} knocks {times}",
        "an unseen {material} thing knocks {times}",
        "out of sight, a {material} object knocks {times}",
    ),
}
DUETS = ("{} and {}", "{} while {}", "{}, {}")
NOUNS = {
    "metronome": ("metronome", "pendulum"),
    "engine": ("engine", "motor"),
    "typing": ("keyboard",),
    "talker": ("face",),
    "roll": ("ball",),
}


class _Writer:
    """Picks one of several wordings: the first without a generator, otherwise at random."""

    def __init__(self, rng: np.random.Generator | None) -> None:
        self.rng = rng

    def pick(self, options: Sequence[str]) -> str:
        return options[0 if self.rng is None else int(self.rng.integers(len(options)))]

    def number(self, n: int) -> str:
        return self.pick((NUMBERS[n], str(n)))

    def times(self, n: int) -> str:
        if n <= 2:
            return self.pick((("once", "one time"), ("twice", "two times", "2 times"))[n - 1])
        return f"{self.number(n)} times"

    def tempo(self, bpm: int) -> str:
        exact = (f"at {bpm} beats per minute", f"at {bpm} bpm")
        return self.pick((*exact, TEMPO_WORDS[bpm]) if bpm in TEMPO_WORDS else exact)

    def thing(self, scene: Scene) -> str:
        """Adjectives in the order size, colour, material, then the noun."""
        words = [self.pick(SIZE_WORDS[scene.size])] if scene.size else []
        words += [scene.colour] if scene.colour else []
        words += [self.pick(MATERIAL_WORDS[scene.material])] if scene.material else []
        nouns = SHAPE_WORDS[scene.shape] if scene.shape else NOUNS[scene.kind]
        return " ".join([*words, self.pick(nouns)])


def caption(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """A sentence that names every field of the scene: the canonical one, or a paraphrase drawn with `rng`.

    Lower case, at most 120 bytes and 20 words.
    """
    if scene.other is not None:
        joint = _Writer(rng).pick(DUETS)
        return joint.format(*(_single(replace(s, kind="bounce", other=None), rng, 1) for s in (scene, scene.other)))
    return _single(scene, rng, None)


def _single(scene: Scene, rng: np.random.Generator | None, num: int | None) -> str:
    """A caption of one source, from the first `num` wordings of its kind (default: all)."""
    say = _Writer(rng)
    templates = TEMPLATES.get(scene.kind) or TREND_PHRASES[scene.kind][scene.trend]
    template = say.pick(templates[:num])
    parts: dict[str, str] = {"colour": scene.colour or "", "side": scene.side or ""}
    if "{thing}" in template:
        parts["thing"] = say.thing(scene)
    if scene.material:
        parts["material"] = say.pick(MATERIAL_WORDS[scene.material])
    if scene.count:
        parts["times"] = say.times(scene.count)
        parts["keys"] = f"{say.number(scene.count)} keys"
        parts["bounces"] = f"{say.number(scene.count)} bounce{'s' if scene.count > 1 else ''}"
    if scene.bpm:
        parts["tempo"] = say.tempo(scene.bpm)
    if scene.pattern:
        parts["pattern"] = " ".join(scene.pattern)
    return re.sub(r"\ba (?=[aeiou])", "an ", template.format(**parts))


KIND_PATTERNS = (
    ("offscreen", r"off[ -]?screen|unseen|out of sight|hidden"),
    ("silent", r"silent|silently|silence|without (a )?sound|soundless|mute"),
    ("metronome", r"metronome|pendulum"),
    ("drums", r"drums?|kick|snare|toms?"),
    ("typing", r"typ(es|ing|ed)|keyboard|keys"),
    ("engine", r"engine|motor"),
    ("talker", r"face|says|talking|talks|sings"),
    ("roll", r"rolls?|rolling|rolled"),
    ("bounce", r"bounc(e|es|ing)|hits? the (floor|ground)|drops?|falls?|falling"),
)
TREND_PATTERNS = {
    "engine": (
        ("idle", r"idl(es|ing|e)|steady|steadily"),
        ("rev", r"rev(s|ving)?|faster|accelerat\w+|speeds up"),
        ("brake", r"slow(s|ing)?|slower|brak\w+|stops"),
    ),
    "roll": (("back", r"back"), ("stop", r"stops?|halt|slows"), ("start", r"starts?|speed(s|ing) up|from rest")),
}
_NUMBER = "|".join((*NUMBERS, r"\d+"))


def _find(table: Sequence[tuple[str, str]], text: str) -> str | None:
    return next((name for name, pattern in table if re.search(rf"\b({pattern})\b", text)), None)


def _word(options: dict[str, tuple[str, ...]], text: str) -> str | None:
    return _find([(name, "|".join(words)) for name, words in options.items()], text)


def _integer(text: str) -> int:
    return int(text) if text.isdigit() else NUMBERS.index(text)


def _count(text: str) -> int | None:
    if re.search(r"\bonce\b", text):
        return 1
    if re.search(r"\btwice\b", text):
        return 2
    found = re.search(rf"\b({_NUMBER}) (times?|bounces?|impacts?|knocks?|keys?|hits?)\b", text)
    return _integer(found[1]) if found else None


def _bpm(text: str) -> int | None:
    found = re.search(r"\b(\d+) ?(bpm|beats per minute|beats a minute|ticks per minute)\b", text)
    if found:
        return int(found[1])
    longest = sorted(TEMPO_WORDS.items(), key=lambda item: -len(item[1]))
    return next((bpm for bpm, word in longest if re.search(rf"\b{word}\b", text)), None)


def parse(text: str) -> dict[str, object]:
    """The fields that a caption names, with the names and values of `Scene.fields`; unknown words are ignored."""
    text = " ".join(text.lower().replace("hi-hat", "hat").split())
    parts = [_read(part) for part in re.split(r" and | while |, ", text)]
    if len(parts) == 2 and all({"kind", "shape", "count"} <= part.keys() for part in parts):
        return {**parts[0], "kind": "duet", "other": parts[1]}
    return _read(text)


def _read(text: str) -> dict[str, object]:
    """The fields that one clause names."""
    found: dict[str, object | None] = {"kind": _find(KIND_PATTERNS, text)}
    kind = found["kind"]
    found["colour"] = _find([(c, c) for c in COLOURS] + [(c, word) for word, c in COLOUR_SYNONYMS.items()], text)
    found["size"] = _word(SIZE_WORDS, text)
    found["material"] = _word(MATERIAL_WORDS, text)
    found["shape"] = _word(SHAPE_WORDS, text) if kind in ("bounce", "silent") else None
    found["count"] = _count(text) if kind in ("bounce", "typing", "offscreen") else None
    found["bpm"] = _bpm(text) if kind in ("metronome", "drums") else None
    words = {"drums": DRUMS, "talker": VOWELS}.get(str(kind), ())
    found["pattern"] = tuple(w for w in re.findall(r"[a-z]+", text) if w in words) or None
    found["trend"] = _find(TREND_PATTERNS[str(kind)], text) if kind in TREND_PATTERNS else None
    found["side"] = _find((("left", "left"), ("right", "right")), text) if kind in ("typing", "roll") else None
    return {name: value for name, value in found.items() if value is not None}
