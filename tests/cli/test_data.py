"""`soundstage data`: thin commands over the ledger, that remember a dataset's flow and go on where they stopped."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., tuple[int, str, str]]
STAGES = '''
from dataclasses import dataclass
from typing import ClassVar
from soundstage.data.flow import Drop, Flow, Poison
from soundstage.testing.stages import Bundle

@dataclass(frozen=True)
class Read:
    """Reads "TOY <length>", a line's end, and a text of that length."""
    version: ClassVar[int] = 1

    def __call__(self, item, folder):
        head, _, text = item.files["media"].read_bytes().partition(b"\\n")
        length = int(head.removeprefix(b"TOY "))
        if length != len(text):
            raise Poison(f"truncated: {len(text)} of {length} bytes")
        path = folder / "text.txt"
        path.write_bytes(text)
        yield item.child({"text": path}).without("media")

@dataclass(frozen=True)
class Tag:
    """Drops texts that are longer than a limit."""
    version: ClassVar[int] = 1
    longest: int = 6

    def __call__(self, item, folder):
        size = item.files["text"].stat().st_size
        yield Drop(item, "long", size) if size > self.longest else item.child({"media": item.files["text"]})

def toy():
    return Flow({"fetch": Read(), "scan": Tag(), "bundle": Bundle(size=2)})

def wrong():
    return 3
