"""Estimates each annotator's error rate from their labels. It weighs labels; no label is ever deleted.

An annotator labels at random with probability ε, and otherwise prefers a with the probability p that the reward model
predicts (Christiano et al. 2017, §2.2.3; per person, Raykar et al. 2010): p' = (1 − ε) p + ε/2. ε has a Beta prior with
its mode at 10%. Two kinds of questions give evidence that does not depend on the reward model:
- gold questions: the expected choice has p = 0.98;
- repeats: a careful person's own opinion of a question is q ~ Beta(p, 1 − p), and both labels follow the same q, so
  different labels point to chance even where the reward model is unsure.

An overconfident reward model would make careful people look careless, and an underconfident one would say nothing. Its
log-odds are therefore divided by one temperature T, fitted together with all ε: labels that everybody disagrees with
count against the model, and labels that one person disagrees with more than others count against that person.
Predictions should be out of bag (`Fitted.predictions`), because a model agrees with the labels it has learned.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import krippendorff
import numpy as np
from numpy.typing import NDArray

from deep_rlhf.feedback.records import MU, AnnotatorFigures, Label

PRIOR = (1.5, 5.5)  # (α, β) of a Beta distribution: mode 0.1, 95% of it between 0.02 and 0.56
GOLD = 0.98  # P(the expected choice): authors of gold questions err, too
MOST_CONFIDENT = 0.99  # predictions are clipped to this
ROUNDS = 10  # of alternating between error rates and temperature
_RATES = (np.arange(1000) + 0.5) / 1000
_TEMPERATURES = np.geomspace(1 / 8, 16.0, 57)
_CHOICES = ["a", "b", "tie"]

Array = NDArray[np.float64]
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedPair:
    """One label of a pair, or two of the same question, and the prediction."""

    annotator: str
    predicted: float  # P(a is better)
    mu: float  # 1: a, 0: b, ½: a tie, which counts as half a label each way
    again: float | None = None  # μ of the same person's label when the question was repeated


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorRate:
    """The share of random labels: its maximum a posteriori estimate and 95% credible interval."""

    rate: float
    low: float
    high: float


def fit_error_rates(
    pairs: Sequence[JudgedPair], *, gold: Sequence[JudgedPair] = (), prior: tuple[float, float] = PRIOR
) -> dict[str, ErrorRate]:
    """The error rate of every annotator of `pairs` or of `gold` questions, by name.

    prior: (α, β) of the Beta distribution. The estimate is maximum a posteriori, by coordinate ascent between the
    rates, each on a grid, and the temperature.
    """
    alpha, beta = prior
    log_prior = (alpha - 1) * np.log(_RATES) + (beta - 1) * np.log1p(-_RATES)
    own, known = _by(pairs, "annotator"), _by(gold, "annotator")
    names = sorted(own.keys() | known.keys())
    tables = {name: _Table.of(own.get(name, [])) for name in names}
    certain = {name: log_prior + _Table.of(known.get(name, [])).log_likelihood(_RATES, 1.0) for name in names}

    temperature = 1.0
    posteriors: dict[str, Array] = {}
    for _ in range(ROUNDS):
        posteriors = {name: certain[name] + tables[name].log_likelihood(_RATES, temperature) for name in names}
        rates = {name: _RATES[[posterior.argmax()]] for name, posterior in posteriors.items()}
        fits = [
            sum(tables[name].log_likelihood(rates[name], other).item() for name in names) for other in _TEMPERATURES
        ]
        best = float(_TEMPERATURES[int(np.argmax(fits))])
        if best == temperature:
            break
        temperature = best
    return {name: _summary(posterior) for name, posterior in posteriors.items()}


@dataclass(frozen=True, slots=True)
class _Table:
    """Labels as columns [N]."""

    log_odds: Array
    mu: Array
    again: Array  # NaN where the question was asked once

    @classmethod
    def of(cls, pairs: Sequence[JudgedPair]) -> "_Table":
        p = np.clip(np.array([pair.predicted for pair in pairs], dtype=float), 1 - MOST_CONFIDENT, MOST_CONFIDENT)
        again = [np.nan if pair.again is None else pair.again for pair in pairs]
        return cls(
            np.log(p / (1 - p)), np.array([pair.mu for pair in pairs], dtype=float), np.array(again, dtype=float)
        )

    def log_likelihood(self, rates: Array, temperature: float) -> Array:
        """Log-likelihood [len(rates)] with predictions at this temperature. A tie is half a label each way."""
        p = 1 / (1 + np.exp(-self.log_odds / temperature))
        e = rates[:, None]
        once, twice = np.isnan(self.again), ~np.isnan(self.again)
        p1, mu = p[once], self.mu[once]
        single = mu * np.log((1 - e) * p1 + e / 2) + (1 - mu) * np.log((1 - e) * (1 - p1) + e / 2)
        p2, first, second = p[twice], self.mu[twice], self.again[twice]
        split = p2 * (1 - p2) / 2  # E[q (1 − q)] for q ~ Beta(p, 1 − p)
        aa, bb, ab = (
            np.log((1 - e) ** 2 * both + (1 - e) * e * one + e**2 / 4)
            for both, one in ((p2 - split, p2), (1 - p2 - split, 1 - p2), (split, 0.5))
        )
        differing = first * (1 - second) + (1 - first) * second
        double = first * second * aa + (1 - first) * (1 - second) * bb + differing * ab
        return np.asarray(single.sum(axis=1) + double.sum(axis=1))


def _summary(log_posterior: Array) -> ErrorRate:
    density = np.exp(log_posterior - log_posterior.max())
    below = density.cumsum() / density.sum()
    low, high = (float(_RATES[int(below.searchsorted(share))]) for share in (0.025, 0.975))
    return ErrorRate(rate=float(_RATES[int(log_posterior.argmax())]), low=low, high=high)


def figures(labels: Sequence[Label], predicted: Mapping[int, float]) -> list[AnnotatorFigures]:
    """The figures of all annotators, by name.

    predicted: P(a is better) by comparison id, out of bag. Labels of other pairs and rankings are counted, but say
    nothing about the error rate. "Can't tell" is not an error.
    """
    people = {name: _Person.of(own) for name, own in _by(labels, "annotator").items()}
    rates = fit_error_rates(
        [pair for person in people.values() for pair in person.judged_pairs(predicted)],
        gold=[pair for person in people.values() for pair in person.gold_pairs()],
    )
    agreement = _agreement(labels)
    prior = fit_error_rates([], gold=[JudgedPair(annotator="", predicted=0.5, mu=0.5)])[""]
    found = []
    for name, person in sorted(people.items()):
        rate = rates.get(name, prior)
        found.append(
            AnnotatorFigures(
                name=name,
                labels=len(person.labels),
                error_rate=rate.rate,
                error_rate_interval=(rate.low, rate.high),
                gold_right=sum(label.choice == label.comparison.expected for label in person.gold),
                gold_asked=len(person.gold),
                repeats_same=sum(first == second for first, second in person.repeats.values()),
                repeats_asked=len(person.repeats),
                agreement=agreement.get(name),
            )
        )
    return found


@dataclass(frozen=True, slots=True)
class _Person:
    """One annotator's labels by kind of question."""

    labels: list[Label]
    gold: list[Label]
    ordinary: dict[int, float]  # comparison id -> mu
    repeats: dict[int, tuple[float, float]]  # id of the repeated comparison -> μ of both labels

    @classmethod
    def of(cls, labels: list[Label]) -> "_Person":
        decided = [label for label in labels if label.choice not in (None, "cant_tell")]
        gold = [label for label in decided if label.comparison.expected is not None]
        asked = {label.comparison_id: label for label in decided}
        repeats = {}
        for label in decided:
            original = asked.get(label.comparison.repeat_of or -1)
            if original is not None:
                swapped = label.comparison.responses != original.comparison.responses
                second = 1 - _mu(label) if swapped else _mu(label)
                repeats[original.comparison_id] = (_mu(original), second)
        ordinary = {
            label.comparison_id: _mu(label)
            for label in decided
            if label.comparison.expected is None and label.comparison.repeat_of is None
        }
        return cls(labels, gold, ordinary, repeats)

    def judged_pairs(self, predicted: Mapping[int, float]) -> Iterable[JudgedPair]:
        """Pairs with a prediction, and repeated ones, whose prediction is ½ where there is none."""
        name = self.labels[0].annotator
        for comparison, mu in self.ordinary.items():
            again = self.repeats[comparison][1] if comparison in self.repeats else None
            if comparison in predicted or again is not None:
                yield JudgedPair(annotator=name, predicted=predicted.get(comparison, 0.5), mu=mu, again=again)

    def gold_pairs(self) -> Iterable[JudgedPair]:
        for label in self.gold:
            if label.comparison.expected in ("a", "b"):
                expected = GOLD if label.comparison.expected == "a" else 1 - GOLD
                yield JudgedPair(annotator=label.annotator, predicted=expected, mu=_mu(label))


