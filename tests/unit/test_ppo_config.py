"""The settings of PPO: every value that cannot work is refused in one sentence, and importing them costs nothing."""

import dataclasses
import subprocess
import sys
from typing import Any

import pytest

from deep_rlhf import PPOConfig, UserError

GREATER_THAN_0 = [
    *("max_prompt_length", "max_new_tokens", "temperature", "batch_size", "ppo_epochs", "learning_rate", "score_clip"),
    *("max_grad_norm", "target", "horizon", "cliprange", "cliprange_value", "lora_r", "lora_alpha", "target_kl"),
    *("reward_timeout", "missing_eos_penalty"),
]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        *(({name: 0}, f"{name} must be a number greater than 0, not 0.") for name in GREATER_THAN_0),
        *(({name: -1}, f"{name} must be a number greater than 0, not -1.") for name in GREATER_THAN_0),
        ({"learning_rate": float("nan")}, "learning_rate must be a number greater than 0, not nan."),
        ({"steps": 0}, "steps must be 1 or more, not 0."),
        ({"mini_batch_size": -2}, "mini_batch_size must be 1 or more, not -2."),
        ({"gamma": 1.01}, "gamma must lie between 0 and 1, not 1.01."),
        ({"lam": -0.1}, "lam must lie between 0 and 1, not -0.1."),
        ({"init_kl_coef": -0.1}, "init_kl_coef must be 0 or more, not -0.1."),
        ({"vf_coef": -1}, "vf_coef must be 0 or more, not -1."),
    ],
)
def test_a_value_that_cannot_work_is_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as refused:
        PPOConfig(**settings)
    assert str(refused.value) == sentence


def test_borders_that_work() -> None:
    PPOConfig(gamma=0, lam=1, init_kl_coef=0, vf_coef=0, steps=1, mini_batch_size=1, batch_size=1)


def test_settings_are_frozen_and_each_has_its_help() -> None:
    config = PPOConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1  # type: ignore[misc]
    assert all(field.metadata.get("help") for field in dataclasses.fields(config))


def test_the_original_command_means_what_it_meant() -> None:
    """The defaults that the published program relied on (TRL 0.7's PPOConfig)."""
    config = PPOConfig()
    published = {
        **{"learning_rate": 1.41e-5, "ppo_epochs": 4, "batch_size": 128, "gamma": 1, "lam": 0.95, "vf_coef": 0.1},
        **{"adap_kl_ctrl": True, "init_kl_coef": 0.2, "kl_penalty": "kl", "target": 6, "horizon": 10_000},
        **{"cliprange": 0.2, "cliprange_value": 0.2, "whiten_rewards": False, "lora_alpha": 16, "lora_r": 16},
    }
    assert {name: getattr(config, name) for name in published} == published


def test_importing_the_package_imports_nothing_heavy() -> None:
    program = "import sys, deep_rlhf; print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert finished.stdout.strip() == "[]"
