from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from soundstage.core import AV, Conditions, ConfigError, tap


def test_tap_reads_with_gradient_and_leaves_no_hook(
    toy: nn.Module, x: AV[Tensor], at: Callable[[float], AV[Tensor]], modalities: tuple[str, ...]
) -> None:
    names = [f"mix.{name}" for name in modalities]
    plain = toy(x, at(0.5), Conditions())
    with tap(toy, names) as features:
        out = toy(x, at(0.5), Conditions())
    assert list(features) == names
    for name in modalities:
        assert torch.equal(out[name], plain[name]), "a tap changes nothing"
        expected = toy.mix[name](x[name].movedim(1, -1))
        assert torch.equal(features[f"mix.{name}"], expected) and features[f"mix.{name}"].requires_grad
    features.clear()
    toy(x, at(0.5), Conditions())
    assert not features


def test_hooks_go_when_the_block_fails(toy: nn.Module) -> None:
    with pytest.raises(RuntimeError), tap(toy, ["mix.video"]):
        raise RuntimeError
    assert not toy.mix["video"]._forward_hooks


def test_a_wrong_name_is_answered_with_the_near_one(toy: nn.Module) -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'mix\.video'"), tap(toy, ["mix.vidoe"]):
        pass