def alpha(labels: Iterable[Label]) -> float | None:
    """Krippendorff's α of the choices a, b and tie (nominal), over the pairs that several people labelled.

    1 is perfect agreement, 0 is chance. None if no pair has two labels, or all labels are equal, because then chance is
    not defined. "Can't tell" is a missing value; repeats are not counted.
    """
    shared = {
        comparison: own
        for comparison, own in _by(_choices(labels), "comparison_id").items()
        if len({label.annotator for label in own}) > 1
    }
    counts = np.zeros((len(shared), len(_CHOICES)))
    for row, own in enumerate(shared.values()):
        for label in own:
            counts[row, _CHOICES.index(str(label.choice))] += 1
    if np.count_nonzero(counts.sum(axis=0)) < 2:
        return None
    return float(krippendorff.alpha(value_counts=counts, value_domain=_CHOICES, level_of_measurement="nominal"))


def _agreement(labels: Iterable[Label]) -> dict[str, float]:
    """For each annotator, the share of other people's labels of the same pairs that equal their own."""
    same: dict[str, list[bool]] = defaultdict(list)
    for own in _by(_choices(labels), "comparison_id").values():
        for label in own:
            same[label.annotator] += [label.choice == other.choice for other in own if other is not label]
    return {name: sum(equal) / len(equal) for name, equal in same.items() if equal}


def _choices(labels: Iterable[Label]) -> list[Label]:
    return [label for label in labels if label.choice in _CHOICES and label.comparison.repeat_of is None]


def _by(records: Iterable[T], field: str) -> dict[Any, list[T]]:
    groups: dict[Any, list[T]] = defaultdict(list)
    for record in records:
        groups[getattr(record, field)].append(record)
    return groups


def _mu(label: Label) -> float:
    mu = MU[label.choice] if label.choice else None
    assert mu is not None  # the label is decided
    return mu
