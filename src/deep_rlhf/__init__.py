"""Deep RLHF: from people's preferences to a tuned language model."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Looked up when first used, so that `import deep_rlhf` costs nothing.
_HOMES = {
    "BestOfN": "deep_rlhf.algorithms.best_of_n",
    "DPOConfig": "deep_rlhf.algorithms.supervised.dpo",
    "DPOTrainer": "deep_rlhf.algorithms.supervised.dpo",
    "GRPOConfig": "deep_rlhf.algorithms.grpo",
    "GRPOTrainer": "deep_rlhf.algorithms.grpo",
    "PPOConfig": "deep_rlhf.algorithms.ppo_config",
    "PPOTrainer": "deep_rlhf.algorithms.ppo",
    "RLOOConfig": "deep_rlhf.algorithms.rloo",
    "RLOOTrainer": "deep_rlhf.algorithms.rloo",
    "ReinforcePlusPlusConfig": "deep_rlhf.algorithms.reinforce_plus_plus",
    "ReinforcePlusPlusTrainer": "deep_rlhf.algorithms.reinforce_plus_plus",
    "TRPOConfig": "deep_rlhf.algorithms.trpo",
    "TRPOTrainer": "deep_rlhf.algorithms.trpo",
    "RewardConfig": "deep_rlhf.algorithms.supervised.reward",
    "RewardTrainer": "deep_rlhf.algorithms.supervised.reward",
    "RewardModel": "deep_rlhf.models.reward",
    "Preference": "deep_rlhf.types",
    "UserError": "deep_rlhf.errors",
    "load_preferences": "deep_rlhf.data.preferences",
    "load_prompts": "deep_rlhf.data.prompts",
}
__all__ = [
    "BestOfN",
    "DPOConfig",
    "DPOTrainer",
    "GRPOConfig",
    "GRPOTrainer",
    "PPOConfig",
    "PPOTrainer",
    "Preference",
    "RLOOConfig",
    "RLOOTrainer",
    "ReinforcePlusPlusConfig",
    "ReinforcePlusPlusTrainer",
    "RewardConfig",
    "RewardModel",
    "RewardTrainer",
    "TRPOConfig",
    "TRPOTrainer",
    "UserError",
    "load_preferences",
    "load_prompts",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'deep_rlhf' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
