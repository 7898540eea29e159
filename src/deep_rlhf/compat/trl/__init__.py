"""The interface of TRL 0.7–0.11's PPO over this project's: a script runs after `trl` became `deep_rlhf.compat.trl`.

Names, argument order, defaults and the keys of what is returned are TRL's; what happens inside is `algorithms.ppo`.
"""

from deep_rlhf.compat.trl.core import LengthSampler, respond_to_batch, set_seed
from deep_rlhf.compat.trl.models import (
    AutoModelForCausalLMWithValueHead,
    AutoModelForSeq2SeqLMWithValueHead,
    create_reference_model,
)
from deep_rlhf.compat.trl.trainer import AdaptiveKLController, FixedKLController, PPOConfig, PPOTrainer

__all__ = [
    "AdaptiveKLController",
    "AutoModelForCausalLMWithValueHead",
    "AutoModelForSeq2SeqLMWithValueHead",
    "FixedKLController",
    "LengthSampler",
    "PPOConfig",
    "PPOTrainer",
    "create_reference_model",
    "respond_to_batch",
    "set_seed",
]
