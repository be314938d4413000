"""Wan and Twin in chunks: a call on the clip and one chunk after another are the same, and none looks ahead."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from soundstage.core.av import AV, cat
from soundstage.core.causal import Cache, Chunking, cut, is_causal, told
from soundstage.core.conditions import Conditions
from soundstage.core.denoiser import StreamGeometry
from soundstage.core.errors import ConfigError, ModalityError
from soundstage.models.adapters.lora import Lora
from soundstage.models.causal_wan import CausalTwin, CausalWan
from soundstage.models.twin import TwinConfig
from soundstage.models.wan import WanConfig
from soundstage.training.parallel import recompute

VIDEO = WanConfig(32, 56, 2, 2, in_channels=6, out_channels=6, frequencies=32, text_width=24, text_length=12)
TWIN = TwinConfig(VIDEO, replace(VIDEO, in_channels=5, out_channels=5, patch=(1,)), 0.3)
GEOMETRY = AV(
    video=StreamGeometry(Fraction(8), 4, channels=6, causal_first=True),
    audio=StreamGeometry(Fraction(1600), 200, channels=5),
)
"""2 and 8 latent steps a second."""
IMAGE = replace(VIDEO, in_channels=10, image_width=20)
BOTH = ("video", "audio")
STEPS = AV(7, 26)
SECOND = Chunking(Fraction(1))
CONFIGS: dict[str, Any] = {"video": VIDEO, "audio": TWIN.audio, "image": IMAGE, "twin": TWIN}
CASES = [("video", ("video",)), ("audio", ("audio",)), ("image", ("video",))]
CASES += [("twin", BOTH), ("twin", ("video",)), ("twin", ("audio",))]


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def scattered(module: nn.Module) -> nn.Module:
    """With weights of which none is zero; the same for the same parameters."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return module.eval()


def built(kind: str = "twin", chunking: Chunking = SECOND) -> Any:  # noqa: ANN401
    return scattered(CONFIGS[kind].as_causal(chunking, GEOMETRY).build())


def clip(modalities: tuple[str, ...] = BOTH) -> AV[Tensor]:
    return AV(noise(2, 6, STEPS["video"], 4, 2, seed=1), noise(2, 5, STEPS["audio"], seed=2)).only(*modalities)


def times(x: AV[Tensor]) -> AV[Tensor]:
    """A level of its own for every step."""
    return x.map(lambda z: torch.rand(2, z.shape[2], generator=torch.Generator().manual_seed(3)))


def conditions(kind: str = "twin", modalities: tuple[str, ...] = BOTH) -> Conditions:
    text = AV(noise(2, 7, 24, seed=4), noise(2, 5, 24, seed=5)).only(*modalities)
    if kind != "image":
        return Conditions(text=text)
    control = AV(video=noise(2, 4, STEPS["video"], 4, 2, seed=6))
    return Conditions(text=text, reference=noise(2, 3, 20, seed=7), control=control)


def chunks(model: Any, x: AV[Tensor]) -> tuple[AV[slice], ...]:  # noqa: ANN401
    return model.chunks(x.map(lambda z: z.shape[2]))


def by_cache(model: Any, x: AV[Tensor], t: AV[Tensor], cond: Conditions) -> AV[Tensor]:  # noqa: ANN401
    cache, parts = Cache(), []
    for chunk in chunks(model, x):
        v, cache = model.extend(cache, cut(x, chunk), cut(t, chunk), told(cond, chunk))
        parts.append(v)
    return cat(parts, dim=2)


def largest(a: AV[Tensor], b: AV[Tensor]) -> float:
    return max(float(x.abs().max()) for x in (a - b).values())


@pytest.mark.parametrize(("kind", "modalities"), CASES, ids=lambda v: v if isinstance(v, str) else "+".join(v))
@pytest.mark.parametrize("window", [None, 1, 0])
@torch.no_grad()
def test_chunks_from_the_cache_are_the_call_on_the_clip(
    kind: str, modalities: tuple[str, ...], window: int | None
) -> None:
    x, cond = clip(modalities), conditions(kind, modalities)
    model = built(kind, Chunking(Fraction(1), window))
    assert len(chunks(model, x)) >= 3
    whole = model(x, times(x), cond)
    assert largest(whole, by_cache(model, x, times(x), cond)) < 1e-5
    one = x.map(lambda _: torch.tensor([0.3, 0.9]))
    assert largest(model(x, one, cond), by_cache(model, x, one, cond)) < 1e-5
    other = built(kind, Chunking(Fraction(1), None if window is not None else 0))
    assert largest(whole, other(x, times(x), cond)) > 1e-4


