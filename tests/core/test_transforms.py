"""AV and Conditions pass through torch's program transforms: compile, export, jvp, vmap, checkpointing."""

import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from soundstage.core import APG, AV, Conditions, Guided, Isolated, Known, euler, linear

At = Callable[[float], AV[Tensor]]


@pytest.fixture
def cond(text: Conditions, x: AV[Tensor]) -> Conditions:
    """Text, a mask and control latents, so that the tree has several fields."""
    mask = text.text.map(lambda z: torch.ones(z.shape[:2], dtype=torch.bool))
    return Conditions(text=text.text, text_mask=mask, control=x.map(torch.cos))


def wrapped(toy: nn.Module, x: AV[Tensor], cond: Conditions) -> Known:
    """Every wrapper at once."""
    mask = x.map(lambda z: torch.ones(z.shape[0], z.shape[2]).index_fill(1, torch.tensor([0]), 0.0))
    text_guided = Guided(toy, cond.map(lambda z: z[:1]), AV(3.0, 2.0), interval=(0.1, 0.9), projection=APG(limit=1.0))
    return Known(Guided(text_guided, None, AV(3.0, 2.0), weak=Isolated(toy)), x.map(torch.cos), mask)


@pytest.mark.parametrize("wrap", [False, True], ids=["network", "wrapped"])
def test_compile_without_graph_breaks(toy: nn.Module, x: AV[Tensor], cond: Conditions, at: At, wrap: bool) -> None:
    torch._dynamo.reset()
    denoiser = wrapped(toy, x, cond) if wrap else toy

    def call(x_t: AV[Tensor], t: AV[Tensor], cond: Conditions) -> AV[Tensor]:
        return denoiser(x_t, t, cond)

    compiled = torch.compile(call, fullgraph=True, backend="eager")
    out, plain = compiled(x, at(0.5), cond), denoiser(x, at(0.5), cond)
    assert out.modalities == x.modalities
    for name in x.modalities:
        torch.testing.assert_close(out[name], plain[name])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("modalities", [("video", "audio")], indirect=True)
def test_compile_with_inductor(toy: nn.Module, x: AV[Tensor], cond: Conditions, at: At) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda x_t, t, cond: toy(x_t, t, cond), fullgraph=True)
    out, plain = compiled(x, at(0.5), cond), toy(x, at(0.5), cond)
    for name in x.modalities:
        torch.testing.assert_close(out[name], plain[name])


def test_export_saves_loads_and_runs(toy: nn.Module, x: AV[Tensor], cond: Conditions, at: At) -> None:
    torch._dynamo.reset()
    program = torch.export.export(toy, (x, at(0.5), cond))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    other = x.map(torch.sin)
    out, plain = loaded(other, at(0.2), cond), toy(other, at(0.2), cond)
    assert isinstance(out, AV) and out.modalities == x.modalities
    for name in x.modalities:
        torch.testing.assert_close(out[name], plain[name])


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_jvp_equals_the_difference_quotient(toy: nn.Module, x: AV[Tensor], cond: Conditions, at: At) -> None:
    """The tangent (v, 1) of a flow map: d/ds f(x + s v, t + s), with AV as primals, tangents and outputs."""
    v = x.map(torch.sin)

    def f(x_t: AV[Tensor], t: AV[Tensor]) -> AV[Tensor]:
        return toy(x_t, t, cond)

    out, tangent = torch.func.jvp(f, (x, at(0.5)), (v, at(1.0)))
    h = 1e-6
    ahead, behind = f(x + h * v, at(0.5 + h)), f(x - h * v, at(0.5 - h))
    for name in x.modalities:
        torch.testing.assert_close(out[name], toy(x, at(0.5), cond)[name])
        torch.testing.assert_close(tangent[name], (ahead[name] - behind[name]) / (2 * h), rtol=1e-6, atol=1e-8)


def test_vmap_over_samples(toy: nn.Module, x: AV[Tensor], at: At) -> None:
    each = torch.func.vmap(lambda a, t: toy(a.map(lambda z: z[None]), t.map(lambda s: s[None]), Conditions()))
    out, plain = each(x, at(0.5)), toy(x, at(0.5), Conditions())
    for name in x.modalities:
        torch.testing.assert_close(out[name][:, 0], plain[name])


def test_activation_checkpointing_gives_the_same_gradients(
    toy: nn.Module, x: AV[Tensor], cond: Conditions, at: At
) -> None:
    def gradients(call: Callable[..., AV[Tensor]]) -> list[Tensor]:
        toy.zero_grad()
        leaf = x.map(lambda z: z.clone().requires_grad_())
        out = call(leaf, at(0.5), cond)
        sum(z.square().sum() for z in out.values()).backward()
        return [z.grad for z in leaf.values()] + [p.grad for p in toy.parameters() if p.grad is not None]

    plain = gradients(toy)
    saved = gradients(lambda *inputs: checkpoint(toy, *inputs, use_reentrant=False))
    assert len(plain) == len(saved) >= 3
    for a, b in zip(plain, saved, strict=True):
        torch.testing.assert_close(a, b)


def test_a_whole_sampler_is_differentiated(toy: nn.Module, x: AV[Tensor], cond: Conditions) -> None:
    """Rollout losses: gradients through two guided, checkpointed steps reach the network."""
    guided = Guided(toy, cond.map(lambda z: z[:1]), AV(2.0, 2.0))

    def saved(x_t: AV[Tensor], t: AV[Tensor], c: Conditions, *, r: AV[Tensor] | None = None) -> AV[Tensor]:
        return checkpoint(guided, x_t, t, c, r=r, use_reentrant=False)

    times = linear(2, x.map(lambda _: 1.0))
    found = []
    for denoiser in (guided, saved):
        toy.zero_grad()
        sum(z.square().sum() for z in euler(denoiser, x, times, cond).values()).backward()
        found.append([p.grad.clone() for p in toy.parameters() if p.grad is not None])
    assert found[0] and all(g.abs().sum() > 0 for g in found[0])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
