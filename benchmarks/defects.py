"""Students trained on exact mixtures, and the same trainings with one mistake each: do the gates tell them apart?

    python benchmarks/defects.py                 # trains what the file of results lacks, then prints the table
    python benchmarks/defects.py --only dmd      # names that begin like this; "joint" are the pairs
    python benchmarks/defects.py --table         # only the table

A score is a sliced 2-Wasserstein distance with one call and with four. About half a minute of processor time each; what
was measured before is kept, so that a stopped run goes on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from measure import commit, machine, table, today

from soundstage.testing import defects_dmd, defects_flow
from soundstage.testing.defects_flow import Trial, measure

FAR = 1000.0  # the ring has a radius of 2
OUT = Path(__file__).parent / "results" / "defects.json"


def trials(seeds: int) -> Iterator[tuple[str, str, Trial, int]]:
    """(kind, name, trial, seed): the right objectives with several seeds, then the wrong ones with one."""
    for module in (defects_flow, defects_dmd):
        for name, trial in module.TRIALS.items():
            for seed in range(seeds):
                yield "right", name, trial, seed
    for module in (defects_flow, defects_dmd):
        for name, defect in module.DEFECTS.items():
            yield "defect", name, defect.wrong, 0


def command(
    only: Annotated[str, typer.Option(help="Names that begin like this.")] = "",
    seeds: Annotated[int, typer.Option(help="Of every right objective.")] = 3,
    out: Annotated[Path, typer.Option(help="File of the results, JSON.")] = OUT,
    show: Annotated[bool, typer.Option("--table", help="Only print the table.")] = False,
) -> None:
    """Measure what the file lacks, and print the table."""
    torch.set_num_threads(1)
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {"rows": []}
    done = {(row["kind"], row["name"], row["seed"]) for row in found["rows"]}
    for kind, name, trial, seed in trials(seeds):
        if show or (kind, name, seed) in done or not name.startswith(only):
            continue
        got = measure(trial, seed)
        row = {"kind": kind, "name": name, "seed": seed, "seconds": round(got.seconds, 1)}
        row |= {f"calls_{n}": round(x, 4) if math.isfinite(x) else None for n, x in got.scores.items()}
        row |= {"gates": {str(n): gate for n, gate in trial.gates.items()}}
        row["as_it_should"] = got.passes(trial.gates) if kind == "right" else got.caught(trial.gates)
        found |= {"date": today(), **commit(), "machine": machine(torch.device("cpu"))}
        found["rows"].append(row)
        out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        typer.echo(f"  {kind} {name}, seed {seed}: {got}", err=True)
    if not show and "joint".startswith(only):
        _joint(found, out)
    typer.echo(table(found["rows"], COLUMNS))
    typer.echo("\n" + table(found.get("joint", []), PAIRS))
    if not all(row["as_it_should"] for row in (*found["rows"], *found.get("joint", []))):
        raise typer.Exit(1)


def _joint(found: dict[str, Any], out: Path) -> None:
    """Two rings whose blobs are paired: students of joint scores, and of scores that cannot see the pairs."""
    rows = found.setdefault("joint", [])
    done = {(row["name"], row["seed"]) for row in rows}
    for name, trial in COUPLINGS.items():
        for seed in (1, 2):
            if (name, seed) in done:
                continue
            got = defects_dmd.couple(trial, seed)
            row: dict[str, Any] = {"name": name, "seed": seed, "agreement": round(got.agreement, 4)}
            row |= {m: round(x, 4) for m, x in got.distance.items()} | {"seconds": round(got.seconds, 1)}
            beside = [other["audio"] for other in rows if other["name"] == PAIRED and other["seed"] == seed]
            row["as_it_should"] = {
                JOINT: got.agreement >= 0.7,
                APART: got.agreement <= 0.2,
                PAIRED: got.agreement >= 0.7,
                UNHEARD: bool(beside) and row["audio"] >= 1.5 * beside[0],
            }[name]
            rows.append(row)
            out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            typer.echo(f"  {name}, seed {seed}: {got}", err=True)


JOINT, APART = "joint scores, from the product of marginals", "each modality scored by itself, from the same"
PAIRED, UNHEARD = "joint scores, from the pairs", "the same, weight of dmd/audio 0"
COUPLINGS = {
    JOINT: defects_dmd.Coupling(),
    APART: defects_dmd.Coupling(apart=True),
    PAIRED: defects_dmd.Coupling(paired=True),
    UNHEARD: defects_dmd.Coupling(paired=True, weights={"dmd/audio": 0.0}),
}
GATES = {JOINT: "agreement >= 0.7", APART: "agreement <= 0.2", PAIRED: "agreement >= 0.7", UNHEARD: "audio >= 1.5 x"}
PAIRS = {
    "scores": lambda row: row["name"],
    "seed": lambda row: str(row["seed"]),
    "agreement": lambda row: f"{row['agreement']:.2f}",
    "video": lambda row: f"{row['video']:.3f}",
    "audio": lambda row: f"{row['audio']:.3f}",
    "gate": lambda row: GATES[row["name"]],
    "verdict": lambda row: "as it should" if row["as_it_should"] else "NOT as it should",
    "CPU s": lambda row: f"{row['seconds']:.0f}",
}


def _score(calls: int) -> Any:  # noqa: ANN401
    def shown(row: Any) -> str:  # noqa: ANN401
        found = row[f"calls_{calls}"]
        return "diverged" if found is None or found > FAR else f"{found:.3f}"

    return shown


COLUMNS = {
    "": lambda row: row["kind"],
    "objective": lambda row: row["name"],
    "seed": lambda row: str(row["seed"]),
    "one call": _score(1),
    "four calls": _score(4),
    "gate": lambda row: ", ".join(f"{gate} at {calls}" for calls, gate in row["gates"].items()),
    "verdict": lambda row: (
        {True: "passes", False: "MISSES"}[row["as_it_should"]]
        if row["kind"] == "right"
        else {True: "caught", False: "MISSED"}[row["as_it_should"]]
    ),
    "CPU s": lambda row: f"{row['seconds']:.0f}",
}

if __name__ == "__main__":
    typer.run(command)
