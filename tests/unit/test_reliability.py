"""Error rates by hand, from labels of annotators whose rate is known; α and the figures of small tables."""

import math
import random
from datetime import datetime

import pytest

from deep_rlhf.feedback.annotators.reliability import JudgedPair, alpha, figures, fit_error_rates
from deep_rlhf.feedback.records import Comparison, Label


def judged_pairs(name: str, count: int, error_rate: float, seed: int = 0, sharpness: float = 1.0) -> list[JudgedPair]:
    """Of an annotator who errs at this rate; the predictions are too sure of themselves by the factor `sharpness`."""
    rng = random.Random(f"{name}/{seed}")
    found = []
    for _ in range(count):
        log_odds = rng.gauss(0, 2)
        p = 1 / (1 + math.exp(-log_odds))
        mu = float(rng.random() < 0.5) if rng.random() < error_rate else float(rng.random() < p)
        found.append(JudgedPair(annotator=name, predicted=1 / (1 + math.exp(-sharpness * log_odds)), mu=mu))
    return found


def test_without_informative_labels_the_error_rate_is_the_prior() -> None:
    undecided = fit_error_rates([JudgedPair(annotator="ann", predicted=0.5, mu=mu) for mu in (1.0, 0.0, 0.5)])["ann"]
    assert undecided.rate == pytest.approx(0.1, abs=1e-3)  # Beta(1.5, 5.5): mode 0.5 / 5
    # quantiles of 2.5 and 97.5 %, by integrating sin² t cos¹⁰ t, with e = sin² t
    assert (undecided.low, undecided.high) == pytest.approx((0.0186, 0.5581), abs=1e-3)
    assert fit_error_rates([]) == {}


def test_the_most_probable_rate_by_hand() -> None:
    # One right label, one wrong, flat prior: p' = 0.98 − 0.48 e and 0.02 + 0.48 e, whose product is largest at e = 1
    sure = [JudgedPair(annotator="ann", predicted=0.98, mu=mu) for mu in (1.0, 0.0)]
    assert fit_error_rates([], gold=sure, prior=(1.0, 1.0))["ann"].rate == pytest.approx(1.0, abs=1e-3)
    # nine right, one wrong: 9/(0.98 − 0.48 e) = 1/(0.02 + 0.48 e), so 0.18 + 4.32 e = 0.98 − 0.48 e
    ten = [JudgedPair(annotator="ann", predicted=0.98, mu=float(i > 0)) for i in range(10)]
    assert fit_error_rates([], gold=ten, prior=(1.0, 1.0))["ann"].rate == pytest.approx(0.8 / 4.8, abs=1e-3)


def test_a_tie_is_half_a_label_each_way() -> None:
    tie = fit_error_rates([], gold=[JudgedPair(annotator="x", predicted=0.9, mu=0.5)] * 2, prior=(1.5, 3.0))
    both = fit_error_rates(
        [], gold=[JudgedPair(annotator="x", predicted=0.9, mu=mu) for mu in (0, 1)], prior=(1.5, 3.0)
    )
    assert tie == both


@pytest.mark.parametrize("error_rate", [0.0, 0.1, 0.5, 0.8])
def test_the_interval_holds_the_true_rate(error_rate: float) -> None:
    found = fit_error_rates(judged_pairs("careful", 400, 0.1) + judged_pairs("ann", 400, error_rate))["ann"]
    assert found.low <= max(error_rate, 0.02)
    assert found.high >= error_rate
    assert found.rate == pytest.approx(error_rate, abs=0.15)
    assert found.low < found.rate < found.high


def test_more_labels_narrow_the_interval() -> None:
    few, many = (fit_error_rates(judged_pairs("ann", count, 0.3))["ann"] for count in (40, 1000))
    assert many.high - many.low < 0.5 * (few.high - few.low)


def test_an_annotator_who_always_says_the_opposite_counts_as_random() -> None:
    opposite = [JudgedPair(annotator="ann", predicted=0.95, mu=0.0)] * 50
    assert fit_error_rates([], gold=opposite)["ann"].rate > 0.8


def test_an_overconfident_model_does_not_raise_the_error_rates() -> None:
    crowd = [pair for i in range(4) for pair in judged_pairs(f"ann-{i}", 300, 0.1, sharpness=4.0)]
    found = fit_error_rates(crowd + judged_pairs("careless", 300, 0.6, sharpness=4.0))
    assert all(found[f"ann-{i}"].rate < 0.25 for i in range(4))
    assert found["careless"].rate > 0.4


def test_repeats_tell_where_the_model_is_unsure() -> None:
    def rate(again: float) -> float:
        return fit_error_rates([JudgedPair(annotator="ann", predicted=0.5, mu=1.0, again=again)] * 20)["ann"].rate

    assert rate(1.0) < 0.1 < rate(0.0)
    once = fit_error_rates([JudgedPair(annotator="ann", predicted=0.5, mu=1.0)] * 20)["ann"].rate
    assert once == pytest.approx(0.1, abs=1e-3)


