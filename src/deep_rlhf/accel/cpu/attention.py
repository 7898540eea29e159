"""Attention in bfloat16 on a CPU where PyTorch's fused kernel is slow: for single tokens, and in backward passes."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

LONGEST = 256  # keys: beyond, the probabilities that a backward pass needs take too much memory
FEW = 8  # queries


def fast_attention(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[Any]:
    """`FastAttention` for models that can gain by it; for others nothing, since it looks at every call of PyTorch's."""
    return FastAttention() if dtype == torch.bfloat16 and device.type == "cpu" else nullcontext()


class FastAttention(TorchFunctionMode):
    """Within, models that compute in bfloat16 on a CPU attend by matrix products where that is faster."""

    def __torch_function__(self, func: Any, types: Iterable[type], args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention and _is_slow(*args, **kwargs):
            return _attend(*args, **kwargs)
        return func(*args, **kwargs)


def _is_slow(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    *_: Any,
    **options: Any,
) -> bool:
    """Whether PyTorch's fused kernel is slow for this call: it took 2 to 3 times as long (docs/speed.md)."""
    return (
        query.device.type == "cpu"
        and query.dtype == torch.bfloat16
        and query.dim() == key.dim() == 4
        and query.shape[1] == key.shape[1]  # heads
        and dropout_p == 0.0
        and not (attn_mask is not None and attn_mask.requires_grad)  # positions that are learned, as T5's
        and (key.shape[2] <= LONGEST if query.requires_grad else query.shape[2] <= FEW)
    )


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """As scaled_dot_product_attention: [n, heads, L, D], [n, heads, S, D], [n, heads, S, E] -> [n, heads, L, E]."""
    if is_causal:
        attn_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return _Attention.apply(query, key, value, attn_mask, scale)


class _Attention(torch.autograd.Function):
    """Scores and softmax in float32, as in the fused kernel; the probabilities are rounded."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        scores = (query.float() * scale) @ key.float().transpose(-1, -2)
        if mask is not None and mask.dtype == torch.bool:
            scores.masked_fill_(~mask, torch.finfo(scores.dtype).min)
        elif mask is not None:
            scores += mask
        probabilities = scores.softmax(-1).to(value.dtype)
        ctx.save_for_backward(query, key, value, probabilities)
        ctx.scale = scale
        return probabilities @ value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, probabilities = ctx.saved_tensors
        of_value = probabilities.transpose(-1, -2) @ gradient
        of_probabilities = (gradient @ value.transpose(-1, -2)).float()
        of_scores = torch._softmax_backward_data(of_probabilities, probabilities.float(), -1, torch.float32)
        of_scores = of_scores.mul_(ctx.scale).to(query.dtype)
        return of_scores @ key, of_scores.transpose(-1, -2) @ query, of_value, None, None
