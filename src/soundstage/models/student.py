"""What a distilled model says of itself beside its weights: NAME.sampling.json next to NAME.safetensors.

The weights of a student of Ovi or Wan lie in the published format, so nothing in them says that it wants four calls and
no guidance. This file does; the loaders read it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from soundstage.core.causal import Chunking
from soundstage.core.errors import WeightsError
from soundstage.core.system import Sampling
from soundstage.models.system import CONVENTIONS, sampling_from, sampling_to


@dataclass(frozen=True)
class Student:
    """A distilled model. sampling: how it is sampled.

    base: {"name", "sha256"} of its teacher, by models.weights.fingerprint. causal: it makes clips chunk after chunk.
    """

    name: str
    sampling: Sampling
    base: Mapping[str, str] | None = None
    causal: Chunking | None = None


def beside(weights: Path) -> Path:
    """Where the description of a weight file (or of an index of shards) lies."""
    return weights.with_name(f"{weights.name.partition('.')[0]}.sampling.json")


def write_student(weights: Path, student: Student) -> Path:
    """Describe the student whose weights are at that path; returns the file."""
    told = {
        "name": student.name,
        "sampling": sampling_to(student.sampling),
        "conventions": CONVENTIONS,
    }
    if student.base is not None:
        told["base"] = dict(student.base)
    if student.causal is not None:
        told["causal"] = student.causal.written()
    path = beside(weights)
    path.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    return path


def read_student(weights: Path) -> Student | None:
    """The student whose weights are at that path; None where nothing says that they are one's.

    Raises WeightsError for a description that cannot be read.
    """
    path = beside(weights)
    if not path.is_file():
        return None
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        if told["conventions"] != CONVENTIONS:
            raise WeightsError(f"{path}: was written under other conventions; update soundstage")
        causal = Chunking.read(told["causal"]) if told.get("causal") else None
        return Student(told["name"], sampling_from(told["sampling"]), told.get("base"), causal)
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(
            f"{path}: does not describe a student ({type(error).__name__}: {error}); export it again"
        ) from error
