"""`benchmarks/ovi.py` at its smallest: every section gives figures that hold together, and files that can be read."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
SMALLEST = ("--preset", "tiny", "--rounds", "2")
EQUAL = {"float32": 1e-4, "bfloat16": 5e-2}
"""Relative L2 distance of two implementations, by type."""
CHANGES = {"int8": 0.05, "fp8": 0.1}
"""Switches that change the result, and by how much at most."""

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of packages, on import


@pytest.fixture(scope="module")
def ovi() -> Iterator[Any]:
    """The benchmark as a module."""
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("ovi")
    sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def towers(ovi: Any) -> dict[str, Any]:  # noqa: ANN401
    """The quick sections, without torch.compile, as they are written."""
    pytest.importorskip("diffusers")
    pytest.importorskip("torchao")
    timer = ovi.Timer(torch.device("cpu"), rounds=2)
    report = ovi.measure(ovi.presets(512, 4, 1000)["tiny"], timer, ("peak", "tower", "twin", "sampling"), False)
    return json.loads(json.dumps(report))


def run(folder: Path, *options: str, **environment: str) -> tuple[dict[str, Any], str]:
    """What the command writes and prints, from a process of its own."""
    out = folder / "made" / "ovi.json"
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, FOLDER / "ovi.py", *SMALLEST, "--out", out, *options]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text(encoding="utf-8")), done.stdout


def by_case(report: dict[str, Any], section: str) -> dict[str, dict[str, Any]]:
    rows = report["sections"][section]
    assert all(math.isfinite(row["seconds"]) and row["seconds"] > 0 for row in rows if "left_out" not in row)
    for row in rows:
        assert 0 < row.get("ratio_low", 1) <= row.get("ratio", 1) <= row.get("ratio_high", 1)
    return {f"{row['case']}, {row['dtype']}": row for row in rows}


def test_a_report_tells_the_machine_and_the_commit_and_no_more(towers: dict[str, Any]) -> None:
    assert set(towers["machine"]) >= {"processor", "cores", "threads", "memory_gib", "packages"}
    assert towers["machine"]["packages"]["torch"] == torch.__version__
    assert towers["machine"]["threads"] == 1
    assert {"commit", "changed_since", "date", "preset", "timing"} <= set(towers)
    assert towers["timing"] == {"clock": "processor", "rounds": 2, "in_turns": True}
    text = json.dumps(towers)
    assert os.uname().nodename not in text
    assert str(Path.home()) not in text
    assert str(FOLDER) not in text


def test_ours_and_diffusers_give_the_same_and_are_timed_side_by_side(towers: dict[str, Any]) -> None:
    rows = by_case(towers, "tower")
    base = [name for name in rows if "diffusers" in name]
    assert len(base) == 4  # one t and a clean first frame, in both types
    for name, row in rows.items():
        assert row["tflops"] > 0
        assert row["share"] == pytest.approx(row["tflops"] / peak(towers, row["dtype"]), rel=2e-3)
        if name not in base:
            assert row["difference"] < EQUAL[row["dtype"]]
            assert row["ratio"] > 0
    assert {name.split(": ")[1] for name in rows} >= {
        "diffusers, float32",
        "ours, float32",
        "ours, text memo, float32",
        "ours, text memo, bf16 norms, bfloat16",
    }


def peak(report: dict[str, Any], dtype: str) -> float:
    return next(row["tflops"] for row in report["sections"]["peak"] if row["dtype"] == dtype)


def check_switches(rows: dict[str, dict[str, Any]]) -> None:
    """Each gives what the plain call gives, or differs by what it is known to cost."""
    for name, row in rows.items():
        if "difference" in row:
            assert row["difference"] < CHANGES.get(row["case"], EQUAL[row["dtype"]]), name


def test_the_switches_of_the_twin_change_nothing_that_they_should_not(towers: dict[str, Any]) -> None:
    rows = {row["case"]: row for row in by_case(towers, "twin").values()}
    assert set(rows) == {
        "plain",
        "text memo",
        "int8",
        "fp8",
        "offload",
        "block 1 left out",
        "two predictions apart",
        "two predictions together",
    }
    check_switches(rows)
    assert rows["text memo"]["difference"] == rows["offload"]["difference"] == 0
    assert all(rows[name]["difference"] > 0 for name in CHANGES)
    assert rows["int8"]["weights_bytes"] < rows["plain"]["weights_bytes"]
    assert rows["two predictions apart"]["ratio"] > 1.2
    assert "difference" not in rows["block 1 left out"]


def test_whole_runs_take_as_long_as_their_steps(towers: dict[str, Any]) -> None:
    guided, few = towers["sections"]["sampling"]
    assert (guided["case"], few["case"]) == (
        "2 steps, unipc, guided, a block left out",
        "1 steps, renoise, no guidance",
    )
    assert guided["seconds"] > few["seconds"] > 0


def test_a_written_file_prints_the_same_tables(ovi: Any, tmp_path: Path) -> None:  # noqa: ANN401
    out = tmp_path / "made" / "ovi.json"
    done = CliRunner().invoke(ovi.app, [*SMALLEST, "--only", "peak", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("### A matrix product\n\n| case | type | time |")
    assert "| matrix product of side 64 | fp32 |" in done.stdout
    again = CliRunner().invoke(ovi.app, ["--table", str(out)])
    assert (again.exit_code, again.stdout) == (0, done.stdout)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--only", "towers"), "'towers' is not one of peak, tower, twin"),
        (("--preset", "huge"), "'huge' is not one of tiny, cpu, full"),
        (("--width", "200"), "width 200: give a multiple of 128, such as 128"),
        (("--rounds", "0"), "greater than or equal to 1"),
        (("--device", "tpu"), "device 'tpu'"),
        (("--table", "nowhere.json"), "nowhere.json"),
        (("--table", __file__), "test_ovi.py"),
    ],
)
def test_mistakes(ovi: Any, options: tuple[str, ...], sentence: str) -> None:  # noqa: ANN401
    done = CliRunner().invoke(ovi.app, options)
    assert (done.exit_code, done.stdout) == (2, "")
    assert sentence in done.stderr


@pytest.mark.slow
def test_without_a_compiler_the_row_says_so(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    report, printed = run(tmp_path, "--only", "twin", CXX="no-such-compiler")
    rows = {row["case"]: row for row in report["sections"]["twin"]}
    assert rows["compile"] == {
        "case": "compile",
        "dtype": "float32",
        "left_out": "there is no C++ compiler no-such-compiler",
    }
    assert "there is no C++ compiler no-such-compiler |" in printed


@pytest.mark.slow
def test_every_section_at_once(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    pytest.importorskip("torchao")
    report, printed = run(tmp_path)
    assert list(report["sections"]) == ["peak", "tower", "twin", "sampling", "decode", "parallel"]
    assert printed.count("### ") == 6
    twin = {row["case"]: row for row in by_case(report, "twin").values()}
    check_switches(twin)
    assert "left_out" in twin["compile"] or twin["compile"]["first_seconds"] > twin["compile"]["seconds"]
    decode = by_case(report, "decode")
    assert [name.split(",")[0] for name in decode] == ["picture"] * 3 + ["sound"] * 2
    assert all(row.get("difference", 0) < 1e-5 for row in decode.values())
    assert (
        decode["picture, stream, tiles of 2, float32"]["computed_bytes"]
        < decode["picture, stream, float32"]["computed_bytes"]
    )
    alone, shared = report["sections"]["parallel"]
    assert shared["difference"] < 1e-5
    assert shared["ratio"] > 0 < alone["seconds"]
