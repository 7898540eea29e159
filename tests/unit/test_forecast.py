"""The forecast of accuracy, active against random selection, and the win rate of the policy."""

import dataclasses
from datetime import UTC, datetime
from typing import Any

import pytest

from deep_rlhf.feedback.monitoring.forecast import compare_selection, forecast_accuracy
from deep_rlhf.feedback.monitoring.win_rate import blind_pairs, recent_versions, win_rate
from deep_rlhf.feedback.records import Comparison, Label, Version
from deep_rlhf.feedback.state import ArmFigures


def label(number: int, choice: str | None, **comparison: Any) -> Label:
    return Label(
        event_id=number,
        comparison_id=number,
        comparison=Comparison(prompt="p", responses=("x", "y"), **comparison),
        annotator="ann",
        choice=choice,  # type: ignore[arg-type]
        ranks=None,
        strength=None,
        shown_order=(0, 1),
        seconds=1.0,
        created=datetime.now(UTC),
    )


def test_the_forecast_continues_the_past_gain_per_label() -> None:
    steep = forecast_accuracy([(50, 0.6, 500), (100, 0.7, 1000), (200, 0.8, 2000)], 200)
    assert steep.accuracy_now == pytest.approx(0.8, abs=0.02)
    assert steep.accuracy_then == pytest.approx(0.8 + 0.1 * 0.585, abs=0.02)  # log₂(300 / 200) = 0.585
    assert "80%" in steep.text or "79%" in steep.text
    flat = forecast_accuracy([(50, 0.7, 5000), (100, 0.7, 5000), (200, 0.7, 5000)], 200)
    assert flat.accuracy_then - flat.accuracy_now < 0.005
    falling = forecast_accuracy([(50, 0.8, 500), (400, 0.6, 500)], 400)
    assert falling.accuracy_then >= falling.accuracy_now  # more labels never promise harm


def test_a_few_labels_hardly_move_the_expected_slope() -> None:
    told = forecast_accuracy([(20, 0.4, 5), (40, 0.9, 5)], 40)
    slope = (told.accuracy_then - told.accuracy_now) / 1.807  # log₂(140 / 40)
    assert 0.025 < slope < 0.05


def test_without_predictions_there_is_no_forecast_accuracy() -> None:
    assert forecast_accuracy([], 20).accuracy_now is None
    assert forecast_accuracy([(0, 0.5, 0)], 20).accuracy_then is None


def test_choosing_is_compared_with_the_random_arm() -> None:
    labels = [
        label(1, "a", why_selected="variance", predicted=0.5),
        label(2, "a", why_selected="variance", predicted=0.8),
        label(3, "b", why_selected="random", predicted=0.8),
        label(4, "b", why_selected="random", predicted=0.25),
        label(5, "tie", why_selected="random", predicted=0.5),
        label(6, "a", why_selected="win_rate", writers=(0, 1), predicted=0.5),
        label(7, "a", why_selected="initial"),
    ]
    told = compare_selection(labels, {1: 1.0, 3: 0.2, 4: 0.25})
    assert told.chosen == ArmFigures(labels=2, accuracy=0.75, informative=pytest.approx(0.9855, abs=1e-3))
    assert told.random == ArmFigures(labels=2, accuracy=0.5, informative=pytest.approx(1.0))  # 2 bits and none
    assert compare_selection([], {}).chosen == ArmFigures(labels=0, accuracy=None, informative=None)


def test_the_win_rate_is_of_the_newer_policy_whatever_its_side() -> None:
    labels = [
        label(1, "a", why_selected="win_rate", writers=(3, 0)),
        label(2, "a", why_selected="win_rate", writers=(0, 3)),
        label(3, "b", why_selected="win_rate", writers=(0, 4)),
        label(4, "tie", why_selected="win_rate", writers=(0, 4)),
        label(5, "cant_tell", why_selected="win_rate", writers=(0, 4)),
        label(6, "a", why_selected="random"),
    ]
    told = win_rate(labels)
    assert told is not None
    assert (told.rate, told.labels) == (0.625, 4)
    assert 0 < told.low < 0.625 < told.high < 1
    assert win_rate(labels[-1:]) is None


def test_labels_of_another_run_are_ignored() -> None:
    """Its version 3 is another policy, and its predictions are of another reward model."""
    own = [
        label(1, "a", why_selected="win_rate", writers=(3, 0)),
        label(2, "a", why_selected="variance", predicted=0.8),
    ]
    foreign = [dataclasses.replace(one, imported=True, choice="b") for one in own]
    assert win_rate(own + foreign) == win_rate(own)
    assert compare_selection(own + foreign, {}) == compare_selection(own, {})


def test_blind_pairs_of_old_and_discarded_policies_do_not_count_for_the_current_one() -> None:
    def version(number: int, **figures: float) -> Version:
        return Version(kind="policy", number=number, step=number, labels=0, last_event=0, figures=figures)

    policies = [*(version(number) for number in range(20)), version(20, back_at=16.0), version(21)]
    recent = recent_versions(policies)
    assert recent == {21, 20, *range(9, 17)}
    assert recent_versions([]) == set()
    old = [label(i, "b", why_selected="win_rate", writers=(8, 0)) for i in range(55)]
    gone = [label(60 + i, "b", why_selected="win_rate", writers=(0, 18)) for i in range(5)]
    new = [label(70 + i, "a", why_selected="win_rate", writers=(9 + 12 * (i % 2), 0)) for i in range(5)]
    found = win_rate(blind_pairs(old + gone + new, recent))
    assert found is not None
    assert (found.rate, found.labels, found.first, found.last) == (1.0, 5, 9, 21)
    many = [label(i, "a", why_selected="win_rate", writers=(9, 0)) for i in range(100)]
    assert [one.event_id for one in blind_pairs(many, recent)] == list(range(40, 100))
