"""Losses per token. The caller sums them over the mask and divides by the global number of real tokens."""

import torch
from torch import Tensor

from deep_rlhf.ops.masked import masked_var


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, cliprange: float, dual_clip: float | None = None
) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate, −min(ρA, clip(ρ, 1−ε, 1+ε)A) with ρ = π/π_old (Schulman et al. 2017, eq. 7).

    All tensors have the same shape; there is no mask. ε is `cliprange`. `dual_clip` c > 1 bounds the loss of negative
    advantages by −cA (Ye et al. 2020, eq. 5). Returns (loss, bool: clipped, so without a gradient), each per token.
    """
    ratio = torch.exp(logprobs - old_logprobs)
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - cliprange, 1.0 + cliprange)
    loss = torch.maximum(plain, clipped)
    took_effect = clipped > plain
    if dual_clip is not None:
        bounded = (advantages < 0) & (ratio > dual_clip)
        loss, took_effect = torch.where(bounded, -advantages * dual_clip, loss), took_effect | bounded
    return loss, took_effect


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, *, cliprange_value: float) -> tuple[Tensor, Tensor]:
    """½ max((V − R)², (clip(V, V_old ± ε) − R)²) per token (Ziegler et al. 2019 code; Huang et al. 2024, detail 6).

    All tensors have the same shape; there is no mask. ε is `cliprange_value`. Returns (loss, bool: the clipped term is
    the larger), each per token.
    """
    clipped_values = values.clamp(old_values - cliprange_value, old_values + cliprange_value)
    plain, clipped = (values - returns) ** 2, (clipped_values - returns) ** 2
    return 0.5 * torch.maximum(plain, clipped), clipped > plain


def truncated_importance(logprobs: Tensor, sampler_logprobs: Tensor, cap: float) -> Tensor:
    """Truncated importance weights min(π/μ, cap) per token, all of the same shape, without gradient.

    They correct a policy gradient for samples drawn by μ. The sampler μ and the trainer π are the same weights in two
    implementations, whose log-probabilities differ by rounding; `logprobs` are the trainer's before the update (Yao et
    al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training").
    """
    return torch.exp(logprobs - sampler_logprobs).clamp(max=cap).detach()


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 − Var(R − V)/Var(R) over the tokens where `mask` is True, all [N, R], as a scalar.

    It is 1 for a perfect critic, 0 for one that predicts the mean, and 0 if the returns are constant.
    """
    variance = masked_var(returns, mask)
    return torch.where(variance > 0, 1.0 - masked_var(returns - values, mask) / variance, variance)
