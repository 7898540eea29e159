"""Deep RLHF: from people's preferences to a tuned language model."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Looked up when first used, so that `import deep_rlhf` costs nothing.
_HOMES = {
    "PPOConfig": "deep_rlhf.algorithms.ppo_config",
    "PPOTrainer": "deep_rlhf.algorithms.ppo",
    "RewardConfig": "deep_rlhf.algorithms.reward",
    "RewardTrainer": "deep_rlhf.algorithms.reward",
    "RewardModel": "deep_rlhf.models.reward",
    "Preference": "deep_rlhf.types",
    "UserError": "deep_rlhf.types",
    "load_preferences": "deep_rlhf.data.preferences",
    "load_prompts": "deep_rlhf.data.prompts",
}
__all__ = [
    "PPOConfig",
    "PPOTrainer",
    "Preference",
    "RewardConfig",
    "RewardModel",
    "RewardTrainer",
    "UserError",
    "load_preferences",
    "load_prompts",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'deep_rlhf' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
