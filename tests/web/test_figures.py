"""Charts, the tables of the model tab, and the ranks in a form."""

import math
from datetime import UTC, datetime
from xml.etree import ElementTree

import pytest
from facts import assert_names
from starlette.datastructures import FormData

from deep_rlhf.feedback.records import Comparison, Label, Version
from deep_rlhf.feedback.state import ArmFigures, SelectionFigures
from deep_rlhf.feedback.store import Store
from deep_rlhf.web.labelling.routes import ranks_of
from deep_rlhf.web.problem import Problem
from deep_rlhf.web.progress.charts import Line, chart, interval, nice_range, thinned, tick_step
from deep_rlhf.web.progress.view import (
    Metrics,
    compare_versions,
    first_use,
    label_summary,
    label_uses,
    selection_summary,
    training_charts,
)
from deep_rlhf.web.rendering.templates import clock, number, percent


def label(event: int, **fields: object) -> Label:
    values: dict[str, object] = {
        "comparison_id": event,
        "comparison": Comparison(prompt="p", responses=("first", "second")),
        "annotator": "anna",
        "choice": "a",
        "ranks": None,
        "strength": None,
        "shown_order": (0, 1),
        "seconds": 1.0,
        "created": datetime.now(UTC),
    }
    return Label(event_id=event, **(values | fields))  # type: ignore[arg-type]


def version(kind: str, number: int, step: int, labels: int = 0, last_event: int = 0) -> Version:
    return Version(kind=kind, number=number, step=step, labels=labels, last_event=last_event)  # type: ignore[arg-type]


def test_a_chart_draws_every_point_where_it_belongs_and_lists_it() -> None:
    drawn = chart("c", "<Title>", "x", "y", [Line("one", [(0, 0), (5, 10), (10, 5)])], marks=[5, 99])
    assert drawn is not None
    root = ElementTree.fromstring(str(drawn.svg))
    assert root[0].text == "<Title>"
    (line,) = root.iter("polyline")
    places = [tuple(map(float, pair.split(","))) for pair in line.get("points", "").split()]
    assert [x for x, _ in places] == pytest.approx([52, 220, 388])
    assert [y for _, y in places] == pytest.approx([208, 10, 109])
    assert len([one for one in root.iter("line") if one.get("class") == "mark"]) == 1
    assert drawn.rows == [("0", "0"), ("5", "10"), ("10", "5")]
    assert_names(drawn.description, "one", "0 to 5", "0 to 10")


def test_a_chart_leaves_out_values_that_are_not_finite_and_needs_a_finite_one() -> None:
    assert chart("c", "t", "x", "y", [Line("one", [(0, math.nan), (math.inf, 1)]), Line("two", [])]) is None
    drawn = chart("c", "t", "x", "y", [Line("one", [(0, math.nan), (1, 3)]), Line("two", [(2, 3)])])
    assert drawn is not None
    assert drawn.rows == [("1", "3", "–"), ("2", "–", "3")]


def test_many_points_are_thinned_and_their_ends_kept() -> None:
    points = [(float(i), float(-i)) for i in range(100_000)]
    assert len(thinned(points)) == 300
    assert (thinned(points)[0], thinned(points)[-1]) == (points[0], points[-1])
    drawn = chart("c", "t", "x", "y", [Line("one", points)])
    assert drawn is not None
    assert len(drawn.rows) == 20
    assert len(drawn.svg) < 20_000


@pytest.mark.parametrize(
    ("low", "high", "step"), [(0, 10, 2), (0, 1, 0.2), (-3, 47, 10), (0, 1e-6, 2e-7), (5, 5, 1e-6), (0, 0, 2e-10)]
)
def test_ticks_are_round_numbers(low: float, high: float, step: float) -> None:
    assert tick_step(low, high) == pytest.approx(step, rel=1e-6)
    bottom, top = nice_range(low, high)
    assert bottom <= low
    assert top >= high
    assert bottom < top


def test_an_interval_is_drawn_to_scale_and_never_outside() -> None:
    root = ElementTree.fromstring(str(interval(0.5, -1, 2)))
    (range_,) = [one for one in root.iter("line") if one.get("class") == "range"]
    assert (range_.get("x1"), range_.get("x2")) == ("8.0", "292.0")
    assert next(iter(root.iter("circle"))).get("cx") == "150.0"


