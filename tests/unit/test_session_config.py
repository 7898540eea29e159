"""The settings of a session: what cannot work is refused in one sentence."""

from typing import Any

import pytest

from deep_rlhf.errors import ConfigError
from deep_rlhf.feedback.loop.config import SessionConfig

REFUSED: dict[str, dict[str, Any]] = {
    "choose_by": {"choose_by": "guess"},
    "mode": {"mode": "sometimes"},
    "random_share": {"random_share": 1.5},
    "at most 0.5": {"win_rate_share": 0.3, "repeat_share": 0.3},
    "initial_labels": {"initial_labels": 0},
    "label_decay": {"label_decay": 0.0},
    "learning_rate": {"learning_rate": -1.0},
    "init_kl_coef": {"init_kl_coef": -0.1},
    "ranked_responses": {"ranked_responses": 10},
    "samples_per_prompt": {"samples_per_prompt": 3, "ranked_responses": 4},
    "labels=10": {"labels": 10},
    "mini_batch_size": {"mini_batch_size": 128},
    "held_out_members": {"held_out_members": 1},
    "needs labels": {"mode": "batched"},
    "template": {"template": "poem"},
    "alarm": {"alarms": ["kl=high"]},
    "seed": {"seed": -1},
}


@pytest.mark.parametrize(("told", "settings"), REFUSED.items(), ids=REFUSED)
def test_impossible_settings_are_refused(told: str, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=told):
        SessionConfig(**settings)


def test_the_defaults_work() -> None:
    config = SessionConfig()
    assert config.limits.kl.limit == 30
    assert SessionConfig(alarms=["kl=5:roll_back"]).limits.kl.action == "roll_back"


def test_a_small_policy_learns_faster_unless_it_is_told_how_fast() -> None:
    assert SessionConfig().learning_rates(1_000_000) == (3e-4, 5e-4)
    assert SessionConfig().learning_rates(100_000_000) == (1e-5, 1e-5)
    assert SessionConfig(learning_rate=0.1).learning_rates(100_000_000) == (0.1, 1e-5)