'''


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run) -> Path:
    """A dataset that holds five texts, of which one is long and one broken."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "toy_flows.py").write_text(STAGES)
    rows = []
    for n, text in enumerate(["one", "two", "three", "a longer text", "cut"]):
        path = tmp_path / f"{n}.toy"
        path.write_text(f"TOY {len(text) + (n == 4)}\n{text}")
        rows.append(path)
    from soundstage.data.flow import Item
    from soundstage.data.ledger import Ledger

    with Ledger.open(tmp_path / "set") as ledger:
        ledger.add(Item({"media": path}, {"source": path.name}) for path in rows)
    code, _, err = run("data", "fetch", tmp_path / "set", "--flow", "toy_flows:toy", "-w", 1)
    assert (code, "fetch: 5/5 in" in err, "1 poisoned" in err) == (0, True, True)
    return tmp_path / "set"


def test_a_flow_is_run_by_stage_and_its_settings_are_remembered(dataset: Path, run: Run) -> None:
    code, out, _ = run("data", "curate", dataset, "scan.longest=3", "-w", 1, "--json")
    lines = {line["name"]: line for line in json.loads(out)}
    assert code == 0
    assert (lines["fetch"]["passed"], lines["fetch"]["poisoned"], lines["scan"]["dropped"]) == (4, 1, {"long": 2})
    assert json.loads((dataset / "flow.json").read_text()) == {"flow": "toy_flows:toy", "settings": ["scan.longest=3"]}
    assert json.loads(run("data", "funnel", dataset, "--json")[1]) == json.loads(out)
    code, out, _ = run("data", "curate", dataset, "bundle.size=1", "-w", 1)
    assert code == 0
    assert [line.split()[:5] for line in out.splitlines()[1:]] == [
        ["fetch", "5", "4", "0", "1"],
        ["scan", "4", "2", "2", "0"],
        ["bundle", "2", "2", "0", "0"],
    ]
    code, out, _ = run("data", "curate", dataset, "--forget", "-w", 1)
    assert out.splitlines()[2].split()[:8] == ["scan", "4", "3", "1", "0", "0", "0", "3"]
    assert out.splitlines()[2].endswith("  1 long")


def test_items_are_listed_and_their_history_is_told(dataset: Path, run: Run) -> None:
    assert run("data", "curate", dataset, "-w", 1)[0] == 0
    rows = [json.loads(line) for line in run("data", "show", dataset, "--json")[1].splitlines()]
    assert (len(rows), list(rows[0]["files"])) == (2, ["shard"])
    code, out, _ = run("data", "show", dataset, rows[0]["id"][:10])
    assert code == 0
    assert "made from\n  bundle: " in out
    assert "\n  fetch: " in out
    told = json.loads(run("data", "show", dataset, rows[0]["id"], "--json")[1])
    assert told["from"][0]["stage"] == "bundle"
    (gone,) = run("data", "show", dataset, "--dropped")[1].splitlines()
    assert gone.endswith("scan  long  13.0")
    (poison,) = run("data", "show", dataset, "--quarantine")[1].splitlines()
    assert "poisoned  1  truncated: 3 of 4 bytes" in poison
    assert len(run("data", "show", dataset, "--sources", "-n", 2)[1].splitlines()) == 2


def test_limits_are_tried_on_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    from soundstage.data.flow import Item
    from soundstage.data.ledger import Ledger

    monkeypatch.syspath_prepend(tmp_path)
    told = "from soundstage.data.flow import Flow\nfrom soundstage.data.gates import LIMITS, Gate\n"
    told += "def gated():\n    return Flow({'gate': Gate({name: LIMITS[name] for name in ('blurred', 'silent')})})\n"
    (tmp_path / "gated_flows.py").write_text(told)
    with Ledger.open(tmp_path / "set") as ledger:
        measures = [(blur, loud) for blur in (0.5, 1.5, 2.5, 3.5) for loud in (-20.0, -65.0)]
        ledger.add(Item(facts={"scan": {"blur": blur, "loudness": loud}}) for blur, loud in measures)
    ask = ("data", "limits", tmp_path / "set", "--flow", "gated_flows:gated")
    counts = json.loads(run(*ask, "--json")[1])["counts"]
    assert counts == {"kept": 3, "blurred": 2, "silent": 3}
    code, out, _ = run(*ask, "gate.limits.blurred.most=2", "gate.limits.silent.least=none")
    assert code == 0
    assert out.splitlines()[1].split() == ["blurred", "blur", "2", "0.5", "2", "3.5", "50.0%", "4"]
    assert out.splitlines()[-1] == "4 of 8 clips are kept"
    assert not (tmp_path / "set" / "flow.json").exists()


def test_damage_is_found(dataset: Path, run: Run) -> None:
    assert run("data", "validate", dataset)[:2] == (0, "4 files: no problems\n")
    stored = sorted((dataset / "store").rglob("*.txt"))
    stored[0].chmod(0o644)
    stored[0].write_text("other")
    stored[1].unlink()
    code, out, _ = run("data", "validate", dataset)
    assert code == 1
    assert "does not hold what its name says" in out
    assert "is gone" in out
    assert out.splitlines()[-1] == "4 files: 2 problems"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("curate", "set", "scan.longst=3"), "'longst' is not a setting; did you mean 'longest'?"),
        (("curate", "set", "scann.longest=3"), "'scann' is not a setting; did you mean 'scan'?"),
        (("curate", "set", "longest=3"), "setting 'longest=3' is not stage.field=value, such as fetch.field=value"),
        (("curate", "set", "--until", "pack"), "there is no 'pack' in this flow; it has fetch, scan, bundle"),
        (("curate", "set", "--flow", "toy_flows"), "flow: 'toy_flows' is not module:function"),
        (("curate", "set", "--flow", "toy_flow:toy"), "there is no module 'toy_flow'"),
        (("curate", "set", "--flow", "toy_flows:toi"), "did you mean 'toy'?"),
        (("curate", "set", "--flow", "toy_flows:wrong"), "toy_flows:wrong returned int, not a Flow"),
        (("funnel", "empty"), "holds no dataset; begin with soundstage data collect"),
        (("limits", "set"), "limits: the flow has no gate"),
        (("show", "set", "zzz"), "no item has an id that begins with 'zzz'"),
    ],
)
def test_what_is_refused_is_one_sentence(args: tuple[str, ...], said: str, dataset: Path, run: Run) -> None:
    code, out, err = run("data", args[0], dataset.parent / args[1], *args[2:])
    assert (code, out) == (2, "")
    assert said in err
    assert err.startswith("error: ")


def test_sources_are_collected_once(tmp_path: Path, run: Run) -> None:
    lines = [json.dumps({"url": f"https://example.com/{n}.mp4", "licence": "CC0-1.0"}) for n in range(3)]
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    code, out, _ = run("data", "collect", tmp_path / "set", tmp_path / "list.jsonl")
    assert (code, out) == (0, f"3 new items of 3 in {tmp_path / 'set'}\n")
    code, out, _ = run("data", "collect", tmp_path / "set", tmp_path / "list.jsonl")
    assert out == f"0 new items of 3 in {tmp_path / 'set'}\n"
    code, _, err = run("data", "collect", tmp_path / "set", tmp_path / "list.jsonl", "--set", "licence")
    assert (code, "is not name=value" in err) == (2, True)
