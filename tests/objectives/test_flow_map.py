"""Flow maps: the identity that defines them, derivatives, laws of two times, steps, and what is given."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from soundstage.core import AV, Conditions, ConfigError, Guided, Rng, euler, heun, linear, shifted
from soundstage.core.attention import Attend
from soundstage.core.flow import ToData
from soundstage.core.times import Joint, LogitNormal, Uniform
from soundstage.models.text.bytes import ByteTextConfig, tokenize
from soundstage.models.twin import TwinConfig
from soundstage.models.unified_dit import UnifiedDiTConfig
from soundstage.models.wan import WanConfig
from soundstage.objectives.base import Batch
from soundstage.objectives.dmd import Guidance
from soundstage.objectives.flow_map import (
    Derivative,
    Grid,
    Narrowing,
    Scene,
    Sorted,
    along,
    euler_step,
    heun_step,
    map_step,
    play,
)
from soundstage.testing.flow_maps import GaussianMap, jump
from soundstage.testing.tiny import GaussianLatents, ToyConfig
from soundstage.testing.toy import QuickRng

EXACT = GaussianMap()
SHAPE: AV[tuple[int, ...]] = AV((2, 3, 2, 2), (3, 5))
NOTHING = Conditions()
UNIFORM = Joint(AV(Uniform(), Uniform()))


def points(dtype: torch.dtype, size: int = 64) -> AV[Tensor]:
    return QuickRng.of(0, size).fold("points").normal_like(SHAPE.map(lambda s: torch.zeros(size, *s, dtype=dtype)))


def times(dtype: torch.dtype, size: int = 64) -> tuple[AV[Tensor], AV[Tensor]]:
    """A time per modality, some with r = t, r = 0, t = 1 or all of the modality given."""
    rng = QuickRng.of(1, size)
    a, b = (AV(*(rng.fold(i, name).uniform(dtype=dtype) for name in ("video", "audio"))) for i in (0, 1))
    t, r = a.map(torch.maximum, b), a.map(torch.minimum, b)
    for modality, equal, given in (("video", 0, 1), ("audio", 1, 2)):
        r[modality][equal] = t[modality][equal]
        r[modality][given] = t[modality][given] = 0
        r[modality][3], t[modality][4] = 0, 1
    return t, r


def worst(a: AV[Tensor], b: AV[Tensor]) -> float:
    return max(float((x.double() - y.double()).abs().max()) for x, y in zip(a.values(), b.values(), strict=True))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_the_exact_flow_map_keeps_the_mean_flow_identity(dtype: torch.dtype, bound: float) -> None:
    """u = v - (t - r) du/dt with another t and r for every modality."""
    x, (t, r) = points(dtype), times(dtype)
    v = EXACT(x, t, NOTHING)
    u, slope = along(Derivative(), lambda y, s: EXACT(y, s, NOTHING, r=r), x, t, r, v)
    assert worst(u, v - slope) < bound
    assert worst(slope, slope.map(torch.zeros_like)) > 0.1


def test_the_exact_flow_map_composes_and_reaches_its_data() -> None:
    x, (t, r) = points(torch.float64, 4096), times(torch.float64, 4096)
    middle = (t + r) / 2.0
    once = map_step(EXACT, x, t, r, NOTHING)
    twice = map_step(EXACT, map_step(EXACT, x, t, middle, NOTHING), middle, r, NOTHING)
    assert worst(once, twice) < 1e-12
    made = jump(EXACT, x, linear(3), NOTHING)
    assert float(made["video"].mean()) == pytest.approx(EXACT.mean, abs=0.01)
    assert float(made["audio"].std()) == pytest.approx(EXACT.std, abs=0.01)


def test_to_data_jumps_down_to_clean_data() -> None:
    x, (t, _) = points(torch.float64), times(torch.float64)
    zero = t.map(torch.zeros_like)
    assert worst(ToData(EXACT)(x, t, NOTHING), EXACT(x, t, NOTHING, r=zero)) == 0
    assert worst(ToData(EXACT)(x, t, NOTHING, r=t), EXACT(x, t, NOTHING)) == 0


def curved(x: AV[Tensor], t: AV[Tensor]) -> AV[Tensor]:
    """Smooth and nowhere linear, the modalities mixed."""
    both = sum(level.sin() for level in t.values())
    return x.map(lambda z, s: torch.sin(2 * z) * (3 * s).cos().reshape(-1, *(1,) * (z.ndim - 1)), t) * AV(both, both)


def slope_error(h: float, dtype: torch.dtype, at: float | None = None) -> float:
    x, (t, r) = points(dtype), times(dtype)
    if at is None:
        t, r = (0.9 * level for level in (t, r))
    else:
        t, r = (level.map(lambda s, value=value: torch.full_like(s, value)) for level, value in ((t, at), (r, 0.0)))
    v = EXACT(x, t, NOTHING)
    reference = along(Derivative(), curved, *(value.to(torch.float64) for value in (x, t, r, v)))[1]
    mine = along(Derivative("difference", h), curved, x, t, r, v)[1]
    return worst(mine, reference) / float(torch.cat([z.flatten() for z in reference.values()]).square().mean().sqrt())


@pytest.mark.parametrize("at", [None, 1.0])
def test_the_difference_is_of_order_two_at_the_edge_of_time_too(at: float | None) -> None:
    errors = [slope_error(h, torch.float64, at) for h in (1e-2, 5e-3, 2.5e-3)]
    for a, b in itertools.pairwise(errors):
        assert math.log2(a / b) == pytest.approx(2, abs=0.1)
    network = ToyConfig().build().double()
    x, (t, r) = points(torch.float64), times(torch.float64)
    v = EXACT(x, t, NOTHING)
    exact, near = (along(d, lambda y, s: network(y, s, NOTHING), x, t, r, v)[1] for d in (Derivative(), DIFFERENCE))
    assert worst(exact, near) < 1e-4


DIFFERENCE = Derivative("difference")


def test_in_float32_the_difference_needs_a_wide_step() -> None:
    assert slope_error(5e-3, torch.float32) < 3e-3
    assert slope_error(1e-5, torch.float32) > 1e-2


def test_no_point_of_the_difference_leaves_the_unit_interval() -> None:
    seen: list[AV[Tensor]] = []

    def noting(x: AV[Tensor], t: AV[Tensor]) -> AV[Tensor]:
        seen.append(t)
        return EXACT(x, t, NOTHING)

    x, (t, r) = points(torch.float64), times(torch.float64)
    along(Derivative("difference", 1e-2), noting, x, t, r, EXACT(x, t, NOTHING))
    assert len(seen) == 3
    assert all(float(level.min()) >= 0 and float(level.max()) <= 1 for t in seen for level in t.values())


class Half(nn.Module):
    """A network that answers in bfloat16."""

    def __init__(self, by: float = 1.0) -> None:
        super().__init__()
        self.inner = ToyConfig().build().bfloat16()
        self.by = by

    def forward(self, x_t: AV[Tensor], t: AV[Tensor], cond: Conditions, *, r: AV[Tensor] | None = None) -> AV[Tensor]:
        return self.inner(x_t.to(torch.bfloat16), t.to(torch.bfloat16), cond, r=r)


def test_a_difference_of_bfloat16_answers_is_refused_and_jvp_is_not() -> None:
    network, x, (t, r) = Half(), points(torch.float32), times(torch.float32)
    v = EXACT(x, t, NOTHING)
    with pytest.raises(ConfigError, match="needs a network that answers in float32"):
        along(DIFFERENCE, lambda y, s: network(y, s, NOTHING), x, t, r, v)
    slope = along(Derivative(), lambda y, s: network(y, s, NOTHING), x, t, r, v)[1]
    assert all(z.isfinite().all() for z in slope.values())


@pytest.mark.parametrize("derivative", [Derivative(), DIFFERENCE], ids=["jvp", "difference"])
def test_autocast_and_bfloat16_latents_do_not_reach_the_derivative(derivative: Derivative) -> None:
    network, x, (t, r) = ToyConfig().build(), points(torch.bfloat16), times(torch.float32)
    v = EXACT(x, t, NOTHING)
    plain = along(derivative, lambda y, s: network(y, s, NOTHING), x.to(torch.float32), t, r, v)
    with torch.autocast("cpu", torch.bfloat16):
        inside = along(derivative, lambda y, s: network(y, s, NOTHING), x, t, r, v)
    for a, b in zip(plain, inside, strict=True):
        assert worst(a, b) == 0
        assert all(z.dtype == torch.float32 and not z.requires_grad for z in b.values())


def inner(a: AV[Tensor], b: AV[Tensor]) -> Tensor:
    return torch.stack([(x * y).sum() for x, y in zip(a.values(), b.values(), strict=True)]).sum()


def shaken(network: nn.Module) -> nn.Module:
    """The network with no parameter at zero."""
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return network.eval()


TOWER = WanConfig(32, 56, 2, 2, in_channels=6, out_channels=6, frequencies=32, text_width=24, text_length=12)
BACKBONES = {
    "unified_dit": UnifiedDiTConfig(
        width=32, depth=2, num_heads=2, rank=8, text=ByteTextConfig(16, 1, 2), text_inner=16
    ),
    "wan": TOWER,
    "twin": TwinConfig(TOWER, replace(TOWER, in_channels=5, out_channels=5, patch=(1,))),
}


def scene_of(name: str) -> tuple[AV[Tensor], Conditions]:
    """Latents of a backbone, and what it is told."""
    rng = Rng.of(5, 2)
    if name == "unified_dit":
        shape, text = AV((32, 2, 4, 4), (32, 6)), tokenize(["a red ball bounces", "three drums"])
        return rng.normal_like(shape.map(lambda s: torch.zeros(2, *s))), text
    shape = AV((6, 2, 4, 4)) if name == "wan" else AV((6, 2, 4, 4), (5, 9))
    features = rng.fold("text").normal(7, 24)
    told = shape.map(lambda _: features)
    return rng.normal_like(shape.map(lambda s: torch.zeros(2, *s))), Conditions(text=told)


@pytest.mark.parametrize("name", BACKBONES)
def test_attention_of_a_backbone_takes_the_plain_kernel_under_jvp(name: str) -> None:
    """Fused kernels have no forward mode: plain torch.func.jvp fails where the derivative here succeeds."""
    torch.manual_seed(0)
    network = shaken(BACKBONES[name].build())
    x, cond = scene_of(name)
    t = x.map(lambda _: torch.tensor([0.3, 0.8]))
    v = Rng.of(6, 2).normal_like(x)
    zero = t.map(torch.zeros_like)

    def fn(y: AV[Tensor], s: AV[Tensor]) -> AV[Tensor]:
        return network(y, s, cond)

    value, slope = along(Derivative(), fn, x, t, zero, v)
    with torch.no_grad():
        assert worst(value, fn(x, t)) < 1e-5
    # forward and backward mode agree: <w, J d> = <J' w, d>
    weight = Rng.of(7, 2).normal_like(x)
    inputs = [z.requires_grad_() for z in (*x.values(), *t.values())]
    backward = torch.autograd.grad(inner(weight, fn(x, t)), inputs)
    along_x_and_t = (*(t * v).values(), *t.values())
    expected = sum(float((g * d).detach().sum()) for g, d in zip(backward, along_x_and_t, strict=True))
    assert abs(expected) > 1
    assert float(inner(weight, slope).detach()) == pytest.approx(expected, rel=1e-3)


def test_the_fused_kernels_have_no_forward_mode() -> None:
    q = torch.randn(1, 2, 16, 8)
    with pytest.raises(NotImplementedError), torch.no_grad():
        torch.func.jvp(lambda a: F.scaled_dot_product_attention(a, q, q), (q,), (q,))


class Opaque(torch.autograd.Function):
    """A kernel as extensions are: a backward mode, no forward mode."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # noqa: ANN401, ARG004
        return q + k + v

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:  # noqa: ANN401, ARG004
        return gradients * 3


