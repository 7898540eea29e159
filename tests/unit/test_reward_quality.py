"""The calibration of a reward model against numbers worked out by hand."""

import math

import numpy as np
import pytest

from deep_rlhf.evaluation.reward_quality import calibration


def test_columns_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="one number per pair"):
        calibration([1, 2], [1, 2], [1])


def test_calibration_by_hand() -> None:
    # P = 1/(1 + 1/3) = 0.75 four times, preferred three times: exactly calibrated. P = 0.9 twice, preferred once.
    difference = [math.log(3)] * 4 + [math.log(9)] * 2
    result = calibration(difference, [0] * 6, [1, 1, 1, 0, 1, 0], bins=2)
    assert result.count == (6, 6)
    assert result.predicted == pytest.approx(((0.25 * 4 + 0.1 * 2) / 6, (0.75 * 4 + 0.9 * 2) / 6))
    assert result.observed == pytest.approx((2 / 6, 4 / 6))
    assert result.expected_error == pytest.approx(4.8 / 6 - 4 / 6)


def test_calibration_separates_bins() -> None:
    difference = [math.log(3)] * 4 + [math.log(9)] * 2
    result = calibration(difference, [0] * 6, [1, 1, 1, 0, 1, 0], bins=10)
    assert result.count == (2, 4, 4, 2)
    assert result.predicted == pytest.approx((0.1, 0.25, 0.75, 0.9))
    assert result.observed == pytest.approx((0.5, 0.25, 0.75, 0.5))
    assert result.expected_error == pytest.approx((2 * 0.4 + 2 * 0.4) / 12)


@pytest.mark.parametrize("bins", [1, 7, 10])
def test_calibration_is_symmetric_and_blind_to_the_order_of_a_pair(bins: int) -> None:
    rng = np.random.default_rng(0)
    a, b, mu = [*rng.normal(size=(2, 50)).tolist(), rng.integers(0, 2, 50).tolist()]
    forward = calibration(a, b, mu, bins)
    backward = calibration(b, a, [1 - value for value in mu], bins)
    assert forward.count == backward.count == forward.count[::-1]
    assert sum(forward.count) == 100
    assert forward.observed == pytest.approx(backward.observed)
    assert forward.observed == pytest.approx([1 - value for value in forward.observed[::-1]])
    assert forward.predicted == pytest.approx([1 - value for value in forward.predicted[::-1]])


def test_calibration_survives_huge_rewards() -> None:
    result = calibration([1e6, -1e6], [-1e6, 1e6], [1, 0])
    assert result.predicted == (0.0, 1.0)
    assert result.expected_error == 0.0


def test_calibration_of_a_constant_reward_model_is_honest_about_knowing_nothing() -> None:
    result = calibration([0, 0, 0], [0, 0, 0], [1, 1, 0])
    assert (result.predicted, result.observed, result.count) == ((0.5,), (0.5,), (6,))


@pytest.mark.parametrize("rewards", [[], [math.nan], [math.inf]])
def test_calibration_refuses_what_it_cannot_place(rewards: list[float]) -> None:
    with pytest.raises(ValueError, match="finite rewards"):
        calibration(rewards, [0.0] * len(rewards), [1] * len(rewards))
