"""The PPO interface of TRL 0.7–0.11 on top of `algorithms.ppo`: import `deep_rlhf.compat.trl` instead of `trl`.

Names, argument order, defaults and the keys of returned statistics are TRL's.
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
