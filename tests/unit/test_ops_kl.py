import math

import pytest
import torch
from torch.testing import assert_close

from deep_rlhf.ops.kl import adapted_kl_coef, kl_estimate, kl_full

# d = log π − log π_ref = 1, 0, −1 and 3
LOGPROBS = torch.tensor([-1.0, -2.0, -3.0, -0.5])
REF_LOGPROBS = torch.tensor([-2.0, -2.0, -2.0, -3.5])
E = math.e


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("kl", [1.0, 0.0, -1.0, 3.0]),
        ("abs", [1.0, 0.0, 1.0, 3.0]),
        ("mse", [0.5, 0.0, 0.5, 4.5]),
        # e^−1 − 1 + 1 = 0.3678794, 1 − 1 + 0 = 0, e − 1 − 1 = 0.7182818, e^−3 − 1 + 3 = 2.0497871
        ("k3", [0.3678794, 0.0, 0.7182818, 2.0497871]),
    ],
)
def test_estimators(kind: str, expected: list[float]) -> None:
    assert_close(kl_estimate(LOGPROBS, REF_LOGPROBS, kind), torch.tensor(expected))


@pytest.mark.parametrize(("kind", "other_name"), [("kl", "k1"), ("mse", "k2")])
def test_two_estimators_have_two_names(kind: str, other_name: str) -> None:
    assert_close(kl_estimate(LOGPROBS, REF_LOGPROBS, other_name), kl_estimate(LOGPROBS, REF_LOGPROBS, kind))


def test_the_full_kl_is_no_estimate() -> None:
    with pytest.raises(ValueError, match="kl_full"):
        kl_estimate(LOGPROBS, REF_LOGPROBS, "full")


def test_the_plain_difference_is_the_default() -> None:
    assert_close(kl_estimate(LOGPROBS, REF_LOGPROBS), torch.tensor([1.0, 0.0, -1.0, 3.0]))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("kl", [1.0, -1.0]),  # d = 3 and −1: slope 1 on both, and the mirror image for the reference
        ("abs", [1.0, -1.0]),
        ("mse", [3.0, -3.0]),  # d
        ("k3", [0.9502129, -0.9502129]),  # 1 − e^−3
    ],
)
def test_gradients(kind: str, expected: list[float]) -> None:
    logprob, ref_logprob = torch.tensor(-0.5, requires_grad=True), torch.tensor(-3.5, requires_grad=True)
    kl_estimate(logprob, ref_logprob, kind).backward()
    assert_close(torch.stack([logprob.grad, ref_logprob.grad]), torch.tensor(expected))


def test_an_unknown_estimator_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown KL estimator 'k4'"):
        kl_estimate(LOGPROBS, REF_LOGPROBS, "k4")  # type: ignore[arg-type]


def test_full_kl_sums_over_the_vocabulary() -> None:
    # two positions of one sequence:
    # ½ ln(½ / ¼) + ½ ln(½ / ¾) = ½ (ln 2 − ln 1.5) = 0.1438410, and a distribution against itself: 0
    policy = torch.tensor([[[0.5, 0.5], [0.9, 0.1]]]).log()
    reference = torch.tensor([[[0.25, 0.75], [0.9, 0.1]]]).log()
    assert_close(kl_full(policy, reference), torch.tensor([[0.1438410, 0.0]]))
    # the other way round: ¼ ln ½ + ¾ ln 1.5 = −0.1732868 + 0.3040988
    assert_close(kl_full(reference, policy), torch.tensor([[0.1308120, 0.0]]))


def test_a_token_of_probability_zero_contributes_nothing_to_the_full_kl() -> None:
    # suppressed in both: ½ ln(½ / ¼) + ½ ln(½ / ¾); in the policy alone: ln(1 / ½); in the reference alone: infinite
    policy = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.5, 0.25, 0.25]]).log()
    reference = torch.tensor([[0.25, 0.75, 0.0], [0.5, 0.25, 0.25], [0.5, 0.5, 0.0]]).log()
    assert_close(kl_full(policy, reference), torch.tensor([0.1438410, 0.6931472, math.inf]))


def test_estimators_agree_with_the_full_kl_in_expectation() -> None:
    policy, reference = torch.tensor([0.2, 0.5, 0.3]), torch.tensor([0.6, 0.3, 0.1])
    exact = kl_full(policy.log(), reference.log())
    for kind in ("kl", "k3"):
        assert_close((policy * kl_estimate(policy.log(), reference.log(), kind)).sum(), exact)


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (6.0, 0.15),  # on target
        (6.5, 0.15032),  # error 0.5/6 = 0.0833333: 0.15 (1 + 0.0833333 · 256/10000) = 0.15 · 1.00213333
        (12.0, 0.150768),  # error 1, clipped to 0.2: 0.15 · 1.00512
        (5.4, 0.149616),  # error −0.1: 0.15 · 0.99744
        (0.0, 0.149232),  # error −1, clipped to −0.2: 0.15 · 0.99488
        (-3.0, 0.149232),  # a sampled KL may be negative
    ],
)
def test_adapted_coefficient(kl: float, expected: float) -> None:
    assert adapted_kl_coef(0.15, kl, target=6.0, horizon=10_000, samples=256) == pytest.approx(expected, rel=1e-9)