@pytest.mark.parametrize(("kind", "modalities"), CASES[2:], ids=lambda v: v if isinstance(v, str) else "+".join(v))
def test_no_chunk_depends_on_a_later_one(kind: str, modalities: tuple[str, ...]) -> None:
    """Gradients to later steps, of their latents and of their levels, are 0 and nothing else."""
    model, cond, x = built(kind), conditions(kind, modalities), clip(modalities)
    x, t = x.map(Tensor.requires_grad_), times(x).map(Tensor.requires_grad_)
    inputs = [*x.values(), *t.values()]
    whole, parts = model(x, t, cond), chunks(model, x)
    for k, chunk in enumerate(parts):
        for name, made in cut(whole, chunk).items():
            found = torch.autograd.grad(made.square().sum(), inputs, retain_graph=True)
            for gradient in (found[: len(modalities)], found[len(modalities) :]):
                for i, part in enumerate(parts):
                    for other, g in cut(AV(**dict(zip(modalities, gradient, strict=True))), part).items():
                        size = float(g.abs().max())
                        assert size == 0.0 if i > k else size > 1e-7, (name, k, other, i)


@torch.no_grad()
def test_each_tower_reads_the_others_chunk_and_earlier_ones() -> None:
    """Not only its own: what is heard in a chunk reaches the picture of the same chunk, and of later ones alone."""
    model, x, cond = built(), clip(), conditions()
    t, parts = times(x), chunks(model, x)
    whole = model(x, t, cond)
    for name, other in (BOTH, BOTH[::-1]):
        for k, chunk in enumerate(parts):
            moved = x[name].clone()
            moved[:, :, chunk[name]] += 1
            changed = model(x.replace(**{name: moved}), t, cond)
            for i, part in enumerate(parts):
                difference = float((changed[other] - whole[other])[:, :, part[other]].abs().max())
                assert difference == 0.0 if i < k else difference > 1e-5, (name, k, i)


@pytest.mark.parametrize(("kind", "modalities"), CASES, ids=lambda v: v if isinstance(v, str) else "+".join(v))
@torch.no_grad()
def test_one_chunk_is_the_bidirectional_model(kind: str, modalities: tuple[str, ...]) -> None:
    model, x, cond = built(kind, Chunking(Fraction(60))), clip(modalities), conditions(kind, modalities)
    plain = CONFIGS[kind].build().eval()
    plain.load_state_dict(model.state_dict())
    assert [*plain.state_dict()] == [*model.state_dict()]
    whole = plain(x, times(x), cond)
    assert largest(whole, model(x, times(x), cond)) == 0.0
    assert largest(whole, model.extend(Cache(), x, times(x), cond)[0]) == 0.0
    assert largest(whole, built(kind)(x, times(x), cond)) > 1e-4
    assert not is_causal(plain)


@torch.no_grad()
def test_a_chunks_sound_enters_as_that_of_the_clip_that_ends_with_it() -> None:
    """By convolutions of the whole but for its last 9 steps, which lack what follows."""
    model = built("audio", Chunking(Fraction(2)))
    x = AV(audio=noise(1, 5, 40, seed=1))
    parts = [chunk["audio"] for chunk in chunks(model, x)]
    assert [(part.start, part.stop) for part in parts] == [(0, 16), (16, 32), (32, 40)]
    entered = model._embed(x["audio"], None, model._in_order(x)["audio"])[0]
    whole = model._embed(x["audio"], None, None)[0]
    for part in parts:
        last = part.stop - 9 if part.stop < 40 else 40
        until = model._embed(x["audio"][:, :, : part.stop], None, None)[0]
        assert torch.allclose(entered[:, part], until[:, part], atol=1e-5)
        assert torch.allclose(entered[:, part.start : last], whole[:, part.start : last], atol=1e-5)
        assert part.stop == 40 or float((entered[:, last : part.stop] - whole[:, last : part.stop]).abs().max()) > 1e-3


