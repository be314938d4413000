"""The trunk as a Denoiser: modalities, times, text and order of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from soundstage.core.av import AV
from soundstage.core.conditions import Conditions
from soundstage.core.errors import ConfigError, ShapeError
from soundstage.models.text.bytes import ByteTextConfig, tokenize
from soundstage.models.unified_dit import SIZES, UnifiedDiT, UnifiedDiTConfig

CONFIG = UnifiedDiTConfig(width=32, depth=2, num_heads=2, rank=8, text=ByteTextConfig(16, 1, 2), text_inner=16)
PROMPTS = ["a red ball bounces twice", "three drums"]


@pytest.fixture(scope="module")
def model() -> UnifiedDiT:
    """A small trunk whose zero-initialised layers are random, so that nothing is trivially zero."""
    torch.manual_seed(0)
    built = CONFIG.build().eval()
    for parameter in built.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    return built


@pytest.fixture
def x_t() -> AV[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return AV(video=torch.randn(2, 32, 3, 4, 4, generator=generator), audio=torch.randn(2, 32, 5, generator=generator))


T = AV(video=torch.tensor([0.2, 0.9]), audio=torch.tensor([0.5, 0.1]))


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def largest(a: AV[Tensor], b: AV[Tensor]) -> float:
    return max(float(x.abs().max()) for x in (a - b).values())


def test_shapes_follow_the_latents_and_modalities_touch(model: UnifiedDiT, x_t: AV[Tensor]) -> None:
    cond = tokenize(PROMPTS)
    out = model(x_t, T, cond)
    assert out.map(lambda x: x.shape).as_dict() == x_t.map(lambda x: x.shape).as_dict()
    changed = model(x_t.replace(audio=x_t["audio"] + 1), T, cond)
    assert float((changed["video"] - out["video"]).abs().max()) > 1e-4, "sound must reach the picture"


@pytest.mark.parametrize("name", ["video", "audio"])
def test_one_modality_alone(model: UnifiedDiT, x_t: AV[Tensor], name: str) -> None:
    out = model(x_t.only(name), T.only(name), tokenize(PROMPTS).only(name))
    assert out.modalities == (name,)
    assert out[name].shape == x_t[name].shape


def test_time_per_step_equals_time_per_sample(model: UnifiedDiT, x_t: AV[Tensor]) -> None:
    spread = T.map(lambda t, x: t[:, None].expand(-1, x.shape[2]), x_t)
    assert largest(model(x_t, spread, Conditions()), model(x_t, T, Conditions())) < 1e-5


def test_r_equal_to_t_is_the_velocity_and_another_r_is_not(model: UnifiedDiT, x_t: AV[Tensor]) -> None:
    plain = model(x_t, T, Conditions())
    assert largest(model(x_t, T, Conditions(), r=T), plain) == 0.0
    assert largest(model(x_t, T, Conditions(), r=T * 0.5), plain) > 1e-4


def test_absent_text_equals_masked_text_and_padding_is_unseen(model: UnifiedDiT, x_t: AV[Tensor]) -> None:
    cond = tokenize(PROMPTS)
    dropped = model(x_t, T, cond.drop("text", torch.tensor([True, True])))
    assert largest(dropped, model(x_t, T, Conditions())) < 1e-5
    alone = model(x_t.map(lambda x: x[1:]), T.map(lambda t: t[1:]), tokenize(PROMPTS[1:]))
    assert largest(alone, model(x_t, T, cond).map(lambda x: x[1:])) < 1e-5
    assert largest(dropped, model(x_t, T, cond)) > 1e-4


def test_tokens_keep_their_place(model: UnifiedDiT, x_t: AV[Tensor]) -> None:
    """Cut into patches and put together again, with the channels between as they are."""
    video = x_t["video"]
    cut = video.unflatten(4, (-1, 2)).unflatten(3, (-1, 2)).permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3)
    assert torch.equal(model._untokens(cut, video), video)
    assert torch.equal(cut[0, 0], video[0, :, 0, :2, :2].flatten())


def test_positions_in_seconds(model: UnifiedDiT, x_t: AV[Tensor]) -> None:
    """Given the model's own seconds nothing changes; twice the frame rate is another clip."""
    own = AV(**{n: torch.tensor(g.seconds(x_t[n].shape[2])).expand(2, -1) for n, g in CONFIG.geometry.items()})
    plain = model(x_t, T, Conditions())
    assert largest(model(x_t, T, Conditions(positions=own)), plain) < 1e-5
    assert largest(model(x_t, T, Conditions(positions=own * 0.5)), plain) > 1e-4


def test_wrong_shapes_are_refused(model: UnifiedDiT) -> None:
    with pytest.raises(ShapeError, match="5 channels"):
        model(AV(audio=torch.zeros(1, 5, 3)), AV(audio=torch.zeros(1)), Conditions())
    with pytest.raises(ShapeError, match="patches of 2"):
        model(AV(video=torch.zeros(1, 32, 1, 3, 4)), AV(video=torch.zeros(1)), Conditions())


def test_starts_as_zero_velocity() -> None:
    torch.manual_seed(0)
    x = AV(audio=torch.randn(1, 32, 4))
    assert float(CONFIG.build()(x, AV(audio=torch.ones(1)), Conditions())["audio"].abs().max()) == 0.0


def test_sizes_have_the_parameters_of_their_names() -> None:
    found = {name: SIZES[name].describe() for name in ("tiny", "1b", "3b", "7b")}
    assert found["tiny"]["parameters"] < 4.5e6
    assert found["tiny"]["tokens"] == {"video": 36, "audio": 33}
    for name, billions in {"1b": 1.2, "3b": 3.2, "7b": 6.9}.items():
        assert found[name]["parameters"] == pytest.approx(billions * 1e9, rel=0.03)
    with pytest.raises(ConfigError, match="3b"):
        UnifiedDiTConfig.parse("3bb")


def test_described_flops_match_the_products_counted() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    config = replace(CONFIG, seconds=Fraction(17, 16))
    x = config.shape.map(lambda shape: torch.randn(1, *shape))
    with FlopCounterMode(display=False) as counter:
        config.build()(x, x.map(lambda z: z.new_ones(len(z))), Conditions())
    assert config.describe()["flops"] == pytest.approx(counter.get_total_flops(), rel=0.25)


def test_compiles_whole(model: UnifiedDiT, x_t: AV[Tensor]) -> None:
    cond = tokenize(PROMPTS)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert largest(compiled(x_t, T, cond), model(x_t, T, cond)) < 1e-5
