"""The block-causal trunk: one forward pass, chunk by chunk from a cache, and streaming, all the same numbers."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from soundstage.core.av import AV, cat
from soundstage.core.causal import Cache, chunked, cut, told
from soundstage.core.conditions import Conditions
from soundstage.core.denoiser import StreamGeometry
from soundstage.core.errors import ConfigError
from soundstage.media.geometry import Clock
from soundstage.models.adapters.lora import Lora
from soundstage.models.causal import CausalDiT, CausalDiTConfig
from soundstage.models.text.bytes import ByteTextConfig, tokenize
from soundstage.models.unified_dit import LARGE, SMALL, UnifiedDiTConfig
from soundstage.training.parallel import recompute

SMALLEST = UnifiedDiTConfig(width=32, depth=2, num_heads=2, rank=8, text=ByteTextConfig(16, 1, 2), text_inner=16)
CONFIG = CausalDiTConfig.of(SMALLEST)
PROMPTS = ["a red ball bounces twice", "three drums"]
STEPS = AV(7, 24)
BOTH = ("video", "audio")
COND = tokenize(PROMPTS)


def built(**changes: object) -> CausalDiT:
    """A small trunk of which no weight is zero, so that every part of it is heard."""
    torch.manual_seed(0)
    model = replace(CONFIG, **changes).build().eval()  # type: ignore[arg-type]
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    return model


def clip(modalities: tuple[str, ...] = BOTH, steps: AV[int] = STEPS) -> AV[Tensor]:
    generator = torch.Generator().manual_seed(1)
    video = torch.randn(2, 32, steps["video"], 4, 4, generator=generator)
    return AV(video, torch.randn(2, 32, steps["audio"], generator=generator)).only(*modalities)


def times(x: AV[Tensor]) -> AV[Tensor]:
    """A level of its own for every step."""
    generator = torch.Generator().manual_seed(2)
    return x.map(lambda z: torch.rand(2, z.shape[2], generator=generator))


def chunks(model: CausalDiT, x: AV[Tensor]) -> tuple[AV[slice], ...]:
    return model.chunks(x.map(lambda z: z.shape[2]))


def by_cache(model: CausalDiT, x: AV[Tensor], t: AV[Tensor], cond: Conditions = COND) -> AV[Tensor]:
    cache, parts = Cache(), []
    for chunk in chunks(model, x):
        v, cache = model.extend(cache, cut(x, chunk), cut(t, chunk), told(cond, chunk))
        parts.append(v)
    return cat(parts, dim=2)


def largest(a: AV[Tensor], b: AV[Tensor]) -> float:
    return max(float(x.abs().max()) for x in (a - b).values())


@pytest.mark.parametrize("modalities", [BOTH, ("video",), ("audio",)], ids="+".join)
@pytest.mark.parametrize("window", [None, 1, 0])
@torch.no_grad()
def test_chunks_from_the_cache_are_the_forward_pass_over_the_clip(
    modalities: tuple[str, ...], window: int | None
) -> None:
    model, x = built(window=window), clip(modalities)
    cond = COND.only(*modalities)
    assert len(chunks(model, x)) >= 3
    whole = model(x, times(x), cond)
    assert largest(whole, by_cache(model, x, times(x), cond)) < 1e-5
    assert largest(whole, built(window=None if window is not None else 0)(x, times(x), cond)) > 1e-4


@torch.no_grad()
def test_positions_are_the_clips_own_where_they_are_told() -> None:
    model, x = built(), clip()
    later = x.map(lambda z, g: torch.tensor(g.seconds(z.shape[2])).expand(2, -1) + 0.7, SMALL)
    cond = replace(COND, positions=later)
    whole = model(x, times(x), cond)
    assert largest(whole, by_cache(model, x, times(x), cond)) < 1e-5
    assert largest(whole, model(x, times(x), COND)) > 1e-4


@torch.no_grad()
def test_what_is_later_changes_nothing_at_all() -> None:
    model, x = built(), clip()
    t, parts = times(x), chunks(model, x)
    whole = model(x, t, COND)
    for k, chunk in enumerate(parts):
        other, level = x.map(torch.clone), t.map(torch.clone)
        for name, where in chunk.items():
            other[name][:, :, where] += 1
            level[name][:, where] = 0.5
        changed = model(other, level, COND)
        for i, part in enumerate(parts):
            difference = largest(cut(changed, part), cut(whole, part))
            assert difference == 0.0 if i < k else difference > 1e-5, (i, k)


@torch.no_grad()
def test_one_chunk_is_the_bidirectional_model() -> None:
    model, x = built(chunk=Fraction(60)), clip()
    plain = SMALLEST.build().eval()
    plain.load_state_dict(model.state_dict())
    whole = plain(x, times(x), COND)
    assert largest(whole, model(x, times(x), COND)) == 0.0
    assert largest(whole, model.extend(Cache(), x, times(x), COND)[0]) == 0.0
    assert largest(whole, built()(x, times(x), COND)) > 1e-4


@torch.no_grad()
def test_a_cache_is_a_value() -> None:
    """Going on from it twice gives the same, and leaves it as it was."""
    model, x = built(), clip()
    first, second = chunks(model, x)[:2]
    _, cache = model.extend(Cache(), cut(x, first), cut(times(x), first), COND)
    before = [tensor.clone() for layer in cache.layers for pair in layer for tensor in pair]
    one, longer = model.extend(cache, cut(x, second), cut(times(x), second), COND)
    two, _ = model.extend(cache, cut(x, second), cut(times(x), second), COND)
    assert largest(one, two) == 0.0
    after = [tensor for layer in cache.layers for pair in layer for tensor in pair]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert longer.layers[0][0][0] is cache.layers[0][0][0], "chunks are shared, not copied"
    assert (cache.steps.as_dict(), longer.steps.as_dict()) == (
        first.map(lambda s: s.stop).as_dict(),
        second.map(lambda s: s.stop).as_dict(),
    )


def test_gradients_are_those_of_the_forward_pass_and_of_recomputed_blocks() -> None:
    model, x = built(), clip()

    def gradients(make: object) -> list[Tensor]:
        out = make(model, x, times(x))  # type: ignore[operator]
        loss = torch.stack([z.square().mean() for z in out.values()]).sum()
        return list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True))

    whole, chunked_ = gradients(lambda m, x, t: m(x, t, COND)), gradients(by_cache)
    recompute(model)
    again = gradients(by_cache)
    for a, b, c in zip(whole, chunked_, again, strict=True):
        assert (a is None) == (b is None) == (c is None)
        if a is not None:
            assert float((a - b).abs().max()) < 1e-5
            assert torch.equal(b, c)


def test_an_adapted_network_goes_on_from_its_cache() -> None:
    model, x = built(), clip()
    adapted = Lora(rank=2).on(model, "student")
    for parameter in adapted.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    with torch.no_grad():
        whole = adapted(x, times(x), COND)
        assert largest(whole, by_cache(adapted, x, times(x))) < 1e-5  # type: ignore[arg-type]
        assert largest(whole, model(x, times(x), COND)) > 1e-4


@pytest.mark.parametrize(("geometry", "steps"), [(SMALL, AV(9, 33)), (LARGE, AV(31, 158))], ids=["small", "large"])
@pytest.mark.parametrize("seconds", [Fraction(1, 4), Fraction(1, 2), Fraction(1)])
def test_chunks_are_of_the_same_seconds_by_the_exact_clock(
    geometry: AV[StreamGeometry], steps: AV[int], seconds: Fraction
) -> None:
    found = chunked(geometry, steps, seconds)
    video, audio = geometry["video"], geometry["audio"]
    clock = Clock(video.rate, int(audio.rate), video.stride, audio.stride, video.causal_first)
    middles = AV(clock.video_steps(steps["video"]).middle, clock.audio_steps(steps["audio"]).middle)
    for name, count in steps.items():
        assert [i for chunk in found for i in range(count)[chunk[name]]] == list(range(count))
        for k, chunk in enumerate(found):
            inside = middles[name][chunk[name]]
            assert len(inside) and float(seconds) * k <= inside[0]
            assert k == len(found) - 1 or inside[-1] < float(seconds) * (k + 1)


def test_a_chunk_shorter_than_a_step_is_refused() -> None:
    with pytest.raises(ConfigError, match="chunk: 1/8 s is shorter than a latent step; use at least 1/4 s"):
        chunked(SMALL, STEPS, Fraction(1, 8))
    with pytest.raises(ConfigError, match="window: -1"):
        replace(CONFIG, window=-1)


def test_a_size_by_name_is_causal() -> None:
    small = CausalDiTConfig.parse("small")
    assert (type(small), small.width, small.window) == (CausalDiTConfig, 384, None)
