"""Which pairs nobody learns from, and the losses in and out of the bags, by hand."""

import math

import pytest
import torch

from deep_rlhf.feedback.reward_refit.bootstrap import (
    HELD_OUT_SHARE,
    bag_id,
    bag_losses,
    held_out_accuracies,
    held_out_mask,
    is_held_out,
)
from deep_rlhf.feedback.reward_refit.regularisation import adapted_weight_decay

LN3 = math.log(3)  # σ(ln 3) = ¾


def test_swapping_the_responses_keeps_a_question_in_its_bags() -> None:
    name = bag_id("p", ("one", "two"), 3)
    assert bag_id("p", ("two", "one"), 3) == name
    others = {bag_id("q", ("one", "two"), 3), bag_id("p", ("one", "three"), 3), bag_id("p", ("one", "two"), 4), name}
    assert len(others) == 4


def test_a_sixth_of_the_pairs_is_held_out_of_every_bag() -> None:
    names = [f"pair {number}" for number in range(6000)]
    out = [is_held_out(name) for name in names]
    assert sum(out) / 6000 == pytest.approx(HELD_OUT_SHARE, abs=0.015)  # standard error 0.005
    assert out == [is_held_out(name) for name in names]


def features(*rows: tuple[float, list[float]]) -> list[dict]:
    return [{"labels": mu, "weight": torch.tensor(weight)} for mu, weight in rows]


# Pair 0 is twice in the bag of member 0, pair 1 once in both, pairs 2 and 3 in none; member 0 has r_a − r_b = ln 3 of
# every pair, member 1 has 0.
FOUR = features((1.0, [2.0, 0.0]), (0.0, [1.0, 1.0]), (1.0, [0.0, 0.0]), (0.5, [0.0, 0.0]))
REWARDS = torch.stack([torch.tensor([[LN3, 0.0]] * 4), torch.zeros(4, 2)], dim=1)


def test_losses_in_and_out_of_the_bags_by_hand() -> None:
    train, out = bag_losses(REWARDS, FOUR, torch.ones(4), 0.0)
    # member 0: (2 ln 4/3 + ln 4) / 3, member 1: ln 2
    assert train == pytest.approx(((2 * math.log(4 / 3) + math.log(4)) / 3 + math.log(2)) / 2)
    # member 0: of ln 4/3 and, for the tie, half ln 4/3 and half ln 4; member 1: ln 2
    member = (1.5 * math.log(4 / 3) + 0.5 * math.log(4)) / 2
    assert out == pytest.approx((member + math.log(2)) / 2)


def test_weights_of_pairs_and_the_noise_of_their_annotators_count() -> None:
    weighted = bag_losses(REWARDS, FOUR, torch.tensor([1.0, 1.0, 3.0, 1.0]), 0.0)
    member = (3 * math.log(4 / 3) + 0.5 * math.log(4 / 3) + 0.5 * math.log(4)) / 4
    assert weighted[1] == pytest.approx((member + math.log(2)) / 2)
    noisy = [*FOUR[:2], {**FOUR[2], "label_noise": 1.0}, {**FOUR[3], "label_noise": 1.0}]
    assert bag_losses(REWARDS, noisy, torch.ones(4), 0.0)[1] == pytest.approx(math.log(2))
    # 0.9 · ¾ + 0.05 = 0.725, and 0.275
    assumed = bag_losses(REWARDS[:2], FOUR[:2], torch.ones(2), 0.1)[0]
    assert assumed == pytest.approx((-(2 * math.log(0.725) + math.log(0.275)) / 3 + math.log(2)) / 2)


def test_without_pairs_on_one_side() -> None:
    assert math.isnan(bag_losses(REWARDS[:2], FOUR[:2], torch.ones(2), 0.0)[1])
    assert held_out_mask(FOUR).tolist() == [False, False, True, True]


def test_accuracy_is_measured_on_pairs_in_no_bag() -> None:
    rows = features((1.0, [1.0, 1.0]), (1.0, [0.0, 0.0]), (0.0, [0.0, 0.0]), (0.5, [0.0, 0.0]))
    assert held_out_accuracies(REWARDS, rows) == [0.5, 0.5]
    assert held_out_accuracies(REWARDS[:2], rows[:2]) == [1.0, 0.5]


@pytest.mark.parametrize(
    ("ratio", "factor"),
    [
        (1.1, 1.0),
        (1.3, 1.0),
        (1.5, 1.0),
        (1.65, 2.0),  # ln 1.65 = ln (1.1 · 1.5): twice the middle
        (9.0, 3.0),
        (1.65**0.25, 1.0),  # 1.133: within
        (1.05, 1 / 3),
        (1.09, math.log(1.09) / (math.log(1.65) / 2)),
        (0.8, 1 / 3),
        (math.nan, 1.0),
    ],
)
def test_the_weight_decay_follows_the_ratio(ratio: float, factor: float) -> None:
    assert adapted_weight_decay(60.0, ratio, (1.1, 1.5)) == pytest.approx(60.0 * factor)


def test_the_weight_decay_has_bounds() -> None:
    assert adapted_weight_decay(1500.0, 9.0, (1.1, 1.5)) == 2000.0
    assert adapted_weight_decay(2.0, 0.9, (1.1, 1.5)) == 1.0
