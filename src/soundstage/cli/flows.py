"""The flow of a dataset folder: which function makes it, with which settings, remembered; and a run of it, shown."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from soundstage.cli.progress import Advance
    from soundstage.data.flow import Flow
    from soundstage.data.ledger import Ledger
    from soundstage.data.reach import Count
    from soundstage.data.runner import Crew, Progress, Work

DEFAULT = "soundstage.recipes.curate:clips"
FILE = "flow.json"


@dataclass(frozen=True)
class Chosen:
    """A flow by name and settings, "stage.field=value"."""

    name: str
    settings: tuple[str, ...]

    def flow(self) -> Flow:
        """Raises ConfigError for a name or a setting that there is not."""
        from soundstage.core.errors import ConfigError
        from soundstage.data.flow import Flow

        flow = _function(self.name)()
        if not isinstance(flow, Flow):
            raise ConfigError(f"flow: {self.name} returned {type(flow).__name__}, not a Flow")
        if not self.settings:
            return flow
        from soundstage.training.overrides import override

        for text in self.settings:
            key, sign, _ = text.partition("=")
            if not sign or "." not in key:
                stage = next(iter(flow.stages))
                raise ConfigError(f"setting {text!r} is not stage.field=value, such as {stage}.field=value")
        return Flow(override(dict(flow.stages), self.settings))

    def remember(self, folder: Path) -> None:
        """For the next command on this dataset."""
        folder.mkdir(parents=True, exist_ok=True)
        told = json.dumps({"flow": self.name, "settings": list(self.settings)}, indent=1) + "\n"
        aside = folder / f".{FILE}.part"
        aside.write_text(told, encoding="utf-8")
        aside.replace(folder / FILE)


def choose(folder: Path, name: str | None, settings: Sequence[str] = (), *, forget: bool = False) -> Chosen:
    """The flow asked for, or that of the command before, with its settings and these on top."""
    path = folder / FILE
    told: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    before = told.get("settings", []) if name in (None, told.get("flow")) and not forget else []
    merged = {text.partition("=")[0]: text for text in [*before, *settings]}
    return Chosen(name or told.get("flow", DEFAULT), tuple(merged.values()))


def run_shown(
    flow: Flow,
    ledger: Ledger,
    label: str = "curating",
    workers: int | None = None,
    crew: Callable[[Work], Crew] | None = None,
) -> list[Count]:
    """`data.runner.run` with its progress on stderr, where there is anything to do; the funnel."""
    from soundstage.cli.progress import progress
    from soundstage.data.runner import run

    with ExitStack() as stack:

        @cache
        def advance() -> Advance:
            return stack.enter_context(progress(label, 0))

        def on_progress(now: Progress) -> None:
            if now.done + now.left:
                advance().reach(now.done, _note(now), total=now.done + now.left)

        return run(flow, ledger, workers=workers, crew=crew, on_progress=on_progress)


def _note(now: Progress) -> str:
    told = [f"{count} {name}" for name, count in now.outcomes.items() if name != "done"]
    rate = f"{now.rate:.1f}/s"
    remaining = f"about {_span(now.left / now.rate)} left" if now.left and now.rate > 0 else ""
    return ", ".join(part for part in (rate, remaining, *told) if part)


def _span(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _function(name: str) -> Any:  # noqa: ANN401
    from soundstage.core.errors import ConfigError, one_of

    module, _, function = name.partition(":")
    if not function:
        raise ConfigError(f"flow: {name!r} is not module:function, for example {DEFAULT}")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # a flow file of the user lies where the command is given
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not (module == error.name or module.startswith(error.name + ".")):
            raise
        raise ConfigError(f"flow: there is no module {error.name!r}; it must be importable from here") from None
    if not hasattr(found, function):
        public = [key for key, value in vars(found).items() if callable(value) and value.__module__ == module]
        raise one_of(f"flow: function of {module}", function, public)
    return getattr(found, function)
