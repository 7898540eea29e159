"""What the page tells about labels: what more of them will bring, whether choosing pays, how often the policy wins."""

import math
from collections.abc import Collection, Mapping, Sequence

from deep_rlhf.evaluation.comparison import wilson_interval
from deep_rlhf.feedback.records import MU, WAYS, Label, Version
from deep_rlhf.feedback.state import AccuracyForecast, ArmFigures, PolicyWinRate, SelectionFigures

NEXT = 100  # labels looked ahead
SLOPE, SLOPE_PRECISION = 0.03, 400.0  # accuracy per doubling that is expected, and how many answers that is worth
BEST = 0.98
WIN_RATE_ANSWERS = 60  # the newest ones: older ones are about older policies
RECENT_VERSIONS = 10  # of the policy, that a win rate may be about
BACK_AT = "back_at"  # among the figures of a version that a roll-back made: the one that it is again


def outlook(history: Sequence[tuple[float, float, int]], labels: int) -> AccuracyForecast:
    """The accuracy of the reward model now and after the next hundred labels, by a line over log₂(labels).

    history: (labels learned from, accuracy on the answers that came next, how many those were), refit by refit. The
    slope is drawn to 3 % per doubling, for a few refits say little (Stiennon et al. 2020 have 1 % from 8,000 on).
    """
    points = [(math.log2(known), share, answers) for known, share, answers in history if known > 0 and answers > 0]
    if not points:
        text = "It takes two reward models to say what more answers will bring."
        return AccuracyForecast(labels=labels, next=NEXT, text=text)
    total = sum(weight for *_, weight in points)
    x0 = sum(x * weight for x, _, weight in points) / total
    y0 = sum(y * weight for _, y, weight in points) / total
    covariance = sum(weight * (x - x0) * (y - y0) for x, y, weight in points) + SLOPE_PRECISION * SLOPE
    slope = max(0.0, covariance / (sum(weight * (x - x0) ** 2 for x, _, weight in points) + SLOPE_PRECISION))

    def at(count: float) -> float:
        return min(max(y0 + slope * (math.log2(count) - x0), 0.5), BEST)

    now, then = at(labels), at(labels + NEXT)
    text = (
        f"The reward model foresees {now:.0%} of the next answers; after {NEXT} more it is expected to foresee"
        f" {then:.0%}."
    )
    return AccuracyForecast(labels=labels, next=NEXT, accuracy_now=now, accuracy_then=then, text=text)


def choosing(labels: Sequence[Label], predicted: Mapping[int, float]) -> SelectionFigures:
    """Of the questions chosen here and of the random ones: answers, how many the reward model foresaw, what it learned.

    predicted: P(a is better) by comparison id, by the newest reward model but for the members that learned from that
    answer. "informative" is the mean of how many bits less such an answer surprises it than when it was asked.
    """
    arms: dict[str, list[Label]] = {"chosen": [], "random": []}
    for label in labels:
        reason = label.comparison.why_selected
        is_own = not label.imported and label.comparison.predicted is not None
        if is_own and label.choice in ("a", "b") and reason in WAYS:
            arms["random" if reason == "random" else "chosen"].append(label)
    found: dict[str, ArmFigures] = {}
    for arm, own in arms.items():
        foreseen = [0.5 + 0.5 * _sign(_right(label, label.comparison.predicted)) for label in own]
        gains = [
            math.log2(_right(label, predicted[label.comparison_id]) / _right(label, label.comparison.predicted))
            for label in own
            if label.comparison_id in predicted
        ]
        found[arm] = ArmFigures(answers=len(own), accuracy=_mean(foreseen), informative=_mean(gains))
    return SelectionFigures(**found)


def win_rate(pairs: Sequence[Label]) -> PolicyWinRate | None:
    """How often the newer of two policies won these blind pairs, with the 95 % interval; None: no pairs.

    Beside it the first and the last version that they are about.
    """
    won = {label.event_id: won for label in pairs if (won := won_by_newer(label)) is not None}
    if not won:
        return None
    rate = sum(won.values()) / len(won)
    low, high = wilson_interval(rate, len(won))
    newer = [max(label.comparison.writers) for label in pairs if label.event_id in won]
    return PolicyWinRate(rate=rate, low=low, high=high, answers=len(won), first=min(newer), last=max(newer))


def blind_pairs(labels: Sequence[Label], recent: Collection[int]) -> list[Label]:
    """The newest answers to blind pairs about one of the versions `recent`."""
    pairs = [label for label in labels if won_by_newer(label) is not None]
    return [label for label in pairs if max(label.comparison.writers) in recent][-WIN_RATE_ANSWERS:]


def recent_versions(policies: Sequence[Version]) -> set[int]:
    """The newest version and the last few that it has come through: none that a roll-back threw away."""
    known = {version.number: version for version in policies}
    number, found = max(known, default=0), set[int]()
    while number in known and len(found) < RECENT_VERSIONS:
        found.add(number)
        number = int(known[number].figures.get(BACK_AT, number - 1))
    return found


def won_by_newer(label: Label) -> float | None:
    """1, ½ or 0 of a blind pair: whether people liked the newer policy's answer better; None for any other label."""
    if label.imported or label.comparison.why_selected != "win_rate":
        return None
    if label.choice is None or len(label.comparison.writers) != 2:
        return None
    mu = MU[label.choice]
    first, second = label.comparison.writers
    return mu if mu is None or first > second else 1 - mu


def _right(label: Label, p: float | None) -> float:
    """The probability that was given to what was answered."""
    p = min(max(0.5 if p is None else p, 0.01), 0.99)
    return p if label.choice == "a" else 1 - p


def _sign(p: float) -> int:
    return (p > 0.5) - (p < 0.5)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
