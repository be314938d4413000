from collections.abc import Callable

import torch
from torch import Tensor

from soundstage.core import AV, from_x0, noised, to_noise, to_x0, velocity


def test_conversions_invert_the_path(x: AV[Tensor], at: Callable[[float], AV[Tensor]]) -> None:
    x0, noise = x, x.map(torch.sin)
    per_step = x.map(lambda z: torch.linspace(0.1, 1, z.shape[2], dtype=z.dtype).expand(4, -1))
    for t in (at(0.3), at(1.0), per_step):
        x_t, v = noised(x0, noise, t), velocity(x0, noise)
        for name in x.modalities:
            torch.testing.assert_close(to_x0(x_t, v, t)[name], x0[name])
            torch.testing.assert_close(to_noise(x_t, v, t)[name], noise[name])
            torch.testing.assert_close(from_x0(x_t, x0, t)[name], v[name])


def test_ends_of_the_path(x: AV[Tensor], at: Callable[[float], AV[Tensor]]) -> None:
    noise = x.map(torch.cos)
    for name in x.modalities:
        assert torch.equal(noised(x, noise, at(0.0))[name], x[name])
        torch.testing.assert_close(noised(x, noise, at(1.0))[name], noise[name], rtol=0, atol=1e-15)
