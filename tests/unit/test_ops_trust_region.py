import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from deep_rlhf.ops.trust_region import backtracking, conjugate_gradient

FISHER = torch.tensor([[4.0, 1.0], [1.0, 3.0]])
GRADIENT = torch.tensor([1.0, 2.0])


class Products:
    """FISHER @ v, with a count of the calls."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, vector: Tensor) -> Tensor:
        self.count += 1
        return FISHER @ vector


# r₀ = (1, 2), F r₀ = (6, 7), length 5/20: x₁ = (¼, ½), r₁ = (−½, ¼), ‖r₁‖² = 5/16, β = 1/16, p₁ = (−7/16, 3/8),
# F p₁ = (−11/8, 11/16), length (5/16)/(55/64) = 4/11: x₂ = (1/11, 7/11)
def test_conjugate_gradient_by_hand() -> None:
    products = Products()
    one = conjugate_gradient(products, GRADIENT, iterations=1, tolerance=0.0)
    assert_close(one, torch.tensor([0.25, 0.5]))
    assert products.count == 1
    two = conjugate_gradient(products, GRADIENT, iterations=2, tolerance=0.0)
    assert_close(two, torch.tensor([1 / 11, 7 / 11]))
    assert products.count == 3


@pytest.mark.parametrize(("tolerance", "products_needed"), [(0.25, 1), (0.3, 1), (0.2, 2), (1e-3, 2), (1.0, 0)])
def test_conjugate_gradient_stops_at_the_tolerated_share_of_the_target(tolerance: float, products_needed: int) -> None:
    # ‖r₁‖ is a quarter of ‖g‖, however long g is
    for scale in (1.0, 0.125, 8.0):
        products = Products()
        solution = conjugate_gradient(products, scale * GRADIENT, iterations=10, tolerance=tolerance)
        assert products.count == products_needed
        expected = {0: [0.0, 0.0], 1: [0.25, 0.5], 2: [1 / 11, 7 / 11]}[products_needed]
        assert_close(solution, scale * torch.tensor(expected))


def test_the_conjugate_gradient_of_zero_is_zero() -> None:
    assert_close(conjugate_gradient(Products(), torch.zeros(2), iterations=10, tolerance=0.0), torch.zeros(2))


def test_conjugate_gradient_solves_a_larger_system() -> None:
    torch.manual_seed(0)
    root = torch.randn(12, 12, dtype=torch.float64)
    matrix = root @ root.T + torch.eye(12, dtype=torch.float64)
    wanted = torch.linspace(-1, 1, 12, dtype=torch.float64)
    solution = conjugate_gradient(lambda v: matrix @ v, matrix @ wanted, iterations=50, tolerance=1e-12)
    assert_close(solution, wanted, rtol=0, atol=1e-8)


class Step:
    """The outcome of each fraction of a step, and the position that the line search leaves."""

    def __init__(self, outcomes: dict[float, tuple[float, float]]) -> None:
        self.outcomes = outcomes
        self.tried: list[float] = []

    def __call__(self, fraction: float) -> tuple[float, float]:
        self.tried.append(fraction)
        return self.outcomes[fraction]


def test_an_acceptable_full_step_is_taken() -> None:
    step = Step({1.0: (0.1, 0.01)})  # a KL equal to the bound is within it
    assert backtracking(step, max_kl=0.01, attempts=10) == 1.0
    assert step.tried == [1.0]


def test_the_step_is_halved_until_it_improves_within_the_bound() -> None:
    # too far; no better; worse; both conditions met
    step = Step({1.0: (0.5, 0.04), 0.5: (0.0, 0.01), 0.25: (-0.1, 0.005), 0.125: (0.01, 0.001)})
    assert backtracking(step, max_kl=0.01, attempts=10) == 0.125
    assert step.tried == [1.0, 0.5, 0.25, 0.125]


@pytest.mark.parametrize(
    "outcome", [(1.0, 0.02), (-1.0, 0.0), (0.0, 0.0), (math.nan, 0.0), (1.0, math.nan), (1.0, math.inf)]
)
def test_without_an_acceptable_step_none_is_taken(outcome: tuple[float, float]) -> None:
    step = Step(dict.fromkeys((1.0, 0.5, 0.25), outcome))
    assert backtracking(step, max_kl=0.01, attempts=3) == 0.0
    assert step.tried == [1.0, 0.5, 0.25]
