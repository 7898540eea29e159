"""bfloat16 attention on a CPU where PyTorch's fused kernel is slow: for single tokens and in backward passes."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from deep_rlhf.accel.cpu.switch import has_fast_attention

MAX_KEYS = 256  # with more, the probabilities kept for the backward pass take too much memory
MAX_QUERIES = 8  # without gradients; with more, the fused kernel is faster


def fast_attention(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[Any]:
    """`FastAttention` for bfloat16 on a CPU, else a context without effect: the mode intercepts every PyTorch call."""
    useful = dtype == torch.bfloat16 and device.type == "cpu" and has_fast_attention()
    return FastAttention() if useful else nullcontext()


class FastAttention(TorchFunctionMode):
    """Computes bfloat16 attention on a CPU by matrix products where that is faster, until the context ends."""

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
        and not (attn_mask is not None and attn_mask.requires_grad)  # learned positions, as in T5
        and (key.shape[2] <= MAX_KEYS if query.requires_grad else query.shape[2] <= MAX_QUERIES)
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
    """scaled_dot_product_attention of [n, heads, L, D], [n, heads, S, D], [n, heads, S, E] -> [n, heads, L, E]."""
    if is_causal:
        attn_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return _Attention.apply(query, key, value, attn_mask, scale)


class _Attention(torch.autograd.Function):
    """Scores and softmax in float32, as in the fused kernel; the probabilities are rounded to the inputs' dtype."""

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
        value_grad = probabilities.transpose(-1, -2) @ gradient
        probabilities_grad = (gradient @ value.transpose(-1, -2)).float()
        scores_grad = torch._softmax_backward_data(probabilities_grad, probabilities.float(), -1, torch.float32)
        scores_grad = scores_grad.mul_(ctx.scale).to(query.dtype)
        return scores_grad @ key, scores_grad.transpose(-1, -2) @ query, value_grad, None, None
