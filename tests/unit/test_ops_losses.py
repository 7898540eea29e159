import math

import pytest
import torch
from torch.testing import assert_close

from deep_rlhf.ops.losses import explained_variance, policy_loss, truncated_importance, value_loss

NAN = float("nan")


# ε = 0.2. The gradient of −ρA by log π is −ρA, and 0 where the clipped term is the larger.
@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [
        (1.5, 2.0, -2.4, 0.0, True),  # A > 0, above: max(−3, −1.2·2)
        (0.5, 2.0, -1.0, -1.0, False),  # A > 0, below: max(−1, −0.8·2)
        (1.5, -2.0, 3.0, 3.0, False),  # A < 0, above: max(3, 1.2·2)
        (0.5, -2.0, 1.6, 0.0, True),  # A < 0, below: max(1, 0.8·2)
        (1.1, 2.0, -2.2, -2.2, False),  # within the range both terms are the same
        (0.9, -2.0, 1.8, 1.8, False),
        (1.5, 0.0, 0.0, 0.0, False),
    ],
)
def test_policy_loss(ratio: float, advantage: float, loss: float, gradient: float, clipped: bool) -> None:
    old = torch.tensor([-1.0])
    logprobs = (old + math.log(ratio)).requires_grad_()
    actual, took_effect = policy_loss(logprobs, old, torch.tensor([advantage]), cliprange=0.2)
    actual.sum().backward()
    assert_close(actual, torch.tensor([loss]))
    assert_close(logprobs.grad, torch.tensor([gradient]))
    assert took_effect.tolist() == [clipped]


# ε = 0.2, c = 3: where A < 0 and ρ > 3 the loss is −3A, a constant.
@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [
        (10.0, -4.0, 12.0, 0.0, True),
        (2.9, -4.0, 11.6, 11.6, False),
        (0.5, -4.0, 3.2, 0.0, True),  # the ordinary clip still counts: 0.8·4
        (10.0, 4.0, -4.8, 0.0, True),  # and positive advantages know nothing of c: −1.2·4
        (1.1, 4.0, -4.4, -4.4, False),
        (10.0, 0.0, 0.0, 0.0, False),
    ],
)
def test_policy_loss_with_dual_clip(
    ratio: float, advantage: float, loss: float, gradient: float, clipped: bool
) -> None:
    old = torch.tensor([-3.0])
    logprobs = (old + math.log(ratio)).requires_grad_()
    actual, took_effect = policy_loss(logprobs, old, torch.tensor([advantage]), cliprange=0.2, dual_clip=3.0)
    actual.sum().backward()
    assert_close(actual, torch.tensor([loss]))
    assert_close(logprobs.grad, torch.tensor([gradient]))
    assert took_effect.tolist() == [clipped]


def test_a_ratio_equal_to_the_dual_clip_is_not_yet_clipped() -> None:
    logprobs = torch.tensor([1.0], requires_grad=True)
    ratio = logprobs.exp().item()  # log π_old = 0
    loss, took_effect = policy_loss(logprobs, torch.zeros(1), torch.tensor([-1.0]), cliprange=0.2, dual_clip=ratio)
    loss.sum().backward()
    assert_close(loss, torch.tensor([math.e]))
    assert_close(logprobs.grad, torch.tensor([math.e]))
    assert took_effect.tolist() == [False]


# ε = 0.2, R = 1. The gradient by V is V − R, and 0 where the clipped term is the larger.
@pytest.mark.parametrize(
    ("value", "old", "loss", "gradient", "clipped"),
    [
        (0.8, 0.0, 0.32, 0.0, True),  # towards R, too far up: clip 0.2, ½ max(0.2², 0.8²)
        (1.2, 2.0, 0.32, 0.0, True),  # towards R, too far down: clip 1.8, ½ max(0.2², 0.8²)
        (-1.0, 0.0, 2.0, -2.0, False),  # away from R, down: clip −0.2, ½ max(2², 1.2²)
        (3.0, 2.0, 2.0, 2.0, False),  # away from R, up: clip 2.2, ½ max(2², 1.2²)
        (0.1, 0.0, 0.405, -0.9, False),  # within the range: ½ 0.9²
        (-0.1, 0.0, 0.605, -1.1, False),
    ],
)
def test_value_loss(value: float, old: float, loss: float, gradient: float, clipped: bool) -> None:
    values = torch.tensor([value], requires_grad=True)
    actual, took_effect = value_loss(values, torch.tensor([old]), torch.tensor([1.0]), cliprange_value=0.2)
    actual.sum().backward()
    assert_close(actual, torch.tensor([loss]))
    assert_close(values.grad, torch.tensor([gradient]))
    assert took_effect.tolist() == [clipped]


def test_a_rounding_error_does_not_count_as_clipped() -> None:
    torch.manual_seed(0)
    values, old_values = 0.1 * torch.randn(2, 1000)
    _, took_effect = value_loss(values, old_values, torch.zeros(1000), cliprange_value=1.0)
    assert not took_effect.any()


def test_truncated_importance() -> None:
    # ratios ½, 1, 2 and 8, of which the last is over the cap
    logprobs = torch.tensor([-2 * math.log(2), -1.0, -1.0, 0.0], requires_grad=True)
    sampler_logprobs = torch.tensor([-math.log(2), -1.0, -1.0 - math.log(2), -math.log(8)])
    weights = truncated_importance(logprobs, sampler_logprobs, cap=3.0)
    assert_close(weights, torch.tensor([0.5, 1.0, 2.0, 3.0]))
    assert not weights.requires_grad


# Returns 1, 2, 6: mean 3, variance (4 + 1 + 9)/2 = 7; entries outside the mask do not count.
RETURNS = torch.tensor([[1.0, 2.0, NAN], [6.0, NAN, NAN]])
MASK = torch.tensor([[True, True, False], [True, False, False]])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, 2.0, 6.0], 1.0),  # perfect
        ([2.0, 3.0, 7.0], 1.0),  # a constant offset leaves no variance
        ([3.0, 3.0, 3.0], 0.0),  # the mean
        ([0.0, 0.0, 4.0], 0.9523810),  # errors 1, 2, 2: variance ⅓; 1 − (⅓)/7
        ([-1.0, -2.0, -6.0], -3.0),  # errors doubled: variance 28; 1 − 28/7
    ],
)
def test_explained_variance(values: list[float], expected: float) -> None:
    predicted = torch.full((2, 3), NAN)
    predicted[MASK] = torch.tensor(values)
    assert_close(explained_variance(predicted, RETURNS, MASK), torch.tensor(expected))


def test_explained_variance_has_no_scale() -> None:
    # as 0, 0, 4 against 1, 2, 6 above, all divided by ten million
    predicted = torch.full((2, 3), NAN)
    predicted[MASK] = torch.tensor([0.0, 0.0, 4e-7])
    assert_close(explained_variance(predicted, RETURNS * 1e-7, MASK), torch.tensor(0.9523810))


def test_constant_returns_have_no_variance_to_explain() -> None:
    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    assert_close(explained_variance(values, torch.full((2, 3), 3.0), MASK), torch.tensor(0.0))
    assert_close(explained_variance(values, values, torch.zeros_like(MASK)), torch.tensor(0.0))
