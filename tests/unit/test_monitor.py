"""What an update is told about, and what raises an alarm."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from deep_rlhf.feedback.monitoring.alarms import Limits
from deep_rlhf.feedback.monitoring.monitor import Monitor
from deep_rlhf.feedback.records import Comparison, Label
from deep_rlhf.types import Preference

METRICS = {
    **{"step": 1.0, "score_mean": 0.0, "kl": 4.0, "entropy": 2.0, "response_tokens": 10.0, "score_member_std": 0.3},
}
ROLLOUT: Any = SimpleNamespace(prompts=["p", "p"], responses=["one two three four", "five six seven eight"])


class Fixed:
    """Rewards texts by a number that they begin with; two members that agree."""

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        return torch.tensor([[float(text.split()[0])] * 2 for text in responses])


def test_the_row_has_what_the_page_shows() -> None:
    monitor = Monitor(Limits(), judge=lambda prompts, responses: 0.25)
    row, raised = monitor.update(METRICS, ROLLOUT, None)
    assert raised == []
    assert row == {
        **{"reward": 0.0, "kl": 4.0, "sqrt_kl": 2.0, "entropy": 2.0, "length": 10.0, "ensemble_std": 0.3},
        **{"repetition": 0.0, "gold": 0.25},
    }
    assert monitor.update(METRICS | {"kl": -0.01}, ROLLOUT, None)[0]["sqrt_kl"] == 0


@pytest.mark.parametrize(
    ("name", "metrics", "responses"),
    [
        ("kl", {"kl": 31.0}, None),
        ("length_ratio", {"response_tokens": 21.0}, None),
        ("length_ratio", {"response_tokens": 4.0}, None),
        ("entropy_ratio", {"entropy": 0.3}, None),
        ("ensemble_std", {"score_member_std": 1.1}, None),
        ("repetition", {}, ["so so so so so so"] * 2),
    ],
)
def test_each_figure_raises_its_alarm_once(name: str, metrics: dict[str, float], responses: list[str] | None) -> None:
    monitor = Monitor(Limits())
    assert monitor.update(METRICS, ROLLOUT, None)[1] == []
    rollout = SimpleNamespace(prompts=["p", "p"], responses=responses or ROLLOUT.responses)
    for again in (False, True):
        raised = monitor.update(METRICS | metrics | {"step": 2.0}, rollout, None)[1]  # type: ignore[arg-type]
        assert [alarm.name for alarm in raised] == ([] if again else [name])


def test_a_held_out_reward_that_falls_while_the_reward_rises_raises_an_alarm() -> None:
    monitor, names = Monitor(Limits()), list[str]()
    for step in range(20):
        rollout: Any = SimpleNamespace(prompts=["p"], responses=[f"{-0.2 * step} is the held-out reward"])
        row, raised = monitor.update(METRICS | {"score_mean": 0.2 * step}, rollout, Fixed())
        names += [alarm.name for alarm in raised]
        assert row["held_out_reward"] == pytest.approx(-0.2 * step)
    assert names == ["held_out_gap"]


class Shifted(Fixed):
    """The same, from another level: what another fit may be."""

    def __init__(self, by: float) -> None:
        self.by = by

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        return super().score(prompts, responses) + self.by


class Mirrored(Shifted):
    """Likes what Fixed does not."""

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        return self.by - Fixed.score(self, prompts, responses)


@pytest.mark.parametrize("resumed", [False, True])
def test_a_new_reward_model_does_not_hide_a_growing_gap_to_the_held_out_reward(resumed: bool) -> None:
    """Each update a little: the limit of 0.5 is passed when a rise and a fall of 0.02 went on for 12 more updates."""
    monitor, first = Monitor(Limits()), list[int]()
    level = 0.0
    for step in range(30):
        if step % 5 == 4:
            level = 3.0 * step
            monitor.replace_rewards(Shifted(level), Mirrored(-level))
        if resumed and step == 13:
            again = Monitor(Limits())
            again.state = monitor.state
            monitor = again
        rollout: Any = SimpleNamespace(prompts=["p"], responses=[f"{0.02 * step} and so on"])
        metrics = METRICS | {"score_mean": 0.02 * step + level, "step": float(step)}
        raised = monitor.update(metrics, rollout, Mirrored(-level))[1]
        first += [alarm.step for alarm in raised if alarm.name == "held_out_gap"]
    assert first == [17]  # means of five: 4 updates until the first, 13 × 0.04 = 0.52 later


def test_a_roll_back_discards_the_figures_of_the_policy_before_it() -> None:
    monitor = Monitor(Limits.read(["win_rate_gap=0.1:roll_back"]))
    monitor.compare_win_rates([blind(i, (2, 0), "b") for i in range(20)], Fixed(), label_noise=0.1)
    assert [alarm.name for alarm in monitor.update(METRICS, ROLLOUT, None)[1]] == ["win_rate_gap"]
    monitor.rolled_back({"kl": 1.0})
    assert monitor.figures == {"kl": 1.0}
    assert monitor.update(METRICS, ROLLOUT, None)[1] == []


def pair(mu: float) -> Preference:
    return Preference(prompt="p", a="1 good", b="0 bad", mu=mu)


def test_a_reward_with_the_wrong_sign_stops_the_loop() -> None:
    monitor = Monitor(Limits())
    assert monitor.check_sign(Fixed(), [pair(1.0)] * 10, 5) == []
    for step in (6, 7):  # each reward model is tested
        (alarm,) = monitor.check_sign(Fixed(), [pair(0.0)] * 10, step)
        assert (alarm.name, alarm.action, alarm.figure) == ("reward_sign", "stop", -1.0)
    assert monitor.check_sign(Fixed(), [pair(0.0)] * 9 + [pair(0.5)] * 9, 8) == []  # too few


def blind(number: int, writers: tuple[int, int], choice: Any) -> Label:
    """The policy's response earns 3, the start's 0."""
    responses = tuple("3 new" if version else "0 old" for version in writers)
    return Label(
        event_id=number,
        comparison_id=number,
        comparison=Comparison(prompt="p", responses=responses, why_selected="win_rate", writers=writers),
        annotator="ann",
        choice=choice,
        ranks=None,
        strength=None,
        shown_order=(0, 1),
        seconds=1.0,
        created=datetime.now(UTC),
    )


def test_a_reward_that_promises_more_wins_than_people_give_raises_an_alarm() -> None:
    sides = [((2, 0), "b"), ((0, 2), "a")]  # people like the start better, on whatever side it is
    labels = [blind(i, *sides[i % 2]) for i in range(20)]
    monitor = Monitor(Limits())
    monitor.compare_win_rates(labels, Fixed(), label_noise=0.1)
    assert [alarm.name for alarm in monitor.update(METRICS, ROLLOUT, None)[1]] == ["win_rate_gap"]
    liked = Monitor(Limits())
    liked.compare_win_rates([replace(one, choice="a" if one.choice == "b" else "b") for one in labels], Fixed(), 0.1)
    assert liked.update(METRICS, ROLLOUT, None)[1] == []


def test_a_continuation_remembers_the_start_and_what_was_raised() -> None:
    monitor = Monitor(Limits())
    monitor.update(METRICS, ROLLOUT, None)
    monitor.update(METRICS | {"response_tokens": 30.0}, ROLLOUT, None)
    again = Monitor(Limits())
    again.state = monitor.state
    assert again.update(METRICS | {"response_tokens": 30.0}, ROLLOUT, None)[1] == []  # it was raised already
    again.rolled_back({})
    raised = again.update(METRICS | {"response_tokens": 30.0}, ROLLOUT, None)[1]
    assert [(alarm.name, alarm.figure) for alarm in raised] == [("length_ratio", 3.0)]