def test_a_kernel_without_forward_mode_names_the_difference() -> None:
    torch.manual_seed(0)
    network = shaken(TOWER.build())
    for module in network.modules():
        if isinstance(module, Attend):
            module.run = lambda q, k, v: Opaque.apply(q, k.mean(1, keepdim=True), v.mean(1, keepdim=True))  # type: ignore[assignment]
    x, cond = scene_of("wan")
    t = x.map(lambda _: torch.tensor([0.3, 0.8]))
    with pytest.raises(ConfigError, match=r"without forward-mode.*use by='difference'"):
        along(Derivative(), lambda y, s: network(y, s, cond), x, t, t.map(torch.zeros_like), x)
    slope = along(DIFFERENCE, lambda y, s: network(y, s, cond), x, t, t.map(torch.zeros_like), x)[1]
    assert slope["video"].isfinite().all()


@pytest.mark.parametrize(("settings", "message"), [({"by": "jpv"}, "did you mean 'jvp'"), ({"h": 0.0}, "above 0")])
def test_impossible_derivatives_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Derivative(**settings)


def test_the_grid_draws_neighbours_of_the_samplers_grid() -> None:
    x = points(torch.float64, 400)
    t, r = Grid(8, AV(5.0, 1.0))(QuickRng.of(3, 400), x)
    for name, levels in shifted(8, AV(5.0, 1.0)).items():
        above = (t[name][:, None] - levels).abs()
        assert float(above.amin(1).max()) < 1e-15
        assert (
            torch.equal(r[name], levels[above.argmin(1) + 1])
            or worst(AV(r[name]), AV(levels[above.argmin(1) + 1])) < 1e-15
        )
        assert set(above.argmin(1).tolist()) == set(range(8))
    with pytest.raises(ConfigError, match="at least 1"):
        Grid(0)


