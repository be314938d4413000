"""Small cases every core test runs on: video and audio, video alone, audio alone; a Gaussian and a toy network."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from soundstage.core import AV, Conditions, spread
from soundstage.testing.analytic import Gaussian, Mixture

VIDEO, AUDIO = (2, 3, 1, 2), (2, 4)
SIZE = math.prod(VIDEO) + math.prod(AUDIO)


@pytest.fixture(params=[("video", "audio"), ("video",), ("audio",)], ids="+".join)
def modalities(request: pytest.FixtureRequest) -> tuple[str, ...]:
    return request.param


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def whitened() -> Callable[[int], AV[Tensor]]:
    """Noise whose sample mean is 0 and sample covariance 1, over all modalities together; a batch above SIZE."""

    def make(batch: int) -> AV[Tensor]:
        z = draws(batch, SIZE, seed=1)
        z = z - z.mean(0)
        z = z @ torch.linalg.inv(torch.linalg.cholesky(z.T @ z / batch)).T
        return AV(z[:, : math.prod(VIDEO)].reshape(-1, *VIDEO), z[:, math.prod(VIDEO) :].reshape(-1, *AUDIO))

    return make


@pytest.fixture
def flat() -> Callable[[AV[Tensor]], Tensor]:
    return lambda x: torch.cat([z.flatten(1) for z in x.values()], dim=1)


def covariance(seed: int) -> Tensor:
    root = draws(SIZE, SIZE, seed=seed) / math.sqrt(SIZE)
    return root @ root.T + 0.1 * torch.eye(SIZE, dtype=torch.float64)


@pytest.fixture
def gaussian() -> Gaussian:
    """Data with correlated modalities."""
    return Gaussian(AV(draws(*VIDEO, seed=2), draws(*AUDIO, seed=3)), covariance(4))


@pytest.fixture
def mixture() -> Mixture:
    """Two well separated clusters, which of them is told alike by both modalities."""
    means = AV(2 * draws(1, *VIDEO, seed=5), 2 * draws(1, *AUDIO, seed=6))
    return Mixture(
        means.map(lambda m: torch.cat([m, -m])),
        0.2 * torch.stack([covariance(7), covariance(8)]),
        torch.tensor([0.3, 0.7], dtype=torch.float64),
    )


class Toy(nn.Module):
    """A network of the Denoiser type: channels mixed, modalities exchanged, text heard, t per sample or per step."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.ModuleDict({"video": nn.Linear(2, 2), "audio": nn.Linear(2, 2)})

    def forward(
        self,
        x_t: AV[Tensor],
        t: AV[Tensor],
        cond: Conditions,
        *,
        r: AV[Tensor] | None = None,  # noqa: ARG002
    ) -> AV[Tensor]:
        summary = sum(torch.tanh(z).flatten(1).mean(1) for z in x_t.values())

        def velocity(name: str, z: Tensor) -> Tensor:
            told = summary
            if cond.text is not None:
                told = told + cond.text[name].mean((1, 2))
            mixed = self.mix[name](z.movedim(1, -1)).movedim(-1, 1)
            return torch.tanh(mixed) * (1 + spread(t[name], z)) + spread(told, z)

        return AV(**{name: velocity(name, z) for name, z in x_t.items()})


class Counted:
    """A denoiser that notes the batch, the modalities and the inputs of every call."""

    def __init__(self, denoiser: Callable[..., AV[Tensor]]) -> None:
        self.denoiser = denoiser
        self.batches: list[int] = []
        self.modalities: list[tuple[str, ...]] = []
        self.last: tuple[AV[Tensor], AV[Tensor], Conditions] | None = None

    def __call__(self, x_t: AV[Tensor], t: AV[Tensor], cond: Conditions, *, r: AV[Tensor] | None = None) -> AV[Tensor]:
        self.batches.append(x_t.batch)
        self.modalities.append(x_t.modalities)
        self.last = (x_t, t, cond)
        return self.denoiser(x_t, t, cond, r=r)


@pytest.fixture
def counted() -> type[Counted]:
    return Counted


@pytest.fixture
def toy() -> Toy:
    torch.manual_seed(0)
    return Toy().double().eval()


@pytest.fixture
def x(modalities: tuple[str, ...]) -> AV[Tensor]:
    """A batch of four noises."""
    return AV(draws(4, *VIDEO, seed=9), draws(4, *AUDIO, seed=10)).only(*modalities)


@pytest.fixture
def text(modalities: tuple[str, ...]) -> Conditions:
    return Conditions(text=AV(draws(4, 5, 3, seed=11), draws(4, 5, 3, seed=12)).only(*modalities))


@pytest.fixture
def at(modalities: tuple[str, ...]) -> Callable[[float], AV[Tensor]]:
    """The same level for the four samples of x."""

    def level(t: float) -> AV[Tensor]:
        return AV(**{name: torch.full((4,), t, dtype=torch.float64) for name in modalities})

    return level
