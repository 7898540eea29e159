"""Calibration of a reward model on held-out pairs.

mu is the probability that response a is better (1, 0, 1/2 for a tie, or a share of votes), as in `types.Preference`.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Predicted and observed preferences in bins of equal width; empty bins are left out.

    Every pair counts in both orders, so `count` sums to twice the pairs and the curve is symmetric about (1/2, 1/2).
    """

    predicted: tuple[float, ...]  # mean predicted P(a better) in the bin
    observed: tuple[float, ...]  # mean mu in the bin
    count: tuple[int, ...]
    expected_error: float  # mean |observed - predicted| over bins, weighted by count (Guo et al. 2017, equation 5)


def calibration(reward_a: ArrayLike, reward_b: ArrayLike, mu: ArrayLike, bins: int = 10) -> Calibration:
    """Compares the Bradley-Terry probability sigmoid(reward_a - reward_b) with mu, [N] each, in equal bins of 0 to 1.

    Which response is called a is arbitrary, so every pair counts in both orders (a bin and its mirror image).

    Raises:
        ValueError: no pairs, different lengths, or a reward that is not finite.
    """
    a, b, preference = _columns(reward_a, reward_b, mu)
    difference = np.concatenate([a - b, b - a])
    observed = np.concatenate([preference, 1 - preference])
    if difference.size == 0 or not np.isfinite(difference).all():
        raise ValueError("calibration needs at least one pair, and finite rewards")
    # A sigmoid that cannot overflow. Binning its larger side puts mirrored pairs into mirrored bins despite rounding.
    probability = 0.5 + 0.5 * np.tanh(difference / 2)
    upper = np.minimum((np.maximum(probability, 1 - probability) * bins).astype(int), bins - 1)
    index = np.where(difference >= 0, upper, bins - 1 - upper)

    count = np.bincount(index, minlength=bins)
    filled = count > 0
    mean_probability = np.bincount(index, weights=probability, minlength=bins)[filled] / count[filled]
    mean_observed = np.bincount(index, weights=observed, minlength=bins)[filled] / count[filled]
    gap = np.abs(mean_observed - mean_probability)
    return Calibration(
        predicted=tuple(mean_probability.tolist()),
        observed=tuple(mean_observed.tolist()),
        count=tuple(count[filled].tolist()),
        expected_error=float((gap * count[filled]).sum() / count.sum()),
    )


def _columns(*columns: ArrayLike) -> tuple[NDArray[np.float64], ...]:
    arrays = tuple(np.asarray(column, dtype=np.float64) for column in columns)
    if any(array.ndim != 1 or array.shape != arrays[0].shape for array in arrays):
        raise ValueError(f"rewards and mu must be one number per pair, not shapes {[array.shape for array in arrays]}")
    return arrays
