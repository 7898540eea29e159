import math

import torch
from torch.testing import assert_close

from deep_rlhf.ops.masked import masked_mean, masked_sum, masked_var, sequence_mean, whiten

NAN = float("nan")
# Two responses with a gap and padding; the real tokens are 2, 4 and 9: sum 15, mean 5,
# squared distances 9 + 1 + 16 = 26, unbiased variance 26 / 2 = 13.
VALUES = torch.tensor([[2.0, NAN, 4.0], [9.0, math.inf, NAN]])
MASK = torch.tensor([[True, False, True], [True, False, False]])
EMPTY = torch.zeros_like(MASK)
ONE = torch.tensor([[False, False, True], [False, False, False]])


def test_sum_mean_and_variance_read_the_real_tokens_alone() -> None:
    assert_close(masked_sum(VALUES, MASK), torch.tensor(15.0))
    assert_close(masked_mean(VALUES, MASK), torch.tensor(5.0))
    assert_close(masked_var(VALUES, MASK), torch.tensor(13.0))


def test_an_empty_mask_gives_zero() -> None:
    for function in (masked_sum, masked_mean, masked_var):
        assert_close(function(VALUES, EMPTY), torch.tensor(0.0))


def test_the_variance_of_a_single_token_is_zero_and_its_mean_is_itself() -> None:
    assert_close(masked_mean(VALUES, ONE), torch.tensor(4.0))
    assert_close(masked_var(VALUES, ONE), torch.tensor(0.0))


def test_nothing_outside_the_mask_receives_gradient() -> None:
    values = VALUES.clone().requires_grad_()
    masked_mean(values, MASK).backward()
    assert_close(values.grad, torch.tensor([[1 / 3, 0.0, 1 / 3], [1 / 3, 0.0, 0.0]]))


def test_whiten_divides_the_distance_to_the_mean_by_the_standard_deviation() -> None:
    # (2 − 5)/√13 = −0.8320503, (4 − 5)/√13 = −0.2773501, (9 − 5)/√13 = 1.1094004
    expected = torch.tensor([[-0.8320503, 0.0, -0.2773501], [1.1094004, 0.0, 0.0]])
    assert_close(whiten(VALUES, MASK), expected)


def test_whiten_without_shift_keeps_the_mean() -> None:
    # the same three numbers, each plus the mean of 5
    expected = torch.tensor([[4.1679497, 0.0, 4.7226499], [6.1094004, 0.0, 0.0]])
    assert_close(whiten(VALUES, MASK, shift_mean=False), expected)


def test_whitened_constants_are_zero_because_the_variance_has_a_floor() -> None:
    # (3 − 3)/√(0 + 1e-8) = 0; a single 4 likewise
    constant = torch.full((2, 3), 3.0)
    assert_close(whiten(constant, MASK), torch.zeros(2, 3))
    assert_close(whiten(VALUES, ONE), torch.zeros(2, 3))
    assert_close(whiten(constant, MASK, shift_mean=False), 3.0 * MASK)


def test_the_floor_under_the_variance_is_1e_minus_8() -> None:
    # 0 and 2e-4: mean 1e-4, variance 2 · 1e-8; ±1e-4 / √(2e-8 + 1e-8) = ±0.5773503
    values, mask = torch.tensor([[0.0, 2e-4]]), torch.tensor([[True, True]])
    assert_close(whiten(values, mask), torch.tensor([[-0.5773503, 0.5773503]]))


def test_sequence_mean_weighs_sequences_equally() -> None:
    # (2 + 4)/2 = 3 and 9: (3 + 9)/2 = 6, where the token mean is 5
    assert_close(sequence_mean(VALUES, MASK), torch.tensor(6.0))


def test_sequence_mean_leaves_out_sequences_without_a_token() -> None:
    # the first sequence holds the single token 4, the second none
    assert_close(sequence_mean(VALUES, ONE), torch.tensor(4.0))
    assert_close(sequence_mean(VALUES, EMPTY), torch.tensor(0.0))
