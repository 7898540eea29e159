"""Every algorithm that samples while it learns ends where the theory says: at π* ∝ π₀ exp(r/β), enumerated."""

import itertools
from collections.abc import Callable
from typing import Any

import optimum
import optimum_runs
import pytest
from grids import slow_but


@pytest.mark.parametrize(("beta", "seed"), slow_but([(0.5, 1)], itertools.product(optimum.SCALES, optimum.SEEDS)))
@pytest.mark.parametrize("length", optimum.BOUNDS)
@pytest.mark.parametrize("name", optimum_runs.RUNS)
def test_the_known_optimum_is_reached(
    name: str,
    length: int,
    beta: float,
    seed: int,
    make_model: Callable[..., Any],
    make_tokenizer: Callable[..., Any],
) -> None:
    tokenizer = make_tokenizer(optimum.WORDS)
    outcome = optimum_runs.train(name, make_model, tokenizer, length=length, beta=beta, seed=seed)
    before, after = outcome.distances
    assert before > 2 * optimum.BOUNDS[length]
    assert after <= optimum.BOUNDS[length]