def test_easy_tuning_starts_as_denoising_and_closes_in() -> None:
    x = points(torch.float32, 4000)
    law = Joint(AV(LogitNormal(), LogitNormal()))
    t, r = Narrowing(law, 1)(QuickRng.of(3, 4000), x)
    assert not any(level.any() for level in r.values())
    gaps = []
    for doublings in (4, 5, 6):
        t, r = Narrowing(law, doublings)(QuickRng.of(3, 4000), x)
        ratios = [r[name] / t[name] for name in x.modalities]
        torch.testing.assert_close(ratios[0], ratios[1], rtol=1e-5, atol=1e-6)
        top = torch.maximum(t["video"], t["audio"])
        expected = 1 - (1 + 8 * torch.sigmoid(-top)) / 2**doublings
        torch.testing.assert_close(ratios[0], expected, rtol=1e-5, atol=1e-6)
        gaps.append(1 - expected)
    torch.testing.assert_close(gaps[0], 2 * gaps[1])
    torch.testing.assert_close(gaps[1], 2 * gaps[2])


@pytest.mark.parametrize("equal", [0.0, 0.25, 1.0])
def test_sorted_pairs_are_in_order_and_equal_at_their_rate(equal: float) -> None:
    x = points(torch.float32, 4000)
    t, r = Sorted(UNIFORM, equal)(QuickRng.of(3, 4000), x)
    same = {name: t[name] == r[name] for name in x.modalities}
    assert torch.equal(same["video"], same["audio"])
    assert float(same["video"].float().mean()) == pytest.approx(equal, abs=0.02)
    assert all(bool((r[name] <= t[name]).all()) for name in x.modalities)
    assert float(t["video"].mean()) == pytest.approx(2 / 3, abs=0.02)
    if equal == 0:
        assert float(r["audio"].mean()) == pytest.approx(1 / 3, abs=0.02)
    with pytest.raises(ConfigError, match=r"Sorted.equal: 1.5"):
        Sorted(UNIFORM, 1.5)


