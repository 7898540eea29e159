"""The memory plan of reward-model training: runs its own code on a model without weights, and counts.

Every text is assumed to have `max_length` tokens and no prefix in common with another, which gives an upper limit.
"""

from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from deep_rlhf.accel.cpu.gradients import gradients_in_place
from deep_rlhf.accel.cpu.kernels import use_fast_kernels
from deep_rlhf.algorithms.supervised.reward import with_adapters
from deep_rlhf.algorithms.supervised.reward_config import RewardConfig
from deep_rlhf.algorithms.supervised.reward_trainer import TOKENS_AT_ONCE
from deep_rlhf.models.load import disable_dropout
from deep_rlhf.planning.memory_plan import (
    GRADIENT_BYTES,
    Machine,
    MemoryPlan,
    Phase,
    bytes_of,
    forward_bytes,
    meta_model,
    optimizer_bytes,
    training_bytes,
)
from deep_rlhf.runtime.precision import cast_around_embeddings


def plan_reward(
    config: RewardConfig, model_config: Any, machine: Machine, *, baseline: int, trust_remote_code: bool = False
) -> MemoryPlan:
    """Plans a run with a model of this transformers configuration.

    `baseline` are the bytes of the process before any model is loaded.
    """
    model_config.num_labels, model_config.use_cache = config.ensemble_size, False
    model = disable_dropout(
        meta_model(AutoModelForSequenceClassification, model_config, trust_remote_code=trust_remote_code)
    )
    again = bytes_of([model])
    dtype = machine.dtype(config.precision, model)
    use_fast_kernels(model)
    if config.use_peft:
        model = with_adapters(model, config)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(config.gradient_checkpointing_kwargs)
    cast_around_embeddings(model, dtype)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    held = {
        "Python, libraries": baseline,
        "model": bytes_of([model]),
        "optimiser": optimizer_bytes(trained, "adamw_8bit" if "8bit" in str(config.optim) else "adamw"),
    }
    gradients = GRADIENT_BYTES * sum(parameter.numel() for parameter in trained)
    tokens = TOKENS_AT_ONCE["cuda" if machine.is_gpu else "cpu"]
    longest = min(config.max_length, getattr(model_config, "max_position_embeddings", None) or config.max_length)
    texts = 2 * max(1, min(tokens // (2 * longest), config.per_device_train_batch_size))

    def backward() -> None:
        ids = torch.zeros(texts, longest, dtype=torch.int64, device="meta")
        with gradients_in_place(model):
            model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.sum().backward()

    model.train()
    training = training_bytes(backward, trained)
    model.eval()
    evaluation = forward_bytes(model, max(1, tokens // longest), longest)
    phases = [
        Phase("training", held | {"gradients": gradients, "activations": training}),
        Phase("evaluation", held | {"activations": evaluation}),
    ]
    if config.load_best_model_at_end and not machine.is_gpu:
        phases.append(Phase("loading the best", held | {"model, read again": again}))
    return MemoryPlan(tuple(phases))
