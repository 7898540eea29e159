"""Each alarm is raised beyond its limit, once, and not within it; its figures are those computed by hand."""

import math

import pytest
import torch

from deep_rlhf.errors import ConfigError
from deep_rlhf.feedback.monitoring.alarms import (
    NAMES,
    AlarmTracker,
    Limit,
    Limits,
    check,
    held_out_gap,
    repetition,
    sign_self_test,
    win_rate_gap,
)
from deep_rlhf.types import Preference

BEYOND = {
    "held_out_gap": 0.6,
    "ensemble_std": 1.1,
    "length_ratio": 2.1,
    "entropy_ratio": 0.1,
    "repetition": 0.4,
    "kl": 31.0,
    "win_rate_gap": 0.2,
    "reward_sign": -0.1,
}
WITHIN = {
    "held_out_gap": 0.4,
    "ensemble_std": 0.9,
    "length_ratio": 0.6,
    "entropy_ratio": 0.3,
    "repetition": 0.2,
    "kl": 29.0,
    "win_rate_gap": -0.2,
    "reward_sign": 0.1,
}


def test_every_alarm_has_a_name_and_a_limit() -> None:
    assert NAMES == tuple(BEYOND) == tuple(WITHIN)


@pytest.mark.parametrize("name", NAMES)
def test_each_alarm_is_raised_beyond_its_limit_alone(name: str) -> None:
    (alarm,) = check({**WITHIN, name: BEYOND[name]}, Limits(), 7)
    assert (alarm.name, alarm.step, alarm.figure) == (name, 7, BEYOND[name])
    assert alarm.action == ("stop" if name == "reward_sign" else "warn")
    assert alarm.limit == getattr(Limits(), name).limit
    assert alarm.message.endswith(f"(limit {alarm.limit:g}).")


@pytest.mark.parametrize(
    ("name", "figure", "shown", "limit"),
    [
        ("entropy_ratio", 0.15, "0.15", "0.2"),
        ("entropy_ratio", 0.1996, "0.1996", "0.2"),
        ("kl", 30.04, "30.04", "30"),
        ("repetition", 0.304, "30.4%", "0.3"),
        ("reward_sign", -0.001, "-0.001", "0"),
        ("length_ratio", 2.5, "2.50", "2"),
        ("length_ratio", 0.4, "0.40", "0.5"),
        ("length_ratio", 0.498, "0.498", "0.5"),
        ("length_ratio", math.nan, "nan", "2"),
        ("kl", 30 + 1e-12, "30.0000000", "30"),
    ],
)
def test_a_figure_beyond_its_limit_does_not_look_equal_to_it(name: str, figure: float, shown: str, limit: str) -> None:
    (alarm,) = check({name: figure}, Limits(), 1)
    assert shown in alarm.message.split()
    assert alarm.message.endswith(f" (limit {limit}).")


def test_within_all_limits_nothing_is_raised() -> None:
    assert check(WITHIN, Limits(), 1) == []
    assert check({"reward": 1e9, "kl": None}, Limits(), 1) == []


def test_half_the_length_is_as_far_from_the_start_as_twice_the_length() -> None:
    assert [bool(check({"length_ratio": ratio}, Limits(), 1)) for ratio in (0.0, 0.49, 0.51, 1.99, 2.01)] == [
        True,
        True,
        False,
        False,
        True,
    ]