@pytest.mark.parametrize(("step", "sampler"), [(euler_step, euler), (heun_step, heun)])
def test_a_step_is_the_samplers(step: Any, sampler: Any) -> None:  # noqa: ANN401
    x = points(torch.float64, 8)
    grid = shifted(3, AV(5.0, 2.0))
    walked = x
    for i in range(3):
        t, r = (grid.map(lambda levels, j=j: levels[j].expand(8)) for j in (i, i + 1))
        walked = step(EXACT, walked, t, r, NOTHING)
    assert worst(walked, sampler(EXACT, x, grid, NOTHING)) < 1e-14


def drawn(task: str, size: int = 6) -> Scene:
    data = GaussianLatents(shape=SHAPE).batch(0, size)
    return Scene.of(Batch(data.x0, NOTHING, data.ids), {task: 1.0}, Rng.of(4, size))


@pytest.mark.parametrize(("task", "given"), [("a2v", "audio"), ("v2a", "video")])
def test_a_given_modality_stays_at_level_zero_and_does_not_move(task: str, given: str) -> None:
    scene = drawn(task)
    t, r = scene.pair(Grid(4), Rng.of(5, 6))
    assert not t[given].any() and not r[given].any()
    assert torch.equal(scene.at(t)[given], scene.given.x0[given])
    denoiser = scene.around(ToyConfig().build())
    for step in (euler_step, heun_step, map_step):
        assert torch.equal(step(denoiser, scene.at(t), t, r, NOTHING)[given], scene.given.x0[given])
    v = scene.velocity
    slope = along(Derivative(), lambda y, s: denoiser(y, s, NOTHING), scene.at(t), t, r, v)[1]
    assert all(z.isfinite().all() for z in slope.values())
    assert not slope[given].any()


