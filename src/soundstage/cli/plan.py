"""`soundstage plan`: what a data set and a training run take, before either is begun."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from soundstage.data.capacity import Data, Fleet


def command(
    clips: Annotated[float, typer.Option(help="Clips that are wanted after all filters.")] = 1e6,
    seconds: Annotated[float, typer.Option(help="Of each clip.")] = 5.0,
    kept: Annotated[
        float, typer.Option(help="Share that passes the filters; `soundstage data funnel` has yours.")
    ] = 0.3,
    mbps: Annotated[float, typer.Option(help="Megabits a second of a clip's file.")] = 2.0,
    gbps: Annotated[float, typer.Option(help="Gigabits a second of the line.")] = 1.0,
    cores: Annotated[int, typer.Option(help="That scan, encode and pack.")] = 16,
    scan: Annotated[float, typer.Option(help="Clips one core scans in a second, as measured.")] = 3.0,
    encode: Annotated[float, typer.Option(help="Clips one core encodes in a second, as measured.")] = 0.25,
    model: Annotated[
        str | None, typer.Option(help="A model of `soundstage models list`: its own size and length.")
    ] = None,
    width: Annotated[int, typer.Option(help="Of another model: width,")] = 2048,
    depth: Annotated[int, typer.Option(help="layers,")] = 24,
    frames: Annotated[int, typer.Option(help="frames of a clip,")] = 121,
    size: Annotated[
        str, typer.Option(help="and its pictures, HEIGHTxWIDTH, behind a codec of strides 4x16x16.")
    ] = "704x1280",
    epochs: Annotated[float, typer.Option(help="Times each clip is trained on.")] = 1.0,
    gpus: Annotated[int, typer.Option(help="Accelerators.")] = 64,
    peak: Annotated[float, typer.Option(help="TFLOP/s of one: A100 312, H100 989 in bf16.")] = 989.0,
    share: Annotated[float, typer.Option(help="Of the peak that is reached.")] = 0.4,
    price: Annotated[float, typer.Option(help="Of one for an hour.")] = 2.0,
    tb_month: Annotated[float, typer.Option(help="Price of a terabyte for a month.")] = 20.0,
    example: Annotated[
        bool, typer.Option("--example", help="Work through a real proposal and name its errors.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The figures as JSON on stdout, for programs.")] = False,
) -> None:
    """Clips, hours, bytes, days of download and of work, GPU-days and money, from rates that you measured.

    \b
    Examples:
      soundstage plan --clips 1e6 --seconds 5 --model ovi-720x720-5s --gpus 64
      soundstage plan --clips 30e6 --seconds 10 --gbps 10 --cores 512 --width 3072 --depth 30 --json
      soundstage plan --example
    """
    from soundstage.data.capacity import Data, Fleet

    if example:
        typer.echo(_example())
        return
    data = Data(clips, seconds, mbps, kept)
    fleet = Fleet(gpus, peak, share, price)
    tokens, forward, name = _model(model, width, depth, frames, size)
    rates = {"scan": scan, "encode": encode, "pack": 20.0}
    found = _figures(data, fleet, forward, epochs=epochs, gbps=gbps, cores=cores, rates=rates, tb_month=tb_month)
    found = {"model": name, "tokens": tokens, **found}
    typer.echo(json.dumps(found) if as_json else _shown(found))


def _model(model: str | None, width: int, depth: int, frames: int, size: str) -> tuple[dict[str, int], float, str]:
    """Tokens of a clip, FLOP of one call, and the model's name."""
    from soundstage.core.errors import RequestError
    from soundstage.data.capacity import Tower, video_tokens

    if model is not None:
        from soundstage.recipes.published import Backbone

        told = Backbone(model, "").describe()
        return {name: count for name, count in told["tokens"].items() if count}, float(told["flops"]), model
    try:
        height, across = (int(part) for part in size.split("x"))
    except ValueError as error:
        raise RequestError(f"size: {size!r} is not HEIGHTxWIDTH, such as 704x1280") from error
    tokens = video_tokens(frames, height, across)
    tower = Tower(width, depth, 4 * width, text=512, text_width=4096)
    return {"video": tokens}, tower.forward(tokens), f"{depth} layers of {width}"


def _figures(
    data: Data,
    fleet: Fleet,
    forward: float,
    *,
    epochs: float,
    gbps: float,
    cores: int,
    rates: dict[str, float],
    tb_month: float,
) -> dict[str, Any]:
    from soundstage.data.capacity import MONTH, cores_days, training

    work = cores_days(data, cores, rates)
    days = fleet.days(training(forward) * data.clips * epochs)
    calendar = data.download(gbps) + sum(work.values()) + days
    store = data.bytes / 1e12 * tb_month * max(1.0, calendar / MONTH)
    return {
        "clips": data.clips,
        "clips_tried": data.tried,
        "hours": data.hours,
        "terabytes_fetched": data.fetched / 1e12,
        "terabytes_kept": data.bytes / 1e12,
        "days_download": data.download(gbps),
        "days_work": work,
        "tflop_call": forward / 1e12,
        "tflop_training_sample": training(forward) / 1e12,
        "days_training": days,
        "gpu_hours": fleet.gpus * 24 * days,
        "cost_training": fleet.cost(days),
        "cost_store": store,
    }


def _shown(found: dict[str, Any]) -> str:
    """The figures as lines."""
    work = ", ".join(f"{name} {days:.2g}" for name, days in found["days_work"].items())
    tokens = ", ".join(f"{count:,} of {name}" for name, count in found["tokens"].items())
    lines = {
        "clips": f"{found['clips']:,.0f} of {found['clips_tried']:,.0f} tried, {found['hours']:,.0f} hours",
        "bytes": f"{found['terabytes_fetched']:,.1f} TB fetched, {found['terabytes_kept']:,.1f} TB kept",
        "download": f"{found['days_download']:,.2f} days",
        "work on the clips": f"{work} days",
        "model": f"{found['model']}: {tokens} tokens, {found['tflop_call']:,.1f} TFLOP a call, "
        f"{found['tflop_training_sample']:,.0f} to train on a clip",
        "training": f"{found['days_training']:,.1f} days, {found['gpu_hours']:,.0f} GPU-hours",
        "money": f"{found['cost_training']:,.0f} for training, {found['cost_store']:,.0f} to keep the clips",
    }
    wide = max(map(len, lines))
    return "\n".join(f"{name:<{wide}}  {text}" for name, text in lines.items())


def _example() -> str:
    from soundstage.data.capacity import example

    return "\n\n".join(
        f"claim:    {claim.said}\ncomputed: {claim.found}\nerror:    {claim.error}" for claim in example()
    )
