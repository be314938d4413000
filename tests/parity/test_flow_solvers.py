"""UniPC, DPM++ 2M and Euler against trajectories recorded from the published implementation."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from soundstage.core import AV, SAMPLERS, Conditions, explicit, held, shift, shifted

STEM = "flow_solvers"
NAMES = {"unipc": "unipc", "dpm++": "dpmpp_2m", "euler": "euler"}
MODALITIES = [("video",), ("audio",), ("video", "audio")]


def runs(vector: Any) -> list[tuple[str, int]]:  # noqa: ANN401
    """(recorded solver, steps) of every trajectory in the file."""
    found = (re.fullmatch(r"out\.(.+)\.(\d+)\.trajectory", key) for key in vector.tensors)
    return sorted((m[1], int(m[2])) for m in found if m)


def recorded_velocity(vector: Any) -> Callable[[Tensor, float], Tensor]:  # noqa: ANN401
    """The formula of the json ("u = t/1000 ; v = ..."; t = the recorded timestep) as a function of x and t."""
    inputs = {key.removeprefix("in."): value for key, value in vector.tensors.items() if key.startswith("in.")}
    functions = {name: getattr(torch, name) for name in ("tanh", "sin", "cos", "exp", "sqrt", "abs", "sigmoid")}
    lines = re.findall(r"(?:^|;)\s*(\w+)\s*=\s*([^;]+)", vector.info["velocity"])

    def velocity(x: Tensor, t: float) -> Tensor:
        names = {**functions, **inputs, "x": x, "t": t}
        for name, formula in lines:
            names[name] = eval(formula, {"__builtins__": {}}, names)
        return names["v"]

    return velocity


def denoiser(vector: Any, timesteps: Tensor, sigmas: Tensor) -> Callable[..., AV[Tensor]]:  # noqa: ANN401
    """The recorded model: it is told a timestep of 0..1000 that its scheduler truncated or not, never the sigma."""
    velocity = recorded_velocity(vector)

    def told(z: Tensor, t: Tensor) -> Tensor:
        return velocity(z, timesteps[(sigmas[:-1] - t[0]).abs().argmin()].item())

    def call(x_t: AV[Tensor], t: AV[Tensor], cond: Conditions, *, r: AV[Tensor] | None = None) -> AV[Tensor]:
        assert cond.batch is None and r is None
        return x_t.map(told, t)

    return call


@pytest.mark.parametrize("modalities", MODALITIES, ids="+".join)
def test_trajectories(vector: Any, modalities: tuple[str, ...]) -> None:  # noqa: ANN401
    assert runs(vector), "the file holds no trajectory"
    for solver, steps in runs(vector):
        sigmas, timesteps, trajectory = (
            vector.tensors[f"out.{solver}.{steps}.{key}"] for key in ("sigmas", "timesteps", "trajectory")
        )
        x = AV(**dict.fromkeys(modalities, vector.tensors["in.x"]))
        times = explicit(x.map(lambda _, levels: levels, sigmas.tolist()))
        seen: list[AV[Tensor]] = []
        model = denoiser(vector, timesteps, sigmas)
        SAMPLERS[NAMES[solver]](model, x, times, Conditions(), on_step=lambda _i, z, _x0, seen=seen: seen.append(z))
        for name in modalities:
            mine = torch.stack([z[name] for z in seen])
            torch.testing.assert_close(mine, trajectory, **vector.tolerance, msg=lambda m, s=solver: f"{s}: {m}")


def test_a_held_modality_does_not_change_the_other(vector: Any) -> None:  # noqa: ANN401
    for solver, steps in runs(vector):
        sigmas, timesteps, trajectory = (
            vector.tensors[f"out.{solver}.{steps}.{key}"] for key in ("sigmas", "timesteps", "trajectory")
        )
        x = AV(video=vector.tensors["in.x"], audio=vector.tensors["in.x"])
        times = held(explicit(AV(video=sigmas.tolist())), "audio", float(sigmas[1]))
        out = SAMPLERS[NAMES[solver]](denoiser(vector, timesteps, sigmas), x, times, Conditions())
        assert torch.equal(out["audio"], x["audio"])
        torch.testing.assert_close(out["video"], trajectory[-1], **vector.tolerance)


def test_grids(vector: Any) -> None:  # noqa: ANN401
    """The recorded sigmas are the shifted grids: from 1 for DPM++, from the shifted 0.999 for UniPC."""
    by = float(vector.info["shift"])
    starts = {"dpm++": 1.0, "unipc": shift(0.999, by)}
    for solver, steps in runs(vector):
        if solver in starts:
            grid = shifted(steps, AV(video=by), AV(video=starts[solver]))["video"]
            torch.testing.assert_close(grid.float(), vector.tensors[f"out.{solver}.{steps}.sigmas"], **vector.tolerance)
            told = vector.tensors[f"out.{solver}.{steps}.timesteps"].double()
            assert ((1000 * grid[:-1] - told).abs() < 1.0 + 1e-6).all()
