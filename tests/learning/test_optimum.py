"""Every algorithm that samples while it learns ends where the theory says: at π* ∝ π₀ exp(r/β), enumerated."""

from collections.abc import Callable
from typing import Any

import optimum
import optimum_runs
import pytest


@pytest.mark.parametrize("seed", optimum.SEEDS)
@pytest.mark.parametrize("beta", optimum.SCALES)
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
