"""TRPO on other policies than GPT-2; `test_optimum` has that one."""

from collections.abc import Callable
from typing import Any

import optimum
import optimum_runs
import pytest


@pytest.mark.parametrize(
    ("model", "settings"), [("t5", {}), ("gpt2", {"use_peft": True, "learning_rate": 1e-2})], ids=["t5", "adapters"]
)
@pytest.mark.slow
def test_trpo_reaches_the_optimum_with_other_policies(
    model: str, settings: dict[str, Any], make_model: Callable[..., Any], make_tokenizer: Callable[..., Any]
) -> None:
    options = {"length": 1, "beta": 0.5, "seed": 1, "model": model, **settings}
    outcome = optimum_runs.train("trpo", make_model, make_tokenizer(optimum.WORDS), **options)
    before, after = outcome.distances
    assert before > 2 * optimum.BOUNDS[1]
    assert after <= optimum.BOUNDS[1]
