"""Number formats: which dtype a model computes in, and casting its weights to it."""

import copy
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

M = TypeVar("M", bound=nn.Module)

Precision = Literal["auto", "fp32", "bf16"]

BF16_WIDTH = 256  # hidden size from which bf16 was measured to be faster


def compute_dtype(precision: Precision, has_bf16: bool, width: int) -> torch.dtype:
    """The dtype that a model of hidden size `width` computes in; "auto" is bf16 for wide models on bf16 hardware."""
    if precision == "auto":
        precision = "bf16" if has_bf16 and width >= BF16_WIDTH else "fp32"
    return torch.bfloat16 if precision == "bf16" else torch.float32


def hidden_width(model: Any) -> int:
    """The hidden size of a transformers model or a peft.PeftModel around one; 0 if its configuration has none."""
    return getattr(model.config, "hidden_size", 0)


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the device has matrix instructions for bfloat16 and does not emulate them."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


def cast_weights(module: nn.Module, dtype: torch.dtype, *, frozen_only: bool = False) -> None:
    """Casts floating-point parameters in place, but no buffers: rotary frequencies need float32 at far positions."""
    for parameter in module.parameters():
        if parameter.is_floating_point() and not (frozen_only and parameter.requires_grad):
            parameter.data = parameter.data.to(dtype)


def cast_around_embeddings(model: Any, dtype: torch.dtype) -> list[RemovableHandle]:
    """Casts a model's weights in place, except trained token embeddings, whose gradient sums over many tokens.

    The embedded tokens are cast instead, by forward hooks; returns the handles that remove them.
    """
    weight = model.get_input_embeddings().weight
    embeddings = weight.data
    cast_weights(model, dtype)
    if dtype == torch.float32 or not weight.requires_grad:
        return []
    weight.data = embeddings.clone()  # the original may keep a memory-mapped file of all weights open
    readers = [module for module in model.modules() if isinstance(module, nn.Embedding) and module.weight is weight]
    return [reader.register_forward_hook(lambda _, __, embedded: embedded.to(dtype)) for reader in readers]


def frozen_copy(module: M, dtype: torch.dtype, device: torch.device) -> M:
    """A frozen copy on `device`, its parameters in `dtype`, made without an intermediate copy."""
    memo = {
        id(parameter): nn.Parameter(parameter.detach().to(device, dtype, copy=True), requires_grad=False)
        for parameter in module.parameters()
    }
    return copy.deepcopy(module, memo).to(device)
