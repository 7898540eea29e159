"""Losses per token. Who calls them sums over the mask and divides by the global number of real tokens."""

import torch
from torch import Tensor

from deep_rlhf.ops.masked import masked_var


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, cliprange: float, dual_clip: float | None = None
) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate, −min(ρA, clip(ρ, 1−ε, 1+ε)A) with ρ = π/π_old (Schulman et al. 2017, eq. 7).

    All [any one shape]. `dual_clip` c > 1 bounds the loss of negative advantages by −cA (Ye et al. 2020, eq. 5).
    Returns (loss per token, bool per token: clipping took effect, so the token has no gradient).
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

    All of one shape. Returns (loss, bool per token: the clipped term was the larger).
    """
    near = values.clamp(old_values - cliprange_value, old_values + cliprange_value)
    plain, clipped = (values - returns) ** 2, (near - returns) ** 2
    return 0.5 * torch.maximum(plain, clipped), clipped > plain


def reinforce_loss(logprobs: Tensor, advantages: Tensor) -> Tensor:
    """−A log π per token (Williams 1992), any one shape."""
    return -advantages * logprobs


def truncated_importance(logprobs: Tensor, sampler_logprobs: Tensor, cap: float) -> Tensor:
    """min(π/μ, cap) per token, any one shape: what a policy gradient is multiplied by when μ drew the samples.

    The sampler μ and the trainer π are the same weights in two implementations, whose log-probabilities differ by
    rounding; `logprobs` are the trainer's from before the update, so no gradient flows through the weight (Yao et al.
    2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training": truncated importance sampling).
    """
    return torch.exp(logprobs - sampler_logprobs).clamp(max=cap).detach()


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 − Var(R − V)/Var(R) over the mask: 1 for a perfect critic, 0 for the mean (and for constant returns)."""
    spread = masked_var(returns, mask)
    return torch.where(spread > 0, 1.0 - masked_var(returns - values, mask) / spread, spread)
