"""Simulated annotators: how often they say what, against binomial bounds with fixed seeds."""

import math

import pytest

from deep_rlhf.errors import UserError
from deep_rlhf.feedback.annotators.simulated import (
    CANT_TELL,
    IDENTICAL,
    AnnotatorHabits,
    SimulatedAnnotator,
    SimulatedAnnotators,
)
from deep_rlhf.types import Preference, RowReport

N = 4000
HONEST = AnnotatorHabits(temperature=1.0, error_rate=0, tie_probability=0, cant_tell_rate=0)


def utility(prompt: str, response: str) -> float:
    return float(response)


def labels(habits: AnnotatorHabits, a: str, b: str, seed: int = 0) -> list[float | None]:
    annotator = SimulatedAnnotator("ann", utility, seed=seed, habits=habits)
    return [p.mu if (p := annotator.compare("q", a, b)) else None for _ in range(N)]


def assert_share(count: int, probability: float) -> None:
    """The count lies within four standard deviations of a binomial of N draws."""
    assert abs(count - N * probability) <= 4 * math.sqrt(N * probability * (1 - probability))


@pytest.mark.parametrize(("a", "b"), [("1", "0"), ("0", "2"), ("0.5", "0.5")])
def test_the_better_response_wins_as_often_as_boltzmann_says(a: str, b: str) -> None:
    assert_share(labels(HONEST, a, b).count(1.0), 1 / (1 + math.exp(float(b) - float(a))))


def test_temperature_scales_the_difference() -> None:
    habits = AnnotatorHabits(temperature=0.5, error_rate=0, tie_probability=0, cant_tell_rate=0)
    assert_share(labels(habits, "1", "0").count(1.0), 1 / (1 + math.exp(-2)))


def test_one_label_in_ten_is_random_so_one_in_twenty_is_wrong() -> None:
    habits = AnnotatorHabits(temperature=0.01, error_rate=0.1, tie_probability=0, cant_tell_rate=0)
    assert_share(labels(habits, "1", "0").count(0.0), 0.05)
    assert_share(labels(habits, "0", "1").count(1.0), 0.05)


def test_a_huge_difference_does_not_overflow() -> None:
    assert set(labels(HONEST, "1e6", "-1e6")) == {1.0}
    assert set(labels(HONEST, "-1e6", "1e6")) == {0.0}


def test_near_equal_responses_are_ties_with_some_probability_and_others_never() -> None:
    habits = AnnotatorHabits(error_rate=0, tie_threshold=0.02, tie_probability=0.3, cant_tell_rate=0)
    assert_share(labels(habits, "0.51", "0.5").count(0.5), 0.3)
    assert labels(habits, "0.53", "0.5").count(0.5) == 0
    assert labels(habits, "0.5", "0.53").count(0.5) == 0


def test_cant_tell_gives_no_preference_at_its_rate() -> None:
    habits = AnnotatorHabits(cant_tell_rate=0.1)
    assert_share(labels(habits, "1", "0").count(None), 0.1)


def test_the_default_habits_are_the_documented_ones() -> None:
    found = labels(AnnotatorHabits(), "1", "0")
    assert_share(found.count(None), 0.02)
    assert_share(found.count(0.0), 0.98 * 0.05)
    assert found.count(0.5) == 0


def test_a_label_carries_the_pair_and_who_gave_it() -> None:
    annotator = SimulatedAnnotator("Ada", utility, seed=1, habits=HONEST)
    preference = annotator.compare("q", "100", "0")
    assert isinstance(preference, Preference)
    assert (preference.prompt, preference.a, preference.b, preference.mu) == ("q", "100", "0", 1.0)
    assert (preference.annotator, preference.source) == ("Ada", "simulated")
    again = annotator.compare("q", "100", "0")
    other = annotator.compare("q", "0", "100")
    assert again is not None
    assert other is not None
    assert preference.id == again.id != other.id


def pairs(count: int) -> list[tuple[str, str, str]]:
    return [(f"q{k}", str(k % 5 / 5), str(k % 3 / 3 + 0.01)) for k in range(count)]


def test_the_same_seed_gives_the_same_labels_and_another_seed_others() -> None:
    first, second, other = (SimulatedAnnotators(utility, seed=s).label_pairs(pairs(300)) for s in (1, 1, 2))
    assert first == second
    assert [p.mu for p in first[0]] != [p.mu for p in other[0]]


def test_annotators_take_turns_and_differ() -> None:
    team = SimulatedAnnotators(utility, count=3, seed=0, habits=HONEST)
    found, _ = team.label_pairs([("q", "0.5", "0.4")] * 300)
    assert [p.annotator for p in found[:4]] == ["simulated-1", "simulated-2", "simulated-3", "simulated-1"]
    by_annotator = [[p.mu for p in found[k::3]] for k in range(3)]
    assert by_annotator[0] != by_annotator[1] != by_annotator[2]


def test_every_dropped_pair_is_counted_with_its_reason() -> None:
    team = SimulatedAnnotators(utility, habits=AnnotatorHabits(cant_tell_rate=1.0))
    found, report = team.label_pairs([("q", "1", "0"), ("q", "1", " 1 "), ("q", "0", "1")])
    assert found == []
    assert report == RowReport(read=3, kept=0, dropped={IDENTICAL: 1, CANT_TELL: 2})
    found, report = SimulatedAnnotators(utility, habits=HONEST).label_pairs([("q", "1", "0"), ("q", "1", "1")])
    assert len(found) == report.kept == 1
    assert report == RowReport(read=2, kept=1, dropped={IDENTICAL: 1, CANT_TELL: 0})


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": 0}, {"error_rate": 1.1}, {"tie_probability": -0.1}, {"cant_tell_rate": 2}],
)
def test_impossible_habits_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        AnnotatorHabits(**wrong)


def test_a_team_needs_an_annotator() -> None:
    with pytest.raises(UserError, match="at least 1"):
        SimulatedAnnotators(utility, count=0)
