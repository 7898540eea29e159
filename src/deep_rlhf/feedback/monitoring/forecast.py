"""Forecast of reward-model accuracy; active versus random selection."""

import math
from collections.abc import Mapping, Sequence

from deep_rlhf.feedback.records import ACQUISITION_RULES, Label
from deep_rlhf.feedback.state import AccuracyForecast, ArmFigures, SelectionFigures

NEXT = 100  # labels to forecast
PRIOR_SLOPE, PRIOR_WEIGHT = 0.03, 400.0  # accuracy per doubling of the labels, and how many labels this prior is worth
MOST_ACCURACY = 0.98


def forecast_accuracy(history: Sequence[tuple[float, float, int]], labels: int) -> AccuracyForecast:
    """The reward model's accuracy now and after the next hundred labels, by regression on log₂(labels).

    history: one (labels learned from, accuracy on the new labels, number of new labels) per refit. The slope is shrunk
    towards 3 % per doubling, since a few refits are little evidence (Stiennon et al. 2020 find 1 % above 8,000 labels).
    """
    points = [(math.log2(known), share, count) for known, share, count in history if known > 0 and count > 0]
    if not points:
        text = "Two versions of the reward model are needed for a forecast."
        return AccuracyForecast(labels=labels, next=NEXT, text=text)
    total = sum(weight for *_, weight in points)
    x0 = sum(x * weight for x, _, weight in points) / total
    y0 = sum(y * weight for _, y, weight in points) / total
    covariance = sum(weight * (x - x0) * (y - y0) for x, y, weight in points) + PRIOR_WEIGHT * PRIOR_SLOPE
    slope = max(0.0, covariance / (sum(weight * (x - x0) ** 2 for x, _, weight in points) + PRIOR_WEIGHT))

    def accuracy_at(count: float) -> float:
        return min(max(y0 + slope * (math.log2(count) - x0), 0.5), MOST_ACCURACY)

    now, then = accuracy_at(labels), accuracy_at(labels + NEXT)
    text = (
        f"The reward model predicts {now:.0%} of new labels correctly; after {NEXT} more labels, {then:.0%} expected."
    )
    return AccuracyForecast(labels=labels, next=NEXT, accuracy_now=now, accuracy_then=then, text=text)


def compare_selection(labels: Sequence[Label], predicted: Mapping[int, float]) -> SelectionFigures:
    """Actively selected against random questions: labels, share predicted correctly, and information gained.

    predicted: P(a is better) by comparison id, by the members of the newest reward model that did not learn from that
    label. `informative` is the mean of log₂(newest / former probability of the label), in bits, where the former one is
    the prediction when the question was asked.
    """
    arms: dict[str, list[Label]] = {"chosen": [], "random": []}
    for label in labels:
        reason = label.comparison.why_selected
        is_local = not label.imported and label.comparison.predicted is not None
        if is_local and label.choice in ("a", "b") and reason in ACQUISITION_RULES:
            arms["random" if reason == "random" else "chosen"].append(label)
    found: dict[str, ArmFigures] = {}
    for arm, own in arms.items():
        correct = [0.5 + 0.5 * _sign(_probability(label, label.comparison.predicted)) for label in own]
        gains = [
            math.log2(
                _probability(label, predicted[label.comparison_id]) / _probability(label, label.comparison.predicted)
            )
            for label in own
            if label.comparison_id in predicted
        ]
        found[arm] = ArmFigures(labels=len(own), accuracy=_mean(correct), informative=_mean(gains))
    return SelectionFigures(**found)


def _probability(label: Label, p: float | None) -> float:
    """The probability of the label, for a prediction p = P(a is better); within [0.01, 0.99]."""
    p = min(max(0.5 if p is None else p, 0.01), 0.99)
    return p if label.choice == "a" else 1 - p


def _sign(p: float) -> int:
    return (p > 0.5) - (p < 0.5)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