def test_metrics_are_read_once_and_an_update_done_again_replaces_the_old_one(store: Store) -> None:
    metrics = Metrics(store)
    store.add_metrics([{"step": i, "reward": float(i), "sqrt_kl": 0.1 * i, "note": "x"} for i in (1, 2, 3)])
    metrics.refresh()
    store.add_metrics([{"step": 2, "reward": -2.0}, {"step": 3, "reward": math.nan}, {"reward": 5.0}])
    metrics.refresh()
    assert metrics.column("step", "reward") == [(1, 1), (2, -2)]
    assert metrics.column("sqrt_kl", "reward") == [(0.1, 1)]
    assert [one.id for one in training_charts(metrics, [version("policy", 1, 2)])] == ["reward", "kl", "frontier"]


def test_each_label_is_traced_to_the_update_that_used_it_first() -> None:
    rewards = [version("reward", 1, 0, 8, 10), version("reward", 2, 12, 20, 25)]
    policies = [version("policy", 0, 0), version("policy", 1, 12), version("policy", 2, 20)]
    uses = label_uses(rewards, policies)
    assert [(use.reward.number, use.new_labels, use.events, use.policy) for use in uses] == [
        (2, 12, (10, 25), 2),
        (1, 8, (0, 10), 1),
    ]
    used = [first_use(label(event), uses) for event in (1, 10, 11, 25, 26)]
    assert [use and use.reward.number for use in used] == [1, 1, 2, 2, None]
    assert label_uses([version("reward", 1, 30)], policies)[0].policy is None


def test_labels_are_summarised_by_the_preferred_response() -> None:
    assert label_summary(label(1)) == "first"
    assert label_summary(label(1, choice="b")) == "second"
    assert label_summary(label(1, choice="tie")) == "(tie)"
    assert label_summary(label(1, choice="cant_tell")) == "(can't tell)"
    assert label_summary(label(1, choice=None, ranks=(1, 2))) == "(a ranking)"


def test_selected_and_random_questions_are_compared_only_with_enough_labels() -> None:
    def summary(chosen: int, chosen_bits: float | None, random: int, random_bits: float | None) -> str:
        return selection_summary(
            SelectionFigures(
                chosen=ArmFigures(labels=chosen, informative=chosen_bits),
                random=ArmFigures(labels=random, informative=random_bits),
            )
        )

    assert selection_summary(None).startswith("Too few")
    assert summary(50, 0.3, 9, 0.1).startswith("Too few")
    assert summary(50, None, 50, 0.1).startswith("Too few")
    assert summary(50, 0.3, 50, 0.1).endswith("more informative than random ones.")
    assert summary(50, 0.0, 50, 0.1).endswith("less informative than random ones.")
    assert summary(50, 0.1, 50, 0.1).endswith("as informative as random ones.")


def test_versions_are_compared_by_prompt(store: Store) -> None:
    assert compare_versions(store, None, None)["known"] == []
    for i in range(3):
        store.add_version(version("policy", i, 10 * i))
        store.add_samples(i, [("p", f"p{i}"), ("q", f"q{i}")] if i else [("p", "p0")])
    newest = compare_versions(store, None, None)
    assert (newest["left"], newest["right"], newest["follows"]) == (0, 2, True)
    assert newest["rows"] == [("p", "p0", "p2"), ("q", None, "q2")]
    assert newest["known"] == [(0, 0), (1, 10), (2, 20)]
    chosen = compare_versions(store, 2, 1)
    assert (chosen["left"], chosen["right"], chosen["follows"]) == (2, 1, False)
    assert compare_versions(store, 99, 99)["right"] == 2


@pytest.mark.parametrize(
    ("form", "ranks"),
    [
        ({"rank_0": "1", "rank_1": "2", "rank_2": "3"}, [1, 2, 3]),
        ({"rank_2": "5", "rank_0": "2", "rank_1": "5"}, [1, 2, 2]),
        ({f"rank_{i}": str(9 - i) for i in range(9)}, [9, 8, 7, 6, 5, 4, 3, 2, 1]),
    ],
)
def test_ranks_are_read_by_response_and_made_dense(form: dict[str, str], ranks: list[int]) -> None:
    assert ranks_of(FormData(form)) == ranks


@pytest.mark.parametrize(
    "form", [{}, {"rank_0": "1", "rank_2": "2"}, {"rank_0": "0"}, {"rank_0": "12"}, {"rank_0": "²"}, {"rank_0": ""}]
)
def test_invalid_ranks_are_refused(form: dict[str, str]) -> None:
    with pytest.raises(Problem):
        ranks_of(FormData(form))


def test_numbers_and_times_are_written_for_people() -> None:
    assert (percent(0.123), percent(None), percent(math.nan)) == ("12%", "–", "–")
    assert (number(1.239), number(None)) == ("1.24", "–")
    assert clock("2026-03-04T05:06:07+02:00") == "04 Mar 2026, 03:06 UTC"
    assert clock(None) == clock("never") == "–"
