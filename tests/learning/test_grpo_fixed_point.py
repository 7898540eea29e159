"""GRPO with the KL in its loss, as it was published, ends at another optimum than π₀ exp(r/β), which is known too."""

from collections.abc import Callable
from typing import Any

import optimum
import optimum_runs
import pytest
from grids import slow_but


@pytest.mark.parametrize("scale_rewards", [True, False])
@pytest.mark.parametrize("beta", slow_but([0.5], optimum.SCALES))
def test_grpo_with_the_kl_in_its_loss_ends_at_the_optimum_of_the_forward_kl(
    beta: float, scale_rewards: bool, make_model: Callable[..., Any], make_tokenizer: Callable[..., Any]
) -> None:
    """That of E[r] − β KL(π₀ ‖ π), or βσ in place of β if rewards are divided by their standard deviation σ."""
    in_loss = {"kl_in_loss": True, "kl_penalty": "k3", "scale_rewards": scale_rewards}
    tokenizer = make_tokenizer(optimum.WORDS)
    outcome = optimum_runs.train("grpo", make_model, tokenizer, length=1, beta=beta, seed=1, updates=25, **in_loss)
    best, policy = outcome.best, outcome.trainer.policy
    log_reference = best.log_policy(optimum.reference_model(make_model, "gpt2", 1))
    expected = optimum.grpo_fixed_point(log_reference, best.log_optimum, beta, scale_rewards=scale_rewards)
    log_policy = best.log_policy(policy)
    reached = float((log_policy.exp() * (log_policy - expected)).sum())
    assert reached <= optimum.BOUNDS[1] / 2
    assert best.distance(policy) > 5 * reached
