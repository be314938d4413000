import math

import pytest
import torch
from torch import Tensor

from soundstage.core import (
    AV,
    ConfigError,
    Joint,
    Listed,
    LogitNormal,
    Mode,
    Rng,
    Shifted,
    TimeLaw,
    TokenShift,
    Uniform,
    shift,
)

N = 20_001
U = (torch.arange(N, dtype=torch.float64) + 0.5) / N
LAWS = [
    Uniform(),
    Uniform(0.02, 0.98),
    LogitNormal(-0.8, 1.6),
    Mode(1.29),
    Mode(-0.9),
    Listed((1.0, 0.75, 0.5, 0.25)),
    Shifted(Uniform(), 5.0),
    Shifted(LogitNormal(), TokenShift()),
]


@pytest.mark.parametrize("law", LAWS, ids=repr)
def test_every_law_is_a_quantile_function(law: TimeLaw) -> None:
    t = law(U, 2048)
    assert t.min() >= 0 and t.max() <= 1
    assert (t.diff() >= 0).all()


def test_closed_forms() -> None:
    """Mean and quantiles of each law, from its density."""
    assert Uniform(0.2, 0.6)(U).mean().item() == pytest.approx(0.4)
    assert LogitNormal(0.5, 1.0)(U).logit().mean().item() == pytest.approx(0.5, abs=1e-3)
    assert LogitNormal(0.5, 2.0)(U).logit().std().item() == pytest.approx(2.0, rel=1e-3)
    assert Shifted(Uniform(), 5.0)(U).median().item() == pytest.approx(5 / 6)
    levels, counts = Listed((1.0, 0.5, 0.25, 0.75))(U).unique(return_counts=True)
    assert levels.tolist() == [0.25, 0.5, 0.75, 1.0] and counts.max() - counts.min() <= 1
    torch.testing.assert_close(Mode(0.0)(U), U)
    s = 1.29
    torch.testing.assert_close(Mode(s)(U), 1 - (1 - U) - s * (torch.cos(math.pi / 2 * (1 - U)) ** 2 - 1 + (1 - U)))


def test_a_shifted_logit_normal_is_a_logit_normal_with_a_larger_mean() -> None:
    torch.testing.assert_close(Shifted(LogitNormal(), math.e)(U), LogitNormal(1.0)(U))


def test_token_shift_passes_through_its_anchors() -> None:
    by = TokenShift()
    assert (by(1024), by(4096)) == (pytest.approx(math.exp(0.95)), pytest.approx(math.exp(2.05)))
    assert TokenShift(cells_per_token=4)(4 * 2560) == pytest.approx(math.exp(1.5))


@pytest.mark.parametrize("shared", [True, False])
def test_joint(modalities: tuple[str, ...], shared: bool) -> None:
    size = 4000
    x = AV(torch.zeros(size, 1, 4, 8, 8), torch.zeros(size, 1, 16)).only(*modalities)
    laws: AV[TimeLaw] = AV(Shifted(Uniform(), TokenShift((16, 0.0), (256, 1.0))), Uniform())
    t = Joint(laws, shared)(Rng.of(0, size), x)
    assert t.modalities == modalities
    assert all(level.shape == (size,) and level.dtype == torch.float32 for level in t.values())
    if "audio" in modalities:
        assert abs(t["audio"].mean() - 0.5) < 0.02
    if len(modalities) == 2:
        if shared:
            torch.testing.assert_close(t["video"], shift(t["audio"], math.e))
        else:
            assert abs(torch.corrcoef(torch.stack(list(t.values())))[0, 1]) < 0.06


def test_joint_alone_equals_in_a_batch() -> None:
    def draw(batch: int, start: int) -> AV[Tensor]:
        x = AV(torch.zeros(batch, 1, 2, 2, 2), torch.zeros(batch, 1, 3))
        return Joint(AV(LogitNormal(), Uniform()))(Rng.of(3, batch, start), x)

    batch = draw(4, 0)
    for i in range(4):
        assert all(torch.equal(a[0], b[i]) for a, b in zip(draw(1, i).values(), batch.values(), strict=True))


def test_errors() -> None:
    with pytest.raises(ConfigError, match=r"Mode\.scale: 2"):
        Mode(2.0)
    with pytest.raises(ConfigError, match=r"Listed\.times"):
        Listed((1.2,))
