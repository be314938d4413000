"""Ovi and Wan with random weights: seconds per call beside diffusers, and what each switch costs and saves.

    python benchmarks/ovi.py --out benchmarks/results/ovi-cpu.json       # a CPU, at reduced width
    python benchmarks/ovi.py --device cuda --out benchmarks/results/ovi-gpu.json    # the full-size model, 704x704, 5 s
    python benchmarks/ovi.py --table benchmarks/results/ovi-cpu.json     # its tables, without measuring

Sections: peak (a matrix product), tower (Wan beside diffusers' WanTransformer3DModel with the same weights, whose
outputs must agree), twin (Ovi and its switches), sampling (whole runs), decode (picture and sound), parallel (two
processes).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from measure import Row, Timer, commit, machine, table, today
from ovi_models import Preset, presets
from ovi_sections import decode, parallel, peak, sampling, tower, twin

SECTIONS = {
    "peak": "A matrix product",
    "tower": "Wan's tower beside diffusers",
    "twin": "Ovi's two towers and the switches",
    "sampling": "Whole runs, latents only",
    "decode": "Decoding",
    "parallel": "Two processes (Ulysses over gloo)",
}
DIGITS = 4
app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def command(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    preset: Annotated[str | None, typer.Option(help="tiny, cpu or full; default cpu, or full on cuda.")] = None,
    width: Annotated[int, typer.Option(min=128, help="Of the preset cpu: a multiple of 128.")] = 512,
    depth: Annotated[int, typer.Option(min=1, help="Of the preset cpu: blocks.")] = 4,
    tokens: Annotated[int, typer.Option(min=128, help="Of the preset cpu: of video, about.")] = 1000,
    rounds: Annotated[int, typer.Option(min=1, help="In each of them every case is timed once.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="Of the processor.")] = 1,
    only: Annotated[list[str] | None, typer.Option(help=f"Sections: {', '.join(SECTIONS)}; may be repeated.")] = None,
    compiles: Annotated[bool, typer.Option("--compile/--no-compile", help="Also time torch.compile.")] = True,
    out: Annotated[Path | None, typer.Option(help="File for the figures, as JSON.")] = None,
    show: Annotated[Path | None, typer.Option("--table", help="Only print the tables of such a file.")] = None,
) -> None:
    """Time Ovi and Wan with random weights, print tables, and write the figures as JSON."""
    if show is not None:
        typer.echo(tables(_read(show)))
        return
    wanted = tuple(only or SECTIONS)
    sizes = presets(width, depth, tokens)
    name = preset or ("full" if device == "cuda" else "cpu")
    for given, known in ((name, sizes), *((section, SECTIONS) for section in wanted)):
        if given not in known:
            raise typer.BadParameter(f"{given!r} is not one of {', '.join(known)}")
    if width % 128:
        raise typer.BadParameter(f"width {width}: give a multiple of 128, such as {width // 128 * 128}")
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise typer.BadParameter(f"device {device!r}: it is not cpu, or cuda on a machine that has a card")
    torch.set_num_threads(threads)
    timer = Timer(torch.device(device), rounds, keep=device == "cpu")
    report = measure(sizes[name], timer, wanted, compiles, lambda row: typer.echo(f"  {_line(row)}", err=True))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    typer.echo(tables(report))


def measure(
    preset: Preset,
    timer: Timer,
    wanted: Sequence[str] = tuple(SECTIONS),
    compiles: bool = True,
    on_row: Callable[[Row], None] = lambda row: None,  # noqa: ARG005
) -> dict[str, Any]:
    """All figures of the wanted sections, with machine, commit and date; on_row sees each at once."""
    report: dict[str, Any] = {
        "benchmark": "ovi",
        "date": today(),
        **commit(),
        "machine": machine(timer.device),
        "preset": preset.told(),
        "timing": {"clock": timer.clock, "rounds": timer.rounds, "in_turns": timer.keep},
        "sections": {},
    }
    rates: dict[torch.dtype, float] = {}
    for name in wanted:
        runs: dict[str, Callable[[], Iterator[Row]]] = {
            "peak": lambda: peak(preset, timer),
            "tower": lambda: tower(preset, timer, rates),
            "twin": lambda: twin(preset, timer, rates, compiles),
            "sampling": lambda: sampling(preset, timer, compiles),
            "decode": lambda: decode(preset, timer),
            "parallel": lambda: parallel(preset, timer),
        }
        found = report["sections"][name] = []
        for row in runs[name]():
            found.append({key: _rounded(value) for key, value in row.items()})
            on_row(found[-1])
            if name == "peak":
                rates[getattr(torch, row["dtype"])] = row["tflops"]
    return report


def _rounded(value: Any) -> Any:  # noqa: ANN401
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


# Tables


def _read(path: Path) -> dict[str, Any]:
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"{path}: {error}") from None
    if not isinstance(report, dict) or set(report.get("sections", {"": ()})) - set(SECTIONS):
        raise typer.BadParameter(f"{path}: is no file that this benchmark wrote; give one (--out)")
    return report


def tables(report: Mapping[str, Any]) -> str:
    """The figures as Markdown, a table per section."""
    parts = []
    for name, rows in report["sections"].items():
        parts.append(f"### {SECTIONS[name]}\n\n{table(rows, COLUMNS)}")
    return "\n\n".join(parts)


def _line(row: Row) -> str:
    return ", ".join(f"{heading} {found}" for heading, show in COLUMNS.items() if (found := show(row)))


def _time(key: str) -> Callable[[Mapping[str, Any]], str]:
    def shown(row: Mapping[str, Any]) -> str:
        seconds = row.get(key)
        return "" if seconds is None else f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"

    return shown


def _ratio(row: Mapping[str, Any]) -> str:
    return "" if "ratio" not in row else f"{row['ratio']:.2f} ({row['ratio_low']:.2f} to {row['ratio_high']:.2f})"


def _number(key: str, form: str, scale: float = 1) -> Callable[[Mapping[str, Any]], str]:
    return lambda row: "" if row.get(key) is None else form.format(scale * row[key])


COLUMNS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "case": lambda row: str(row["case"]),
    "type": lambda row: {"float32": "fp32", "bfloat16": "bf16"}[row["dtype"]],
    "time": _time("seconds"),
    "to the first (least to most)": _ratio,
    "first call, on the wall": _time("first_seconds"),
    "difference": _number("difference", "{:.1e}"),
    "TFLOP/s": _number("tflops", "{:.3g}"),
    "of the peak": _number("share", "{:.0f} %", 100),
    "weights on the device": _number("weights_bytes", "{:.0f} MB", 1e-6),
    "memory, computed": _number("computed_bytes", "{:.0f} MB", 1e-6),
    "memory, measured": _number("peak_bytes", "{:.2f} GiB", 2**-30),
    "left out": lambda row: row.get("left_out", ""),
}

if __name__ == "__main__":
    app()
