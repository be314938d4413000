"""What `ovi.py` measures: one generator of rows for each section, the same functions at every size and device."""

from __future__ import annotations

import math
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from measure import Row, Run, Timed, Timer, compare, rows, spread
from ovi_models import Inputs, Preset, counterpart, filled, shared
from torch import Tensor, nn

from soundstage.core.attention import kernels
from soundstage.core.av import AV
from soundstage.core.guidance import Guided
from soundstage.core.parallel import context_parallel
from soundstage.core.rng import Rng
from soundstage.core.sampling import SAMPLERS
from soundstage.core.schedule import shift, shifted
from soundstage.inference.accelerate import Switches
from soundstage.inference.quantize import stored_bytes
from soundstage.models.codecs.wan_vae_memory import decode_bytes
from soundstage.models.twin import flops
from soundstage.models.wan import flops as tower_flops

Rows = Iterator[Row]
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""Relative L2 distance that two implementations may have, where the same numbers are added in another order."""
PLAIN = Switches(text_memo=False, guidance="apart")
ON = Switches()
SCALE = AV(4.0, 3.0)


def peak(preset: Preset, timer: Timer) -> Rows:
    """The rate of one large matrix product in each type: what calls are held against."""
    side = preset.matrix
    for dtype in preset.types:
        a, b = (torch.randn(side, side, device=timer.device).to(dtype) for _ in range(2))
        found = compare({f"matrix product of side {side}": lambda a=a, b=b: lambda: a @ b}, timer)
        for row in rows(found, dtype):
            yield {**row, "tflops": 2e-12 * side**3 / min(each for timed in found.values() for each in timed.times)}


def tower(preset: Preset, timer: Timer, rates: Mapping[torch.dtype, float]) -> Rows:
    """The video tower alone and diffusers' class of the same shape with the same weights, in turns.

    Raises SystemExit where their outputs differ. rates: TFLOP/s of a matrix product, by type.
    """
    work = tower_flops(preset.twin.video, preset.tokens["video"]).total
    for dtype in preset.types:
        for what, found in _beside_diffusers(preset, timer, dtype):
            _demand_equal(found, dtype)
            yield from rows(found, dtype, prefix=f"{what}: ", rate=rates.get(dtype), work=work)


def _beside_diffusers(preset: Preset, timer: Timer, dtype: torch.dtype) -> Iterator[tuple[str, dict[str, Timed]]]:
    """With one t for the clip, and with the first frame clean, where diffusers is told t for every token."""
    config, inputs = preset.twin.video, Inputs(preset, timer.device, dtype)
    x, cond, words = inputs.latents().only("video"), inputs.told().only("video"), inputs.padded()
    base = filled(config, timer.device, dtype)
    theirs = counterpart(base, config, dtype)

    def ours(t: Tensor, switches: Switches) -> Run:
        module = switches.apply(shared(base), timer.device)
        return lambda: module(x, AV(video=t), cond)["video"]

    def diffusers(timestep: Tensor) -> Run:
        return lambda: theirs(x["video"].to(dtype), timestep, words, return_dict=False)[0]

    ways = {"ours": PLAIN, "ours, text memo": ON}
    if dtype == torch.bfloat16:
        ways["ours, text memo, bf16 norms"] = replace(ON, fp32_norms=False)
    whole, first = inputs.time()["video"], inputs.clean_first()
    per_token = first.repeat_interleave(preset.tokens["video"] // preset.grid[0], dim=1)
    for what, t, timestep in (("one t", whole, 1000 * whole), ("first frame clean", first, 1000 * per_token)):
        cases: dict[str, Callable[[], Run]] = {"diffusers": partial(diffusers, timestep)}
        cases |= {name: partial(ours, t, switches) for name, switches in ways.items()}
        yield what, compare(cases, timer)


def _demand_equal(found: Mapping[str, Timed], dtype: torch.dtype) -> None:
    for name, each in found.items():
        distance = each.difference(found["diffusers"])
        if distance is None or not distance < TOLERANCE[dtype]:
            raise SystemExit(f"{name} and diffusers differ by {distance}: their times would be those of two models")


def twin(preset: Preset, timer: Timer, rates: Mapping[torch.dtype, float], compiles: bool = True) -> Rows:
    """One call of both towers, plain and with each switch; then both predictions of guidance."""
    config, device, dtype = preset.twin, timer.device, preset.types[0]
    inputs = Inputs(preset, device, dtype)
    x, t, cond, negative = inputs.latents(), inputs.time(), inputs.told(), inputs.told(3)
    base = filled(config, device, dtype) if timer.keep else None
    held: dict[str, int] = {}
    cases: dict[str, Callable[[], Run]] = {}
    lacking = no_compiler(device) if compiles else None

    def case(name: str, wrap: Callable[[Any], Any] = lambda made: made, **switched: Any) -> None:  # noqa: ANN401
        def make() -> Run:
            switches = replace(PLAIN, **switched)
            module: Any = filled(config, device, dtype) if base is None else shared(base)
            module = switches.apply(module.to("cpu") if switches.offload else module, device)
            held[name] = on_device(module, switches)
            call = wrap(module)
            return lambda: call(x, t, cond)

        cases[name] = make

    case("plain")
    case("text memo", text_memo=True)
    if dtype == torch.bfloat16:
        case("bf16 norms", fp32_norms=False)
    case("int8", weights="int8")
    case("fp8", weights="fp8")
    case("offload", offload=True)
    for kernel in (name for name, why in kernels().items() if not why):
        if kernel != "sdpa":
            case(f"attention={kernel}", attention=kernel)
        if compiles and not lacking:
            case("compile" if kernel == "sdpa" else f"compile, attention={kernel}", compile=True, attention=kernel)
    case(f"block {preset.left_out} left out", lambda made: made.skipping((preset.left_out,)))
    case("two predictions apart", lambda made: Guided(made, negative, SCALE, together=False))
    case("two predictions together", lambda made: Guided(made, negative, SCALE, together=True))
    with compiled_anew() if compiles else nullcontext():
        found = compare(cases, timer)
    work = flops(config, preset.tokens).total
    for row in rows(found, dtype, rate=rates.get(dtype), work=work):
        name = row["case"]
        row["weights_bytes"] = held[name]
        if name.startswith("compile"):
            row["first_seconds"] = found[name].first
        if name.startswith("two"):
            row |= {key: 2 * row[key] for key in ("tflops", "share") if key in row}
            row["difference"] = found[name].difference(found["two predictions apart"])
        elif "left out" in name:
            row = {key: value for key, value in row.items() if key not in ("tflops", "share", "difference")}
        yield row
    if lacking:
        yield left_out("compile", dtype, lacking)


def left_out(case: str, dtype: torch.dtype, why: str) -> Row:
    """The row of a case that cannot be measured here."""
    return {"case": case, "dtype": str(dtype).removeprefix("torch."), "left_out": why}


def on_device(module: nn.Module, switches: Switches) -> int:
    """Bytes of weights that the device holds at most: all; with offload two blocks, and what is outside of blocks."""
    told = switches.report(module)
    if not told["offload"]:
        return int(told["weights"]["bytes"])
    inside = {id(x) for x in module.blocks.parameters()}  # type: ignore[union-attr]
    outside = sum(stored_bytes(x) for x in module.parameters() if id(x) not in inside)
    return outside + int(told["offload"]["device_bytes"])


def compiled_anew() -> AbstractContextManager[Any]:
    """So that the first call tells what compiling costs, whatever was compiled before."""
    torch.compiler.reset()
    return torch.compiler.config.patch(force_disable_caches=True)  # type: ignore[attr-defined]


def no_compiler(device: torch.device) -> str | None:
    """What torch.compile lacks on this machine, or None."""
    if device.type == "cuda":
        return None if find_spec("triton") else "there is no triton"
    name = os.environ.get("CXX", "g++")
    return None if shutil.which(name) else f"there is no C++ compiler {name}"


def sampling(preset: Preset, timer: Timer, compiles: bool = True) -> Rows:
    """Whole runs from noise to latents: with guidance and its left-out block, as Ovi is sampled, or as a student is."""
    device, dtype = timer.device, preset.types[0]
    inputs = Inputs(preset, device, dtype)
    noise, cond, negative = inputs.latents(), inputs.told(), inputs.told(3)
    first = shift(0.999, 5.0)

    def case(steps: int, guided: bool, switches: Switches) -> Callable[[], Run]:
        def make() -> Run:
            module: Any = switches.apply(filled(preset.twin, device, dtype), device)
            weak = module.skipping((preset.left_out,))
            call = Guided(module, negative, SCALE, weak=weak) if guided else module
            times, sample = shifted(steps, AV(5.0, 5.0), AV(first, first)), SAMPLERS["unipc" if guided else "renoise"]
            return lambda: sample(call, noise, times, cond, rng=Rng.of(0, 1))

        return make

    cases = {}
    for steps, guided in preset.sampling:
        name = f"{steps} steps, " + ("unipc, guided, a block left out" if guided else "renoise, no guidance")
        cases[name] = case(steps, guided, ON)
        if compiles and device.type == "cuda" and not no_compiler(device):
            cases[f"{name}, compile"] = case(steps, guided, replace(ON, compile=True))
    with compiled_anew() if compiles else nullcontext():
        found = compare(cases, replace(timer, rounds=1, keep=False))
    for row in rows(found, dtype):
        yield {key: value for key, value in row.items() if not key.startswith(("ratio", "difference"))}


def decode(preset: Preset, timer: Timer) -> Rows:
    """Latents to picture, as a stream, whole and in tiles; latents to sound, whole and in pieces.

    computed_bytes: what the picture needs beside weights, latents and frames, by its own count.
    """
    device = timer.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.device(device):
        pictures: Any = preset.picture.build().to(dtype).eval().requires_grad_(False)
        sound: Any = preset.sound.build().eval().requires_grad_(False)
    make, geometry = torch.Generator().manual_seed(4), preset.picture.geometry
    z = torch.randn(1, geometry.channels, *preset.picture_grid, generator=make).to(device)
    heard = torch.randn(1, preset.sound.channels, preset.steps, generator=make).to(device)
    frames, height, width = preset.picture_grid
    shape = (geometry.length(frames), geometry.spatial_stride * height, geometry.spatial_stride * width)

    def seen(stream: bool, tile: int | None) -> Callable[[], Run]:
        def run() -> Tensor:
            pictures.stream, pictures.tile = stream, tile
            pieces = pictures.decode_stream(z) if stream else [pictures.decode(z)]
            return torch.cat([piece.cpu() for piece in pieces], dim=2)

        return lambda: run

    def wave(piece: int | None) -> Callable[[], Run]:
        def run() -> Tensor:
            sound.chunk = piece
            return sound.decode(heard).cpu()

        return lambda: run

    room = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else math.inf
    cases, needs = {}, {}
    for name, stream, tile in (
        ("stream", True, None),
        ("whole", False, None),
        (f"stream, tiles of {preset.tile}", True, preset.tile),
    ):
        need = decode_bytes(preset.picture, *shape, tile=tile, stream=stream, itemsize=dtype.itemsize)
        if need < 0.9 * room:
            cases[f"picture, {name}"], needs[f"picture, {name}"] = seen(stream, tile), need
        else:
            yield {**left_out(f"picture, {name}", dtype, "too little memory"), "computed_bytes": need}
    seconds = float(shape[0] / geometry.rate)
    for row in rows(compare(cases, timer), dtype):
        yield {**row, "computed_bytes": needs[row["case"]], "clip_seconds": seconds}
    cases = {f"sound, pieces of {preset.piece}": wave(preset.piece), "sound, whole": wave(None)}
    length = preset.sound.geometry.length(preset.steps) / preset.sound.geometry.rate
    for row in rows(compare(cases, timer), torch.float32):
        yield {**row, "clip_seconds": float(length)}


def parallel(preset: Preset, timer: Timer) -> Rows:
    """One call shared by two gloo processes of one thread each, in turns with one process alone; processor time."""
    answers = torch.multiprocessing.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        meet = (Path(folder) / "meet").as_uri()
        torch.multiprocessing.spawn(_share, (meet, preset, timer, answers), nprocs=2)
    found = answers.get()
    yield {"case": "one process", "dtype": "float32", "seconds": statistics.median(found["alone"])}
    both = {"case": "each of two processes", "dtype": "float32", "seconds": statistics.median(found["shared"])}
    yield {**both, **spread(found["shared"], found["alone"]), "difference": found["difference"]}


@torch.no_grad()
def _share(rank: int, meet: str, preset: Preset, timer: Timer, answers: Any) -> None:  # noqa: ANN401
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=meet, rank=rank, world_size=2)
    inputs = Inputs(preset, torch.device("cpu"), torch.float32)
    x, t, cond = inputs.latents(), inputs.time(), inputs.told()
    base = filled(preset.twin, inputs.device, inputs.dtype)
    split = context_parallel(shared(base), torch.distributed.group.WORLD)
    whole, part = base(x, t, cond), split(x, t, cond)
    found: dict[str, Any] = {"alone": [], "shared": []}
    found["difference"] = max(float((part[n] - whole[n]).norm() / whole[n].norm()) for n in whole.modalities)
    for _ in range(timer.rounds):
        for which, module in (("alone", base), ("shared", split)):
            torch.distributed.barrier()
            start = time.process_time()
            if which == "shared" or rank == 0:
                module(x, t, cond).map(torch.sum)  # waits for what is still on its way
            found[which].append(time.process_time() - start)
    if rank == 0:
        answers.put(found)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
