"""Statistics over the real tokens of padded tensors. Masked-out entries may hold anything, NaN included."""

import torch
from torch import Tensor


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum of `values` [any shape] where `mask` (same shape, bool) is True, as a scalar."""
    return torch.where(mask, values, torch.zeros_like(values)).sum()


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the True entries of `mask`; 0 if there are none."""
    return masked_sum(values, mask) / mask.sum().clamp(min=1)


def masked_var(values: Tensor, mask: Tensor) -> Tensor:
    """Unbiased variance over the True entries of `mask`; 0 for fewer than two."""
    squared = (values - masked_mean(values, mask)) ** 2
    return masked_sum(squared, mask) / (mask.sum() - 1).clamp(min=1)


def whiten(values: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    """(x − mean) / √(var + 1e-8) over the True entries; the mean is added back when `shift_mean` is False.

    Ziegler et al. 2019 whiten rewards with `shift_mean=False` and advantages with True. Masked-out entries become 0.
    """
    mean, var = masked_mean(values, mask), masked_var(values, mask)
    whitened = (values - mean) * torch.rsqrt(var + 1e-8)
    if not shift_mean:
        whitened = whitened + mean
    return torch.where(mask, whitened, torch.zeros_like(whitened))


def sequence_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the sequences of `values` [N, R] of each one's token mean; sequences without a token do not count."""
    values = torch.where(mask, values, torch.zeros_like(values))
    tokens = mask.sum(1)
    means = values.sum(1) / tokens.clamp(min=1)
    return means.sum() / (tokens > 0).sum().clamp(min=1)
