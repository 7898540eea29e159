"""Deep RLHF: from people's preferences to a tuned language model.

Everything that a script needs is imported from here; `import deep_rlhf` itself loads neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from deep_rlhf.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    ModelError,
    NotFiniteError,
    ResourceError,
    RewardError,
    StoreError,
    UserError,
)
from deep_rlhf.extras import optional_packages

if TYPE_CHECKING:
    from deep_rlhf.algorithms.best_of_n import BestOfN
    from deep_rlhf.algorithms.grpo import GRPOConfig, GRPOTrainer
    from deep_rlhf.algorithms.ppo import PPOConfig, PPOTrainer
    from deep_rlhf.algorithms.reinforce_plus_plus import ReinforcePlusPlusConfig, ReinforcePlusPlusTrainer
    from deep_rlhf.algorithms.rloo import RLOOConfig, RLOOTrainer
    from deep_rlhf.algorithms.supervised.dpo import DPOConfig, DPOTrainer, train_dpo
    from deep_rlhf.algorithms.supervised.reward import RewardConfig, RewardTrainer, train_reward_model
    from deep_rlhf.algorithms.supervised.sft import SFTConfig, train_sft
    from deep_rlhf.algorithms.trpo import TRPOConfig, TRPOTrainer
    from deep_rlhf.data.preferences import load_preferences
    from deep_rlhf.data.prompts import load_prompts
    from deep_rlhf.feedback.loop.config import SessionConfig
    from deep_rlhf.feedback.loop.session import Session
    from deep_rlhf.feedback.store import Store
    from deep_rlhf.models.reward import RewardModel
    from deep_rlhf.types import Preference

__version__ = "0.1.0"

__all__ = [
    "BestOfN",
    "CheckpointError",
    "ConfigError",
    "DPOConfig",
    "DPOTrainer",
    "DataError",
    "GRPOConfig",
    "GRPOTrainer",
    "ModelError",
    "NotFiniteError",
    "PPOConfig",
    "PPOTrainer",
    "Preference",
    "RLOOConfig",
    "RLOOTrainer",
    "ReinforcePlusPlusConfig",
    "ReinforcePlusPlusTrainer",
    "ResourceError",
    "RewardConfig",
    "RewardError",
    "RewardModel",
    "RewardTrainer",
    "SFTConfig",
    "Session",
    "SessionConfig",
    "Store",
    "StoreError",
    "TRPOConfig",
    "TRPOTrainer",
    "UserError",
    "load_preferences",
    "load_prompts",
    "train_dpo",
    "train_reward_model",
    "train_sft",
]

# The modules of the names above, for a running program: a name is imported when it is first used.
_MODULES = {
    "algorithms.best_of_n": ("BestOfN",),
    "algorithms.grpo": ("GRPOConfig", "GRPOTrainer"),
    "algorithms.ppo": ("PPOConfig", "PPOTrainer"),
    "algorithms.reinforce_plus_plus": ("ReinforcePlusPlusConfig", "ReinforcePlusPlusTrainer"),
    "algorithms.rloo": ("RLOOConfig", "RLOOTrainer"),
    "algorithms.supervised.dpo": ("DPOConfig", "DPOTrainer", "train_dpo"),
    "algorithms.supervised.reward": ("RewardConfig", "RewardTrainer", "train_reward_model"),
    "algorithms.supervised.sft": ("SFTConfig", "train_sft"),
    "algorithms.trpo": ("TRPOConfig", "TRPOTrainer"),
    "data.preferences": ("load_preferences",),
    "data.prompts": ("load_prompts",),
    "feedback.loop.config": ("SessionConfig",),
    "feedback.loop.session": ("Session",),
    "feedback.store": ("Store",),
    "models.reward": ("RewardModel",),
    "types": ("Preference",),
}
_HOMES = {name: f"deep_rlhf.{module}" for module, names in _MODULES.items() for name in names}

if not TYPE_CHECKING:  # type checkers would take every unknown name for Any

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module 'deep_rlhf' has no attribute {name!r}")
        with optional_packages(f"deep_rlhf.{name}"):
            return getattr(import_module(_HOMES[name]), name)
