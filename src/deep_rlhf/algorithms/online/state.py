"""Training state as nested dicts of tensors: reads, restores and copies it."""

from typing import Any

import torch
from torch import Tensor, nn


def trainable_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The trainable weights of a module by name; they share memory with the module."""
    return {name: parameter.detach() for name, parameter in module.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def load_tensors(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copies the tensors from `trainable_tensors` back into the module."""
    parameters = dict(module.named_parameters())
    for name, tensor in tensors.items():
        parameters[name].copy_(tensor)


def copied(value: Any) -> Any:
    """A deep copy of nested dicts, lists and tuples, with every tensor in main memory."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {name: copied(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(copied(item) for item in value)
    return value
