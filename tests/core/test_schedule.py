import pytest
import torch

from soundstage.core import AV, ConfigError, explicit, held, linear, shift, shifted


def test_linear_and_shifted(modalities: tuple[str, ...]) -> None:
    ones = AV(1.0, 1.0).only(*modalities)
    for name, grid in linear(4, ones).items():
        assert grid.tolist() == [1.0, 0.75, 0.5, 0.25, 0.0] and name in modalities
    for grid in shifted(4, ones * 5.0).values():
        assert grid.tolist() == pytest.approx([1.0, 0.9375, 0.8333333, 0.625, 0.0])
        assert grid.dtype == torch.float64


def test_each_modality_has_its_own_shift_and_start() -> None:
    times = shifted(2, AV(6.0, 3.0), AV(1.0, 0.6))
    assert times["video"].tolist() == pytest.approx([1.0, 6 / 7, 0.0])
    assert times["audio"][0].item() == 0.6, "the start is a level after the shift, exactly"
    u = 0.6 / (3 - 2 * 0.6)
    assert times["audio"][1].item() == pytest.approx(shift(u / 2, 3.0))


def test_shift_is_a_group() -> None:
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    torch.testing.assert_close(shift(shift(t, 5.0), 0.2), t)
    torch.testing.assert_close(shift(shift(t, 2.0), 3.0), shift(t, 6.0))
    assert torch.equal(shift(t, 1.0), t)


def test_held() -> None:
    times = held(linear(3, AV(video=1.0)), "audio", 0.05)
    assert times["audio"].tolist() == [0.05] * 4
    assert held(linear(3), "audio")["audio"].tolist() == [0.0] * 4


def test_errors() -> None:
    with pytest.raises(ConfigError, match="steps: 0"):
        linear(0)
    with pytest.raises(ConfigError, match="shift: -1"):
        shifted(2, AV(-1.0, 1.0))
    with pytest.raises(ConfigError, match=r"start: 0.0 .* held"):
        linear(2, AV(1.0, 0.0))
    with pytest.raises(ConfigError, match=r"times\.audio: .*descend"):
        explicit(AV([1.0, 0.0], [0.5, 0.7]))
    with pytest.raises(ConfigError, match="lengths"):
        explicit(AV([1.0, 0.0], [1.0, 0.5, 0.0]))
