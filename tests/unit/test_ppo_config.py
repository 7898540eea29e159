"""The settings of PPO: every value that cannot work is refused in one sentence, and importing them costs nothing."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from deep_rlhf import PPOConfig
from deep_rlhf.cli.flags import parse_flags
from deep_rlhf.errors import ConfigError

GREATER_THAN_0 = [
    *("temperature", "learning_rate", "score_clip", "max_grad_norm", "target", "horizon", "cliprange", "target_kl"),
    *("cliprange_value", "lora_alpha", "reward_timeout", "missing_eos_penalty"),
]
AT_LEAST_1 = [
    *("max_prompt_length", "max_new_tokens", "batch_size", "ppo_epochs", "lora_r", "steps", "mini_batch_size"),
    *("gradient_accumulation_steps", "forward_batch_size", "dataset_num_proc", "save_freq", "max_bad_batches"),
    *("compare_steps",),
]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        *(({name: 0}, f"{name} must be greater than 0, not 0.") for name in GREATER_THAN_0),
        *(({name: -1}, f"{name} must be greater than 0, not -1.") for name in GREATER_THAN_0),
        *(({name: 0}, f"{name} must be at least 1, not 0.") for name in AT_LEAST_1),
        *(({name: -2}, f"{name} must be at least 1, not -2.") for name in AT_LEAST_1),
        ({"learning_rate": float("nan")}, "learning_rate must be greater than 0 and finite, not nan."),
        ({"gamma": 1.01}, "gamma must be at least 0 and at most 1, not 1.01."),
        ({"lam": -0.1}, "lam must be at least 0 and at most 1, not -0.1."),
        ({"init_kl_coef": -0.1}, "init_kl_coef must be at least 0, not -0.1."),
        ({"vf_coef": -1}, "vf_coef must be at least 0, not -1."),
    ],
)
def test_a_value_out_of_bounds_is_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as refused:
        PPOConfig(**settings)
    assert str(refused.value) == sentence


def test_values_at_the_bounds_are_accepted() -> None:
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


def test_a_configuration_of_trl_is_understood(tmp_path: Path) -> None:
    """Every option of classic PPO by its old name, from a file."""
    old = {
        **{"steps": 20_000, "learning_rate": 1.41e-5, "adap_kl_ctrl": True, "init_kl_coef": 0.2, "kl_penalty": "full"},
        **{"target": 6, "horizon": 10_000, "gamma": 1, "lam": 0.95, "cliprange": 0.2, "cliprange_value": 0.2},
        **{"vf_coef": 0.1, "batch_size": 128, "mini_batch_size": 16, "gradient_accumulation_steps": 8, "ppo_epochs": 4},
        **{"max_grad_norm": 0.5, "early_stopping": True, "target_kl": 1, "ratio_threshold": 10.0, "score_clip": 5.0},
        **{"use_score_scaling": True, "use_score_norm": True, "whiten_rewards": True, "gradient_checkpointing": True},
        **{"forward_batch_size": 16, "compare_steps": 5, "tracker_project_name": "trl", "dataset_num_proc": 2},
        **{"tracker_kwargs": {"wandb": {"tags": ["old"]}}, "project_kwargs": {"logging_dir": "logs"}},
        **{"accelerator_kwargs": {"cpu": True}, "push_to_hub_if_best_kwargs": {"repo_id": "me/best"}},
    }
    path = tmp_path / "old.yaml"
    path.write_text(yaml.safe_dump(old))
    (config,) = parse_flags([f"--config={path}"], PPOConfig, prog="ppo.py", description="")
    assert {name: getattr(config, name) for name in old} == old


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"compare_steps": 2}, "compare_steps=2 does nothing without push_to_hub_if_best_kwargs"),
        ({"use_score_norm": True}, "use_score_norm does nothing without use_score_scaling"),
        ({"kl_in_loss": True}, "kl_in_loss needs kl_penalty=mse or k3"),
        ({"kl_in_loss": True, "kl_penalty": "full"}, "not full: use one of them"),
        ({"ensemble_reward": "uncertainty"}, "need each other"),
        ({"ensemble_std_coef": 1.0}, "need each other"),
        ({"push_to_hub_if_best_kwargs": {"private": True}}, "needs a repo_id"),
        ({"push_to_hub_if_best_kwargs": "me/best"}, "must be a mapping of names to values"),
        ({"batch_size": 8, "mini_batch_size": 16}, "is 16, more than the batch_size=8"),
        ({"gradient_accumulation_steps": 2}, "is 256, more than the batch_size=128"),
        ({"dual_clip": 1.1}, "dual_clip=1.1 must be larger than 1 + cliprange"),
        ({"dual_clip": 1.0}, "dual_clip must be greater than 1"),
        ({"importance_cap": 0.5}, "importance_cap must be at least 1"),
        ({"kl_penalty": "k4"}, "kl_penalty must be one of kl, abs, mse, full, k1, k2, k3, not k4"),
        ({"horizon": 20}, "can turn the KL coefficient to 0 and below"),
        ({"missing_eos_mode": "subtract"}, "does nothing without missing_eos_penalty"),
        ({"critic": "big"}, "critic must be one of shared, separate, reward, not big"),
        ({"missing_eos_mode": "add"}, "missing_eos_mode must be one of replace, subtract"),
        ({"save_freq": 0}, "save_freq must be at least 1"),
        ({"load_in_4bit": True}, "load_in_4bit needs use_peft"),
        ({"optimizer": "sgd"}, "optimizer must be one of adamw, adamw_8bit, not sgd"),
        ({"frozen_precision": "fp16"}, "frozen_precision must be one of auto, fp32, bf16, not fp16"),
        ({"frozen_device": "disk"}, "frozen_device must be one of auto, cpu, not disk"),
    ],
)
def test_options_that_contradict_each_other_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        PPOConfig(**settings)
    assert words in str(refused.value)


@pytest.mark.processes
def test_importing_the_package_imports_nothing_heavy() -> None:
    program = "import sys, deep_rlhf; print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert finished.stdout.strip() == "[]"
