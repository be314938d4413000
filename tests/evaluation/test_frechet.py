"""Closed forms of the Fréchet distance and of the polynomial MMD."""

from __future__ import annotations

import numpy as np
import pytest

from soundstage.evaluation.frechet import frechet_distance, frechet_floor, gaussian_frechet, polynomial_mmd


def test_one_dimension_is_the_closed_form() -> None:
    """W2^2 of N(1, 4) and N(4, 25) is (1 - 4)^2 + (2 - 5)^2."""
    got = gaussian_frechet(np.array([1.0]), np.array([[4.0]]), np.array([4.0]), np.array([[25.0]]))
    assert got == pytest.approx(18)


def test_commuting_covariances_are_the_closed_form() -> None:
    """With a shared eigenbasis the distance is the sum of squared differences of means and of standard deviations."""
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.normal(size=(12, 12)))
    a, b = rng.uniform(0.1, 3, 12), rng.uniform(0.1, 3, 12)
    mean = rng.normal(size=12)
    got = gaussian_frechet(np.zeros(12), (basis * a**2) @ basis.T, mean, (basis * b**2) @ basis.T)
    assert got == pytest.approx(np.sum(mean**2) + np.sum((a - b) ** 2), rel=1e-10)


def test_general_covariances_agree_with_the_root_of_the_product() -> None:
    rng = np.random.default_rng(1)
    left, right = rng.normal(size=(2, 6, 6))
    a, b = left @ left.T, right @ right.T
    root = np.sqrt(np.linalg.eigvals(a @ b).astype(complex)).sum().real
    assert gaussian_frechet(np.zeros(6), a, np.zeros(6), b) == pytest.approx(np.trace(a + b) - 2 * root, rel=1e-9)


def test_rank_deficient_covariances() -> None:
    """Fewer samples than dimensions: a set against itself is 0, against its shift the squared length of the shift."""
    features = np.random.default_rng(2).normal(size=(10, 64))
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(features, features + 0.5) == pytest.approx(64 * 0.25, rel=1e-6)


def test_it_is_symmetric_and_leaves_its_arguments_alone() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(40, 8)), rng.normal(1, 2, size=(50, 8))
    before = a.copy(), b.copy()
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)
    polynomial_mmd(a, b)
    np.testing.assert_array_equal(a, before[0])
    np.testing.assert_array_equal(b, before[1])


def test_the_floor_is_the_published_one() -> None:
    """Two samples of N(0, I), D = 128, N = 256: 33 as measured elsewhere; half of the set is 256 here."""
    real = np.random.default_rng(4).normal(size=(512, 128))
    assert frechet_floor(real) == pytest.approx(33, rel=0.08)


def test_cubic_kernel_of_gaussians_is_the_closed_form() -> None:
    """E (xy + 1)^3 expands in moments, so MMD^2 = 3 dm1^2 + 3 dm2^2 + dm3^2 in one dimension."""
    mean, sigma = 0.3, 1.4
    rng = np.random.default_rng(5)
    values = [polynomial_mmd(rng.normal(size=(400, 1)), rng.normal(mean, sigma, (400, 1))) for _ in range(60)]
    expected = 3 * mean**2 + 3 * (mean**2 + sigma**2 - 1) ** 2 + (mean**3 + 3 * mean * sigma**2) ** 2
    error = np.std(values) / np.sqrt(len(values))
    assert abs(np.mean(values) - expected) < 4 * error
    assert error < 0.15 * expected


def test_mmd_is_unbiased_for_one_distribution() -> None:
    rng = np.random.default_rng(6)
    values = [polynomial_mmd(*rng.normal(size=(2, 20, 4))) for _ in range(2000)]
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(len(values))


def test_one_vector_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(1, 4\) is not \(N, D\)"):
        frechet_distance(np.zeros((1, 4)), np.zeros((5, 4)))
