"""Compares two policies: win rate with its confidence interval, and samples of both."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np
from numpy.typing import ArrayLike

Z_95 = 1.959963984540054  # the 97.5 % quantile of the standard normal distribution


@dataclass(frozen=True, slots=True, kw_only=True)
class WinRate:
    """How often policy a beat policy b on the same prompts; a tie counts 1/2. `low`, `high`: 95 % interval."""

    rate: float
    low: float
    high: float
    wins: int
    ties: int
    losses: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One prompt with the response after training and, where given, the response before it and the scores of both."""

    prompt: str
    after: str
    before: str | None = None
    score_after: float | None = None
    score_before: float | None = None

    @property
    def gain(self) -> float | None:
        """The increase of the score, or None if a score is missing."""
        if self.score_after is None or self.score_before is None:
            return None
        return self.score_after - self.score_before


def wilson_interval(share: float, count: float) -> tuple[float, float]:
    """Returns the 95 % score interval (Wilson 1927) of a share (0 to 1) observed in `count` independent trials.

    Recommended by Brown, Cai and DasGupta (2001): unlike a bootstrap or the normal approximation it has a width at
    shares of 0 and 1. With ties counted 1/2 the variance is below a binomial's, so the interval is conservative.

    Raises:
        ValueError: share outside [0, 1], or count not positive.
    """
    if not 0 <= share <= 1 or count <= 0:
        raise ValueError(f"a share of 0 to 1 in a positive number of trials is needed, not {share} in {count}")
    spread = Z_95**2 / count
    center = (share + spread / 2) / (1 + spread)
    half = sqrt(spread * share * (1 - share) + spread**2 / 4) / (1 + spread)
    # The bounds at 0 and 1 are exact, in spite of rounding.
    return (0.0 if share == 0 else max(0.0, center - half), 1.0 if share == 1 else min(1.0, center + half))


def win_rate(scores_a: ArrayLike, scores_b: ArrayLike) -> WinRate:
    """Compares the scores of policies a and b, [N] each, prompt by prompt; equal scores count 1/2.

    Raises:
        ValueError: no prompts, different lengths, or a score that is not finite.
    """
    a, b = np.asarray(scores_a, dtype=float), np.asarray(scores_b, dtype=float)
    if a.ndim != 1 or a.shape != b.shape or a.size == 0:
        raise ValueError(f"one score per prompt from each policy is needed, not shapes {a.shape} and {b.shape}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("a score is not finite")
    wins, losses = int((a > b).sum()), int((a < b).sum())
    ties = a.size - wins - losses
    rate = (wins + ties / 2) / a.size
    low, high = wilson_interval(rate, a.size)
    return WinRate(rate=rate, low=low, high=high, wins=wins, ties=ties, losses=losses)


def build_samples(
    prompts: Sequence[str],
    after: Sequence[str],
    *,
    before: Sequence[str] | None = None,
    scores_after: ArrayLike | None = None,
    scores_before: ArrayLike | None = None,
) -> list[Sample]:
    """Joins N prompts with their N responses and scores, in the same order.

    Raises:
        ValueError: the columns differ in length.
    """

    def column(scores: ArrayLike | None) -> list[float] | list[None]:
        return [None] * len(prompts) if scores is None else np.asarray(scores, dtype=float).tolist()

    rows = zip(
        prompts,
        after,
        before if before is not None else [None] * len(prompts),
        column(scores_after),
        column(scores_before),
        strict=True,
    )
    return [
        Sample(prompt=prompt, after=new, before=old, score_after=score, score_before=old_score)
        for prompt, new, old, score, old_score in rows
    ]


def spread_samples(samples: Sequence[Sample], limit: int) -> list[Sample]:
    """Chooses at most `limit` samples evenly along the ranking by gain, largest increase first.

    Both ends are always included, so the selection is not biased towards good samples. Without the scores before
    training the ranking is by the scores after it; without any scores it is the given order.
    """
    keys = [sample.gain if sample.gain is not None else sample.score_after for sample in samples]
    order = sorted(range(len(samples)), key=lambda i: 0.0 if keys[i] is None else -keys[i])  # type: ignore[operator]
    if len(order) > limit:
        order = [order[i] for i in np.linspace(0, len(order) - 1, limit).round().astype(int)]
    return [samples[i] for i in order]