@pytest.mark.parametrize("figure", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", NAMES)
def test_a_figure_that_is_not_finite_is_beyond_every_limit(name: str, figure: float) -> None:
    assert len(check({name: figure}, Limits(), 1)) == 1


def test_limits_are_read() -> None:
    limits = Limits.read(["kl=20:stop", "repetition=off", "entropy_ratio=0.5", "held_out_gap=1:roll_back"])
    assert limits.kl == Limit(20.0, "stop")
    assert limits.repetition == Limit(None)
    assert limits.entropy_ratio == Limit(0.5, "warn")
    assert limits.held_out_gap == Limit(1.0, "roll_back")
    assert limits.ensemble_std == Limits().ensemble_std
    assert [alarm.action for alarm in check({"kl": 21.0, "repetition": 0.9}, limits, 1)] == ["stop"]


@pytest.mark.parametrize(
    "setting", ["reward_sign=0:roll_back", "kl", "lk=3", "kl=", "kl=much", "kl=nan", "kl=3:panic", "kl=off:stop"]
)
def test_settings_that_are_refused(setting: str) -> None:
    with pytest.raises(ConfigError, match="alarm"):
        Limits.read([setting])


def test_an_alarm_is_raised_once_until_its_figure_came_back() -> None:
    watch = AlarmTracker(Limits(kl=Limit(10.0)))
    # beyond; still beyond; within, but not by a tenth; beyond again; calm; beyond
    told = [len(watch.check({"kl": kl}, step)) for step, kl in enumerate([11, 12, 9.5, 11, 8.9, 11])]
    assert told == [1, 0, 0, 0, 0, 1]


def test_a_policy_may_come_back_if_nothing_is_near_a_limit_that_rolls_back() -> None:
    watch = AlarmTracker(Limits.read(["length_ratio=2:roll_back", "entropy_ratio=0.2:roll_back", "kl=10:warn"]))
    good: list[dict[str, float | None]] = [{}, {"length_ratio": 1.7, "entropy_ratio": 0.5}, {"kl": 99.0}]
    bad: list[dict[str, float | None]] = [{"length_ratio": 1.9}, {"length_ratio": 0.5}, {"length_ratio": None}]
    bad.append({"length_ratio": 1.0, "entropy_ratio": 0.21})
    assert [watch.is_restorable(figures) for figures in good + bad] == [True] * 3 + [False] * 4


def test_an_alarm_for_a_low_figure_is_raised_again_after_it_recovered() -> None:
    watch = AlarmTracker(Limits(entropy_ratio=Limit(0.2)))
    told = [len(watch.check({"entropy_ratio": x}, step)) for step, x in enumerate([0.19, 0.21, 0.19, 0.23, 0.19])]
    assert told == [1, 0, 0, 0, 1]


def test_alarms_do_not_hide_each_other_and_survive_a_resume() -> None:
    watch = AlarmTracker(Limits())
    assert [alarm.name for alarm in watch.check({"kl": 99.0}, 1)] == ["kl"]
    assert [alarm.name for alarm in watch.check({"kl": 99.0, "repetition": 0.9}, 2)] == ["repetition"]
    assert watch.check({"kl": None}, 3) == []  # a figure that is not there has not come back
    again = AlarmTracker(Limits(), watch.raised)
    assert again.check({"kl": 99.0, "repetition": 0.9}, 4) == []
    again.reset()
    assert len(again.check({"kl": 99.0, "repetition": 0.9}, 5)) == 2


def test_held_out_gap_by_hand() -> None:
    # means of five: held-out 0, 0.2, 0.4 (the best), 0.2; reward 0, 0.2, 0.4, 0.8
    held_out = [0.0] * 5 + [1.0, 1.0, -1.0]
    rewards = [0.0] * 5 + [1.0, 1.0, 2.0]
    assert held_out_gap(rewards, held_out) == pytest.approx(0.4 + 0.2)
    assert held_out_gap(held_out, held_out) == 0.0  # the reward falls too: no over-optimisation
    assert held_out_gap(rewards, rewards) == 0.0  # both rise
    assert held_out_gap([1.0] * 4, [1.0] * 4) == 0.0  # too early to say


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("one two three four five", 0.0),
        ("so so so so so", 2 / 3),  # three triples, one of them distinct
        ("a b c a b c", 1 / 4),  # abc bca cab abc
        ("one two", 0.0),
        ("", 0.0),
    ],
)
def test_repetition_by_hand(text: str, share: float) -> None:
    assert repetition([text]) == pytest.approx(share)
    assert repetition([text, "one two three"]) == pytest.approx(share / 2)


def test_repetition_of_other_lengths() -> None:
    assert repetition([]) == 0.0
    assert repetition(["a b a b a"], words=2) == pytest.approx(1 / 2)  # ab ba ab ba


def test_win_rate_gap_by_hand() -> None:
    # p' = 0.9 · 0.9 + 0.05 = 0.86; people say 0.5 with a sample variance of 0.25 · 20/19
    labels = [1.0, 0.0] * 10
    gap = win_rate_gap([0.9] * 20, labels)
    assert gap == pytest.approx(0.36 - 1.959964 * math.sqrt(0.25 * 20 / 19 / 20))
    assert win_rate_gap([0.9] * 20, [1.0] * 20) == pytest.approx(-0.14)
    assert win_rate_gap([0.9] * 20, labels, label_noise=0.0) == pytest.approx(gap + 0.04)
    assert win_rate_gap([0.9] * 9, [1.0] * 9) is None


class Lengths:
    """Rewards longer responses, by two members of different size."""

    def __init__(self, sign: float = 1.0) -> None:
        self.sign = sign

    def score(self, prompts: list[str], responses: list[str]) -> torch.Tensor:
        length = torch.tensor([[float(len(response))] for response in responses])
        return self.sign * length * torch.tensor([[1.0, 3.0]])


def pair(a: str, b: str, mu: float, weight: float = 1.0) -> Preference:
    return Preference(prompt="p", a=a, b=b, mu=mu, weight=weight)


def test_sign_self_test_by_hand() -> None:
    # advantage of what people preferred, mean of the members: 2 · 3 = 6, ten times; 2 · 1 = 2, which half preferred
    ties_and_nobodys = [pair("1", "1234567", 0.5), pair("1", "55555", 1.0, 0.0)]
    pairs = [*[pair("four", "1", 1.0)] * 10, pair("1", "22", 0.25), *ties_and_nobodys]
    mean = (10 * 6 + 0.5 * 2) / 10.5
    squares = 10 * (6 - mean) ** 2 + (0.5 * (2 - mean)) ** 2
    margin = 1.959964 * math.sqrt(squares * 11 / 10) / 10.5
    assert sign_self_test(Lengths(), pairs) == pytest.approx(mean + margin)
    assert sign_self_test(Lengths(-1.0), pairs) == pytest.approx(-mean + margin)
    assert sign_self_test(Lengths(), [*[pair("four", "1", 1.0)] * 9, *ties_and_nobodys]) is None


def test_a_flipped_sign_stops_the_run_and_one_that_is_negative_by_chance_does_not() -> None:
    learned = [pair("longer", "short", 1.0), pair("no", "yes", 0.0)] * 5
    by_chance = [pair("longer", "short", 1.0)] * 9 + [pair("short", "longer", 1.0)] * 11
    for sign, pairs, actions in ((1.0, learned, []), (-1.0, learned, ["stop"]), (1.0, by_chance, [])):
        figure = sign_self_test(Lengths(sign), pairs)
        assert [alarm.action for alarm in check({"reward_sign": figure}, Limits(), 1)] == actions
