"""One flow with every fate, on processes with SQLite, on processes with PostgreSQL, and on a Ray cluster."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from soundstage.data.flow import Flow, Item
from soundstage.data.ledger import Ledger
from soundstage.data.reach import Count
from soundstage.data.runner import run
from soundstage.testing.stages import Bundle, Gate, Once, Split, Stumble, counted, numbers

pytestmark = pytest.mark.filterwarnings("ignore::Warning:ray")
PLAIN = 12
FATES = {
    100: "transient",
    101: "error",
    102: "poison",
    103: "segfault",
    104: "kill",
    105: "exit",
    106: "nothing",
}


@dataclass
class Backend:
    """Where a flow runs."""

    ledger: Ledger
    folder: Path
    options: dict[str, Any]

    def run(self, flow: Flow) -> tuple[Count, ...]:
        return run(flow, self.ledger, backoff=0.05, **self.options)

    def log(self, name: str) -> str:
        return str(self.folder / name)


@pytest.fixture(
    scope="module",
    params=["pool", pytest.param("postgres", marks=pytest.mark.slow), pytest.param("ray", marks=pytest.mark.slow)],
)
def backend(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    folder = tmp_path_factory.mktemp(request.param)
    url = request.getfixturevalue("postgres").database() if request.param == "postgres" else folder / "set"
    options: dict[str, Any] = {"workers": 2}
    if request.param == "ray":
        options = {"crew": request.getfixturevalue("ray_cluster")}
    (folder / "memory").mkdir()
    with Ledger.open(url, folder / "set") as ledger:
        yield Backend(ledger, folder, options)


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[Any]:
    ray = pytest.importorskip("ray", reason="RAY IS NOT TESTED: pip install 'soundstage[cluster]'")
    from soundstage.data.cluster import ray_crew

    quiet = {"log_to_driver": False, "configure_logging": False, "include_dashboard": False}
    ray.init(num_cpus=2, _node_ip_address="127.0.0.1", **quiet)
    yield ray_crew(2)
    ray.shutdown()


def made(backend: Backend) -> Flow:
    return Flow(
        {
            "stumble": Stumble(str(backend.folder / "memory")),
            "split": Split(pieces=3, without=(2,), log=backend.log("split")),
            "gate": Gate(below=105, even=True, log=backend.log("gate")),
            "once": Once(modulo=20),
            "pack": Bundle(size=4, log=backend.log("pack")),
        }
    )


@pytest.fixture(scope="module")
def funnel(backend: Backend) -> dict[str, Count]:
    """Of the first run of the flow."""
    backend.ledger.add(numbers(PLAIN))
    backend.ledger.add(Item(facts={"n": n, "fate": fate}) for n, fate in FATES.items())
    return {line.name: line for line in backend.run(made(backend))}


def test_every_line_sums_to_what_entered_it(funnel: dict[str, Count]) -> None:
    for line in funnel.values():
        assert line.entered == line.passed + sum(line.dropped.values()) + line.poisoned + line.failed + line.waiting
        assert line.waiting == 0


def test_each_fate_has_its_end(backend: Backend, funnel: dict[str, Count]) -> None:
    line = funnel["stumble"]
    assert (line.entered, line.passed, line.poisoned, line.failed, line.dropped) == (19, 17, 1, 0, {"nothing": 1})
    calls = {item.facts["n"]: item.facts["calls"] for item in backend.ledger.results(made(backend), "stumble")}
    assert calls == {n: 1 for n in range(PLAIN)} | {n: 2 for n in (100, 101, 103, 104, 105)}


def test_quarantine_names_the_poisoned_item_and_why(backend: Backend, funnel: dict[str, Count]) -> None:
    assert funnel["stumble"].poisoned == 1
    (found,) = backend.ledger.quarantine(made(backend))
    assert (found.stage, found.state, found.reason, found.attempts) == ("stumble", "poisoned", "it says poison", 1)
    assert found.items[0].facts["n"] == 102
    assert "Poison" in (found.error or "")


def test_a_killed_worker_costs_an_attempt_of_its_own_item_alone(backend: Backend, funnel: dict[str, Count]) -> None:
    assert funnel
    attempts = {}
    for item in backend.ledger.sources():
        for step in backend.ledger.history(item.id)[1]:
            attempts[item.facts["n"]] = (step.attempts, step.state)
    assert {n: told for n, told in attempts.items() if told[0] > 1} == {
        n: (2, "done") for n in (100, 101, 103, 104, 105)
    }


def test_one_item_becomes_many_in_order_and_pieces_are_counted(backend: Backend, funnel: dict[str, Count]) -> None:
    line = funnel["split"]
    assert (line.passed, line.made, line.cut, line.dropped) == (17, 34, {"unwanted": 17}, {})
    item = backend.ledger.results(made(backend), "stumble")[0]
    (step,) = [step for step in backend.ledger.history(item.id)[1] if step.stage == "split"]
    pieces = [backend.ledger.item(each).facts["piece"] for each, _ in step.outputs]
    assert (pieces, [reason for _, reason in step.outputs]) == ([0, 1, 2], [None, None, "unwanted"])


def test_drops_keep_reason_and_score(backend: Backend, funnel: dict[str, Count]) -> None:
    assert funnel["gate"].dropped == {"high": 2, "odd": 16}
    found = [each for each in backend.ledger.dropped(made(backend), "gate") if each.reason == "high"]
    assert [(each.score, each.item.facts["n"]) for each in found] == [(105.0, 105)] * 2


def test_groups_are_formed_once_all_before_is_done(backend: Backend, funnel: dict[str, Count]) -> None:
    once, pack = funnel["once"], funnel["pack"]
    kept = {0, 2, 4, 6, 8, 10}
    assert (once.entered, once.passed, once.dropped) == (16, 6, {"duplicate": 10})
    assert {item.facts["n"] for item in backend.ledger.results(made(backend), "once")} == kept
    assert (pack.entered, pack.passed, pack.made) == (6, 6, 2)
    counts = sorted(item.facts["count"] for item in backend.ledger.results(made(backend)))
    assert counts == [2, 4]


def test_a_second_run_has_nothing_to_do(backend: Backend, funnel: dict[str, Count]) -> None:
    before = counted(backend.log("split"))
    assert {line.name: line for line in backend.run(made(backend))} == funnel
    assert counted(backend.log("split")) == before == 17


def test_a_changed_parameter_runs_what_depends_on_it_and_back_again_nothing(
    backend: Backend, funnel: dict[str, Count]
) -> None:
    flow = made(backend)
    wide = Flow({**flow.stages, "gate": replace(flow.stages["gate"], below=1000)})
    logs = {name: counted(backend.log(name)) for name in ("split", "gate", "pack")}
    shards = [json.dumps(dict(item.digests)) for item in backend.ledger.results(flow)]
    after = {line.name: line for line in backend.run(wide)}
    assert after["gate"].dropped == {"odd": 18}
    assert (after["split"], counted(backend.log("split"))) == (funnel["split"], logs["split"])
    assert counted(backend.log("gate")) == 2 * logs["gate"]
    packed = counted(backend.log("pack"))
    assert {line.name: line for line in backend.run(flow)} == funnel
    assert (counted(backend.log("gate")), counted(backend.log("pack"))) == (2 * logs["gate"], packed)
    assert [json.dumps(dict(item.digests)) for item in backend.ledger.results(flow)] == shards


def test_too_many_attempts_end_in_quarantine_and_can_be_retried(backend: Backend, funnel: dict[str, Count]) -> None:
    assert funnel
    flow = Flow({"always": Stumble(str(backend.folder / "memory"), times=6)})
    (line,) = backend.run(flow)
    assert (line.passed, line.failed, line.poisoned) == (PLAIN, 5, 1)
    found = {each.items[0].facts["n"]: each for each in backend.ledger.quarantine(flow)}
    assert found[101].attempts == 3
    assert "RuntimeError: stumbled" in (found[101].error or "")
    assert backend.ledger.retry(flow) == 5
    (line,) = backend.run(flow)
    assert (line.passed, line.failed, line.poisoned) == (PLAIN + 5, 0, 1)
