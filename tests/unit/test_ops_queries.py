"""Acquisition functions by hand, from the probabilities of three members."""

import math

import pytest
import torch
from torch.testing import assert_close

from deep_rlhf.ops.queries import binary_entropy, information_gain, preference_variance, preferred_probability

LN3 = math.log(3)  # σ(ln 3) = ¾, σ(−ln 3) = ¼
# Pairs: all sure alike; torn apart; all unsure; two of three sure. Answer b has the reward 1 everywhere.
DIFFERENCES = [[LN3, LN3, LN3], [LN3, 0.0, -LN3], [0.0, 0.0, 0.0], [LN3, LN3, 0.0]]
REWARDS = torch.stack([1.0 + torch.tensor(DIFFERENCES), torch.ones(4, 3)], dim=1)  # [4, 2, 3]


def entropy(p: float) -> float:
    return -p * math.log(p) - (1 - p) * math.log(1 - p)


def test_probabilities_are_those_of_a_being_better() -> None:
    expected = [[0.75, 0.75, 0.75], [0.75, 0.5, 0.25], [0.5, 0.5, 0.5], [0.75, 0.75, 0.5]]
    assert_close(preferred_probability(REWARDS), torch.tensor(expected))


def test_variance_across_members() -> None:
    # of ¾, ½, ¼: (1/16 + 0 + 1/16) / 3; of ¾, ¾, ½ with mean ⅔: (2/144 + 4/144) / 3
    assert_close(preference_variance(REWARDS), torch.tensor([0.0, 1 / 24, 0.0, 1 / 72]))


def test_the_variance_of_one_member_is_zero() -> None:
    assert_close(preference_variance(REWARDS[:, :, :1]), torch.zeros(4))
    assert_close(information_gain(REWARDS[:, :, :1]), torch.zeros(4))


def test_information_is_high_where_certain_members_disagree() -> None:
    gain = information_gain(REWARDS)
    torn = entropy(0.5) - (entropy(0.75) + entropy(0.5) + entropy(0.25)) / 3
    leaning = entropy(2 / 3) - (entropy(0.75) + entropy(0.75) + entropy(0.5)) / 3
    assert_close(gain, torch.tensor([0.0, torn, 0.0, leaning]))
    assert gain[1] > gain[3] > 0


def test_random_labels_are_less_informative() -> None:
    # p' = 0.8 p + 0.1: 0.7, 0.5, 0.3, and in the last pair the mean (0.7 + 0.7 + 0.5) / 3 = 19/30
    torn = entropy(0.5) - (entropy(0.7) + entropy(0.5) + entropy(0.3)) / 3
    leaning = entropy(19 / 30) - (entropy(0.7) + entropy(0.7) + entropy(0.5)) / 3
    assert_close(information_gain(REWARDS, label_noise=0.2), torch.tensor([0.0, torn, 0.0, leaning]))


@pytest.mark.parametrize(("p", "expected"), [(0.0, 0.0), (1.0, 0.0), (0.5, math.log(2)), (0.2, entropy(0.2))])
def test_entropy_of_a_label(p: float, expected: float) -> None:
    assert_close(binary_entropy(torch.tensor([p])), torch.tensor([expected]))


def test_members_that_are_certain_and_opposed_gain_one_bit() -> None:
    certain = torch.tensor([[[500.0, -500.0], [0.0, 0.0]]])
    assert_close(information_gain(certain), torch.tensor([math.log(2)]))
    assert_close(preference_variance(certain), torch.tensor([0.25]))
