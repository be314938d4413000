"""Prompts as training data: all that distribution matching needs, since its samples are the student's own."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from soundstage.core.av import AV
from soundstage.core.batch import Batch, share
from soundstage.core.conditions import Conditions
from soundstage.core.errors import ConfigError
from soundstage.data.batching import Order

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Prompts:
    """A list of prompts. shape: latents of one sample per modality, (C, F, H, W) and (C, A); what is in them is zero.

    file: .txt with a prompt in each line, or .jsonl with one under "prompt" (or "caption"). tokenize: prompts to
    Conditions of one row each. Where that has a `prepare(prompts, progress)`, it is called before the first batch.
    """

    file: str
    tokenize: Callable[[Sequence[str]], Conditions]
    shape: AV[tuple[int, ...]]
    seed: int = 0

    def parse(self, text: str) -> Prompts:
        """The same on another list, by its path."""
        return Prompts(text, self.tokenize, self.shape, self.seed)

    def prepare(self, progress: OnProgress | None = None) -> list[str]:
        """The prompts, encoded where they are kept on disk."""
        prompts = read_prompts(Path(self.file).expanduser())
        ready(self.tokenize, prompts, progress)
        return prompts

    def build(self) -> PromptPool:
        """The prompts in memory, their features on disk."""
        return PromptPool(self.prepare(), self.tokenize, self.shape, self.seed)


class PromptPool:
    """`batch` draws every prompt once per epoch, in an order made from the seed."""

    def __init__(
        self,
        prompts: Sequence[str],
        tokenize: Callable[[Sequence[str]], Conditions],
        shape: AV[tuple[int, ...]],
        seed: int = 0,
    ) -> None:
        self.prompts, self.shape = list(prompts), shape
        self._tokenize = tokenize
        self._order = Order(len(self.prompts), seed)

    def __len__(self) -> int:
        return len(self.prompts)

    def batch(self, step: int, size: int, part: int = 0, of: int = 1) -> Batch:
        """Prompts step * size onwards of the shuffled epochs, or one of `of` equal parts, with latents of zeros."""
        index = self._order.take(step * size, size)[share(size, part, of)].tolist()
        x0 = self.shape.map(lambda shape: torch.zeros(len(index), *shape))
        return Batch(x0, self._tokenize([self.prompts[i] for i in index]), tuple(f"prompt-{i}" for i in index))


def ready(tokenize: Callable[[Sequence[str]], Conditions], prompts: Sequence[str], progress: OnProgress | None) -> None:
    """Let what keeps its answers encode the prompts that it has not met, in one go."""
    prepare = getattr(tokenize, "prepare", None)
    if prepare is not None:
        prepare(prompts, progress)


def read_prompts(file: Path) -> list[str]:
    """The prompts of a list; empty lines are left out. Raises ConfigError for a file that is missing or holds none."""
    if not file.is_file():
        raise ConfigError(f"data.file: there is no file {str(file)!r}; give a .txt with one prompt a line, or .jsonl")
    lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    found = lines if file.suffix != ".jsonl" else [_prompt(file, i, line) for i, line in enumerate(lines, 1)]
    if not found:
        raise ConfigError(f"data.file: {file} holds no prompt; write one in each line")
    return found


def _prompt(file: Path, number: int, line: str) -> str:
    try:
        told = json.loads(line)
        return str(next(told[key] for key in ("prompt", "caption") if key in told))
    except (ValueError, TypeError, StopIteration):
        raise ConfigError(
            f'data.file: line {number} of {file} is not {{"prompt": "..."}}; mend it, or give a .txt'
        ) from None
