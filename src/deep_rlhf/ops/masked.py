"""Statistics over the real tokens of padded tensors; other entries may hold anything, even NaN.

`mask` is bool, True for real tokens, and has the shape of `values`.
"""

import torch
from torch import Tensor


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum of `values` [any shape] where `mask` is True, as a scalar."""
    return torch.where(mask, values, torch.zeros_like(values)).sum()


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values` where `mask` is True, as a scalar; 0 if that is nowhere."""
    return masked_sum(values, mask) / mask.sum().clamp(min=1)


def masked_var(values: Tensor, mask: Tensor) -> Tensor:
    """Unbiased variance of `values` where `mask` is True, as a scalar; 0 for fewer than two entries."""
    squared = (values - masked_mean(values, mask)) ** 2
    return masked_sum(squared, mask) / (mask.sum() - 1).clamp(min=1)


def whiten(values: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    """(x − mean) / √(var + 1e-8) where `mask` is True, 0 elsewhere; with shift_mean=False the mean is added back.

    Ziegler et al. 2019 whiten rewards with shift_mean=False and advantages with True.
    """
    mean, var = masked_mean(values, mask), masked_var(values, mask)
    whitened = (values - mean) * torch.rsqrt(var + 1e-8)
    if not shift_mean:
        whitened = whitened + mean
    return torch.where(mask, whitened, torch.zeros_like(whitened))


def sequence_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over sequences of the mean over each one's real tokens; values, mask [N, R] -> scalar.

    Sequences without a real token are left out.
    """
    values = torch.where(mask, values, torch.zeros_like(values))
    tokens = mask.sum(1)
    means = values.sum(1) / tokens.clamp(min=1)
    return means.sum() / (tokens > 0).sum().clamp(min=1)
