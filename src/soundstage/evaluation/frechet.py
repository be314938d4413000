"""Distances between two sets of feature vectors: the Fréchet distance and the unbiased polynomial MMD.

The Fréchet distance of a finite sample is biased upwards, by tens to hundreds for a few hundred samples of a
400-dimensional feature: report `frechet_floor` (real against real) and N beside it, or use the unbiased MMD.
"""

from __future__ import annotations

import numpy as np


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Squared Fréchet distance of the Gaussians fitted to two sets of features (N, D) and (M, D).

    |mu_a - mu_b|^2 + Tr(A + B - 2 (A B)^(1/2)) (Dowson and Landau 1982). With S = A^(1/2), the trace of the root is
    the sum of the roots of the eigenvalues of S B S, which is symmetric: stable for rank-deficient covariances, where
    a general matrix root is not.
    """
    return gaussian_frechet(*_moments(a), *_moments(b))


def gaussian_frechet(mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray) -> float:
    """The same from means (D,) and covariances (D, D)."""
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    product = np.clip(np.linalg.eigvalsh(root @ cov_b @ root), 0, None)
    distance = np.sum((mean_a - mean_b) ** 2) + np.trace(cov_a) + np.trace(cov_b) - 2 * np.sqrt(product).sum()
    return float(max(distance, 0.0))


def polynomial_mmd(
    a: np.ndarray, b: np.ndarray, degree: int = 3, gamma: float | None = None, offset: float = 1.0
) -> float:
    """Unbiased squared maximum mean discrepancy with the kernel (gamma x.y + offset)^degree, gamma = 1/D.

    With the defaults, the kernel distance KID/KVD without its factor of 1000 (Bińkowski et al. 2018, equation 4);
    zero on average for two samples of one distribution, so it may be slightly negative.
    """
    a, b = _features(a), _features(b)
    gamma = 1.0 / a.shape[1] if gamma is None else gamma
    aa, bb, ab = ((gamma * (x @ y.T) + offset) ** degree for x, y in ((a, a), (b, b), (a, b)))
    n, m = len(a), len(b)
    return float((aa.sum() - np.trace(aa)) / (n * (n - 1)) + (bb.sum() - np.trace(bb)) / (m * (m - 1)) - 2 * ab.mean())


def frechet_floor(real: np.ndarray, seed: int = 0, splits: int = 8) -> float:
    """The distance between two random halves of the real features, averaged: what a perfect model of N/2 would get."""
    real = _features(real)
    rng = np.random.default_rng(seed)
    half = len(real) // 2
    orders = (rng.permutation(len(real)) for _ in range(splits))
    return float(np.mean([frechet_distance(real[order[:half]], real[order[half:]]) for order in orders]))


def _moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    features = _features(features)
    return features.mean(axis=0), np.atleast_2d(np.cov(features, rowvar=False))


def _features(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or len(values) < 2:
        raise ValueError(f"features: shape {values.shape} is not (N, D) with N of at least 2")
    return values