def test_a_given_frame_stays_in_the_derivative_too() -> None:
    scene = drawn("i2av")
    t, r = scene.pair(Grid(4), Rng.of(5, 6))
    denoiser = scene.around(ToyConfig().build())
    for derivative in (Derivative(), DIFFERENCE):
        slope = along(derivative, lambda y, s: denoiser(y, s, NOTHING), scene.at(t), t, r, scene.velocity)[1]
        assert all(z.isfinite().all() for z in slope.values())
        # its velocity is constant: the straight path from noise to what is given
        assert float(slope["video"][:, :, 0].abs().max()) < 1e-3
        assert float(slope["video"][:, :, 1:].abs().max()) > 1e-2


def test_terms_and_reports_count_what_is_generated() -> None:
    scene = drawn("a2v")
    t = scene.levels(AV(torch.linspace(0, 1, 6), torch.rand(6)))
    values = AV(torch.arange(6.0), torch.full((6,), 99.0))
    terms = scene.terms("x", values, t, 4)
    assert float(terms["x/video"]) == 2.5 and float(terms["x/audio"]) == 0
    counts = {name: float(term[1]) for name, term in terms.items() if term.ndim}
    assert sum(count for name, count in counts.items() if "video" in name) == 6
    assert sum(count for name, count in counts.items() if "audio" in name) == 0
    assert scene.terms("x", values, t, 0).keys() == {"x/video", "x/audio"}
    assert scene.report("x/{}/size", values)["x/video/size"].tolist() == [15.0, 6.0]


def test_guidance_of_one_is_the_conditional_call() -> None:
    calls: list[Conditions] = []

    class Asked:
        def __call__(
            self, x_t: AV[Tensor], t: AV[Tensor], cond: Conditions, *, r: AV[Tensor] | None = None
        ) -> AV[Tensor]:
            calls.append(cond)
            return EXACT(x_t, t, cond, r=r)

    scene, t = drawn("t2av"), AV(torch.rand(6), torch.rand(6))
    nets = {"teacher": Asked()}
    plain, one = (scene.teacher(nets, guide)(scene.at(t), t, scene.cond) for guide in (None, Guidance(AV(1.0, 1.0))))
    assert worst(plain, one) == 0
    assert [cond.batch for cond in calls] == [None, None] and calls[0] is calls[1]
    assert isinstance(Guidance()(EXACT, NOTHING), Guided)


def test_a_role_that_is_missing_is_named() -> None:
    with pytest.raises(ConfigError, match="needs 'teacher'; the run has student"):
        play({"student": EXACT}, "teacher")