@torch.no_grad()
def test_a_cache_is_a_value() -> None:
    """Going on from it twice gives the same and leaves it as it was; chunks are shared with the longer one."""
    model, x, cond = built(), clip(), conditions()
    first, second = chunks(model, x)[:2]
    _, cache = model.extend(Cache(), cut(x, first), cut(times(x), first), cond)
    held = [z for memory in cache.layers[0].values() for kind in memory[:2] for pair in kind[0] for z in pair]
    before = [z.clone() for z in held]
    one, longer = model.extend(cache, cut(x, second), cut(times(x), second), cond)
    two, _ = model.extend(cache, cut(x, second), cut(times(x), second), cond)
    assert largest(one, two) == 0.0
    assert all(torch.equal(a, b) for a, b in zip(before, held, strict=True))
    assert longer.layers[0]["video"].own[0][0][0] is cache.layers[0]["video"].own[0][0][0]
    assert longer.steps.as_dict() == second.map(lambda part: part.stop).as_dict()
    assert longer.layers[0]["audio"].before.shape[2] == 9
    assert longer.layers[0]["video"].before is None


@torch.no_grad()
def test_a_window_bounds_what_is_remembered() -> None:
    model, x, cond = built(chunking=Chunking(Fraction(1), 1)), clip(), conditions()
    cache = Cache()
    for chunk in chunks(model, x):
        _, cache = model.extend(cache, cut(x, chunk), cut(times(x), chunk), cond)
        assert {len(block) for memory in cache.layers[0].values() for kind in memory[:2] for block in kind} == {1}


@pytest.mark.parametrize("kind", ["image", "twin"])
def test_gradients_are_those_of_the_call_and_of_recomputed_blocks(kind: str) -> None:
    modalities = BOTH if kind == "twin" else ("video",)
    model, x, cond = built(kind), clip(modalities), conditions(kind, modalities)

    def gradients(make: Any) -> list[Tensor]:  # noqa: ANN401
        out = make(model, x, times(x), cond)
        loss = torch.stack([z.square().mean() for z in out.values()]).sum()
        return list(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))

    whole, chunked = gradients(lambda m, *told: m(*told)), gradients(by_cache)
    recompute(model)
    again = gradients(by_cache)
    for a, b, c in zip(whole, chunked, again, strict=True):
        assert (a is None) == (b is None) == (c is None)
        if a is not None:
            assert float((a - b).abs().max()) < 1e-4 * max(1.0, float(a.abs().max()))
            assert torch.equal(b, c)


@torch.no_grad()
def test_an_adapted_network_goes_on_from_its_cache() -> None:
    model, x, cond = built(), clip(), conditions()
    adapted: Any = Lora(rank=2).on(model, "student")
    for index, parameter in enumerate(adapted.parameters()):
        parameter.data.copy_(noise(*parameter.shape, seed=index) * 0.1)
    whole = adapted(x, times(x), cond)
    assert largest(whole, by_cache(adapted, x, times(x), cond)) < 1e-5
    assert largest(whole, model(x, times(x), cond)) > 1e-4


@torch.no_grad()
def test_a_flow_map_and_blocks_left_out_stay_what_they_are() -> None:
    model = scattered(TWIN.as_flow_map().as_causal(SECOND, GEOMETRY).build())
    x, cond = clip(), conditions()
    t = times(x)
    r = t * 0.5
    parts, cache = [], Cache()
    for chunk in chunks(model, x):
        v, cache = model.extend(cache, cut(x, chunk), cut(t, chunk), cond, r=cut(r, chunk))  # type: ignore[operator]
        parts.append(v)
    whole = model(x, t, cond, r=r)
    assert largest(whole, cat(parts, dim=2)) < 1e-5
    assert largest(whole, model(x, t, cond)) > 1e-4
    fewer = built().skipping([0])
    assert largest(fewer(x, t, cond), built()(x, t, cond)) > 1e-4


def test_a_config_says_its_class_and_what_is_wrong() -> None:
    assert isinstance(built("video"), CausalWan) and isinstance(built(), CausalTwin)
    config = TWIN.as_causal(Chunking(Fraction(1, 2), 3), GEOMETRY)
    assert config.as_causal(SECOND, GEOMETRY).chunking == SECOND
    assert Chunking.read(config.chunking.written()) == config.chunking
    assert (config.chunking.written(), SECOND.written()["window"]) == ({"seconds": "1/2", "window": 3}, None)
    with pytest.raises(ConfigError, match="window: -1"):
        Chunking(window=-1)
    with pytest.raises(ConfigError, match="chunk: 1/4 s is shorter than a latent step; use at least 1/2 s"):
        built(chunking=Chunking(Fraction(1, 4)))(clip(), times(clip()), conditions())
    with pytest.raises(ModalityError, match="no 'audio' here: the value has video"):
        built("video")(clip(("audio",)), times(clip(("audio",))), conditions())
