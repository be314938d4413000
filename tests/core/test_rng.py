from hashlib import blake2b

import pytest
import torch

from soundstage.core import AV, Rng, ShapeError


def test_alone_equals_in_a_batch() -> None:
    batch = Rng.of(7, 5).fold("noise", 3)
    for i in range(5):
        alone = Rng.of(7, 1, start=i).fold("noise", 3)
        assert torch.equal(alone.normal(2, 3)[0], batch.normal(2, 3)[i])
        assert torch.equal(alone.uniform(4)[0], batch.uniform(4)[i])
        assert torch.equal(alone.integers(0, 1000)[0], batch.integers(0, 1000)[i])


def test_drawing_consumes_nothing() -> None:
    rng = Rng.of(0, 2)
    first = rng.normal(3)
    rng.uniform(100)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert torch.equal(rng.normal(3), first)
    assert torch.equal(torch.get_rng_state(), state), "the global generator moved"


def test_names_steps_seeds_and_kinds_are_uncorrelated() -> None:
    n = 20_000
    rng = Rng.of(0, 2)
    streams = [
        *rng.normal(n),
        *rng.fold("a").normal(n),
        *rng.fold("b").normal(n),
        *rng.fold("a", 1).normal(n),
        *rng.fold("a", "1").normal(n),
        *Rng.of(1, 1).normal(n),
        *(rng.uniform(n) - 0.5),
    ]
    correlation = torch.corrcoef(torch.stack(streams)) - torch.eye(len(streams))
    assert correlation.abs().max() < 5 / n**0.5


def test_moments() -> None:
    z, u = Rng.of(1, 4).normal(50_000), Rng.of(1, 4).uniform(50_000)
    assert abs(z.mean()) < 0.01 and abs(z.std() - 1) < 0.01
    assert u.min() >= 0 and u.max() < 1 and abs(u.mean() - 0.5) < 0.005
    counts = torch.bincount(Rng.of(2, 3000).integers(0, 3), minlength=3)
    assert counts.min() > 900


def test_seeds_are_a_fixed_function_of_the_names() -> None:
    """Saved runs and clips name a seed: its numbers must stay the same."""

    def digest(parts: str) -> int:
        return int.from_bytes(blake2b(parts.encode(), digest_size=8).digest()) // 2

    first, second = digest("(7, 0)"), digest("(7, 1)")
    assert Rng.of(7, 2).seeds == (first, second)
    generator = torch.Generator().manual_seed(digest(f"({second}, 'noise', 3, 'normal')"))
    assert torch.equal(Rng.of(7, 2).fold("noise", 3).normal(4)[1], torch.randn(4, generator=generator))


def test_normal_like_and_types() -> None:
    x = AV(video=torch.zeros(3, 2, 4, dtype=torch.float64), audio=torch.zeros(3, 2, 4, dtype=torch.bfloat16))
    rng = Rng.of(5, 3)
    noise = rng.normal_like(x)
    assert (noise["video"].dtype, noise["audio"].dtype) == (torch.float64, torch.bfloat16)
    assert torch.equal(noise["video"].float(), rng.fold("video").normal(2, 4))
    assert torch.equal(noise["audio"], rng.fold("audio").normal(2, 4).bfloat16())
    assert torch.equal(rng.normal_like(x.only("audio"))["audio"], noise["audio"]), "alone equals joint"
    with pytest.raises(ShapeError, match=r"Rng\.of\(seed, 3\)"):
        Rng.of(5, 2).normal_like(x)