def test_the_likelihood_of_repeats_by_hand() -> None:
    # p = ½: aa has ¼ (1 − e)² · 3/2 + (1 − e) e / 2 + e²/4 = (3 − 2 e + e²) / 8, ab (1 + 2 e − e²) / 8.
    # Three times aa, once ab, flat prior: 3/(3 − x) = 1/(1 + x) with x = 2 e − e², so x = 0 and e = 0; as often: e = 1.
    def rate(same: int, differing: int) -> float:
        rows = [1.0] * same + [0.0] * differing
        repeats = [JudgedPair(annotator="ann", predicted=0.5, mu=1.0, again=again) for again in rows]
        return fit_error_rates(repeats, prior=(1.0, 1.0))["ann"].rate

    assert rate(3, 1) == pytest.approx(0.0, abs=1e-3)
    assert rate(3, 3) == pytest.approx(1.0, abs=1e-3)
    # 5 to 3: 5/(3 − x) = 3/(1 + x), x = ½, e = 1 − √½
    assert rate(5, 3) == pytest.approx(1 - math.sqrt(0.5), abs=1e-3)


# ---- labels

EVENTS = iter(range(1, 10_000))


def label(
    comparison: int, annotator: str, choice: str | None, *, responses: tuple[str, ...] = ("x", "y"), **fields
) -> Label:
    event = next(EVENTS)
    ranks = tuple(range(1, len(responses) + 1)) if choice is None else None
    return Label(
        event_id=event,
        comparison_id=comparison,
        comparison=Comparison(prompt="p", responses=responses, **fields),
        annotator=annotator,
        choice=choice,
        ranks=ranks,
        strength=None,
        shown_order=(0, 1),
        seconds=1.0,
        created=datetime(2026, 1, 1),
    )


def table(**rows: str) -> list[Label]:
    """One row for each annotator, one letter for each comparison: a, b, t(ie), c(an't tell), - (not asked)."""
    words = {"a": "a", "b": "b", "t": "tie", "c": "cant_tell"}
    return [
        label(number, name, words[letter])
        for name, row in rows.items()
        for number, letter in enumerate(row, 1)
        if letter != "-"
    ]


def test_alpha_by_hand() -> None:
    # Krippendorff 2011, "Computing Krippendorff's alpha-reliability", C: two observers, ten units, binary:
    # α = 1 − (N − 1) o_ab / (n_a n_b) with N = 20, n_a = 14, n_b = 6, o_ab = 4: 1 − 19 · 4 / 84
    one, two = "abaaaaaaaa", "bbbaabaaba"
    letters = one + two
    disagreeing = sum(x != y for x, y in zip(one, two, strict=True))
    expected = 1 - (20 - 1) * disagreeing / (letters.count("a") * letters.count("b"))
    assert alpha(table(one=one, two=two)) == pytest.approx(expected)
    assert expected == pytest.approx(0.095, abs=1e-3)


def test_alpha_of_agreement_and_of_nothing() -> None:
    assert alpha(table(one="abt", two="abt")) == pytest.approx(1.0)
    assert alpha(table(one="aaa", two="aaa")) is None  # chance is not defined
    assert alpha(table(one="ab--", two="--ab")) is None  # nobody shares a question
    assert alpha([]) is None


def test_alpha_leaves_out_cant_tell_and_questions_of_one_person() -> None:
    plain = alpha(table(one="abab", two="abba"))
    assert alpha(table(one="ababca", two="abbaa-")) == pytest.approx(plain)


def test_figures_by_hand() -> None:
    labels = [
        label(1, "ann", "a"),
        label(2, "ann", "b"),
        label(3, "ann", "cant_tell"),
        label(4, "ann", "a", why_selected="gold", expected="a"),
        label(5, "ann", "a", why_selected="gold", expected="b"),
        label(6, "ann", "tie", why_selected="gold", expected="tie"),
        label(7, "ann", "a", why_selected="repeat", repeat_of=1),
        label(8, "ann", "b", responses=("y", "x"), why_selected="repeat", repeat_of=2),  # swapped: ann now prefers x
        label(9, "ann", None, responses=("x", "y", "z")),
        label(1, "bob", "a"),
        label(2, "bob", "tie"),
    ]
    ann, bob = figures(labels, {})
    assert (ann.name, ann.labels, bob.name, bob.labels) == ("ann", 9, "bob", 2)
    assert (ann.gold_right, ann.gold_asked) == (2, 3)
    assert (ann.repeats_same, ann.repeats_asked) == (1, 2)
    assert (ann.agreement, bob.agreement) == (0.5, 0.5)
    assert bob.error_rate == pytest.approx(0.1, abs=1e-3)
    assert bob.error_rate_interval == pytest.approx((0.0186, 0.5581), abs=1e-3)
    assert (bob.gold_asked, bob.repeats_asked) == (0, 0)
    assert figures([], {}) == []


def test_gold_repeats_and_predictions_each_count() -> None:
    def rate(labels: list[Label], predicted: dict[int, float]) -> float:
        return figures(labels, predicted)[0].error_rate

    plain = [label(number, "ann", "a") for number in range(1, 21)]
    assert rate(plain, {}) == pytest.approx(0.1, abs=1e-3)
    assert rate(plain, dict.fromkeys(range(1, 21), 0.95)) < 0.08
    golden = [label(number, "ann", "a", why_selected="gold", expected="b") for number in range(1, 6)]
    assert rate(golden, {}) > 0.3
    changed = [label(20 + number, "ann", "b", why_selected="repeat", repeat_of=number) for number in range(1, 21)]
    assert rate(plain + changed, {}) > 0.2


def test_the_agreement_of_a_single_annotator_is_unknown() -> None:
    (ann,) = figures([label(1, "ann", "a")], {1: 0.7})
    assert ann.agreement is None
