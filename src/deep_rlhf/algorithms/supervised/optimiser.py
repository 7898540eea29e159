"""Optimiser and learning-rate schedule from the flags of transformers.TrainingArguments."""

import copy
import re
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments, get_scheduler

from deep_rlhf.errors import ConfigError, ResourceError, one_line

# Biases and the weights of normalisation layers are not decayed.
_NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)", re.IGNORECASE)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters with and without weight decay."""
    of_layer_norms = {
        parameter for module in model.modules() if isinstance(module, nn.LayerNorm) for parameter in module.parameters()
    }
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (others if parameter in of_layer_norms or _NO_DECAY.search(name) else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def make_optimizer(
    model: nn.Module, config: TrainingArguments, kind: type[torch.optim.Optimizer] | None = None
) -> torch.optim.Optimizer:
    """The optimiser that `--optim` names; `kind` takes its place, with the same learning rate, betas and epsilon.

    Raises ConfigError for an optimiser that needs another loop than ours, and ResourceError if its package is missing.
    """
    name = getattr(config.optim, "value", config.optim)
    try:
        found, options = Trainer.get_optimizer_cls_and_kwargs(config, model)
    except (ImportError, ValueError, TypeError, KeyError) as error:
        kind_of_error = ConfigError if config.optim_args else ResourceError
        raise kind_of_error(f"--optim={name} cannot be used here: {one_line(error)}") from error
    if config.optim_args and options == _options_without_arguments(model, config):
        raise ConfigError(f"--optim_args={config.optim_args} has no effect with --optim={name}: leave it out.")
    ordinary = isinstance(found, type) and issubclass(found, torch.optim.Optimizer)
    if not ordinary or options.keys() & {"params", "model", "optimizer_dict"} or hasattr(found, "train"):
        raise ConfigError(f"--optim={name} is not supported by this project's training loop: choose adamw_torch.")
    if kind is not None:
        found = kind
        options.pop("fused", None)
    try:
        optimizer = found(parameter_groups(model, config.weight_decay), **options)
    except (ImportError, ValueError, TypeError, RuntimeError) as error:
        kind_of_error = ConfigError if config.optim_args else ResourceError
        raise kind_of_error(f"--optim={name} cannot be used here: {one_line(error)}") from error
    if "bitsandbytes" in found.__module__ and options.get("optim_bits") == 8:
        _keep_embeddings_in_32_bits(model)
    return optimizer


def _options_without_arguments(model: nn.Module, config: TrainingArguments) -> dict[str, Any]:
    """The optimiser's options as if `--optim_args` were not given."""
    without = copy.copy(config)
    without.optim_args = None
    return Trainer.get_optimizer_cls_and_kwargs(without, model)[1]


def make_scheduler(
    optimizer: torch.optim.Optimizer, config: TrainingArguments, max_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The schedule of the learning rate over `max_steps` updates, warm-up included.

    Raises ConfigError if it refuses `--lr_scheduler_kwargs`, or needs some that are not given.
    """
    try:
        return get_scheduler(
            config.lr_scheduler_type,
            optimizer=optimizer,
            num_warmup_steps=config.get_warmup_steps(max_steps),
            num_training_steps=max_steps,
            scheduler_specific_kwargs=config.lr_scheduler_kwargs,
        )
    except (ValueError, TypeError, ArithmeticError) as error:
        name = getattr(config.lr_scheduler_type, "value", config.lr_scheduler_type)
        raise ConfigError(
            f"--lr_scheduler_type={name} cannot be used with --lr_scheduler_kwargs={config.lr_scheduler_kwargs}:"
            f" {one_line(error)}"
        ) from error


def _keep_embeddings_in_32_bits(model: nn.Module) -> None:
    """Moments of embeddings stay in float32, since bitsandbytes found training unstable otherwise."""
    import bitsandbytes

    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})
