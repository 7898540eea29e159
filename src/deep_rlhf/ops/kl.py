"""How far the policy is from its reference, and how strongly that is punished."""

from typing import Literal

import torch
from torch import Tensor

KLPenalty = Literal["kl", "abs", "mse", "k3"]


def kl_estimate(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    kind: KLPenalty = "kl",
    *,
    input_clamp: float | None = None,
    output_clamp: float | None = None,
) -> Tensor:
    """Estimates KL(policy ‖ reference) per token from samples of the policy; any shape, nats.

    With d = log π − log π_ref: `kl` d (k1), `abs` |d|, `mse` ½d² (k2), `k3` e^−d − 1 + d (Schulman 2020,
    "Approximating KL divergence"). k1 is unbiased and may be negative; k3 is unbiased and never is. The clamps bound
    |d| and the result; a clamped entry has no gradient.
    """
    difference = logprobs - ref_logprobs
    if input_clamp is not None:
        difference = difference.clamp(-input_clamp, input_clamp)
    if kind == "kl":
        estimate = difference
    elif kind == "abs":
        estimate = difference.abs()
    elif kind == "mse":
        estimate = 0.5 * difference**2
    elif kind == "k3":
        estimate = torch.exp(-difference) - 1 + difference
    else:
        raise ValueError(f"unknown KL estimator {kind!r}: choose kl, abs, mse or k3")
    return estimate if output_clamp is None else estimate.clamp(-output_clamp, output_clamp)


def kl_full(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Exact KL(policy ‖ reference) from both full (finite) log-distributions [..., V] -> [...] in nats."""
    return (logprobs.exp() * (logprobs - ref_logprobs)).sum(-1)


def adapted_kl_coef(coef: float, kl: float, *, target: float, horizon: float, samples: int) -> float:
    """The next KL coefficient: β ← β (1 + clip(KL/target − 1, ±0.2) · n/horizon) (Ziegler et al. 2019, §2.2).

    kl and target in nats per answer; n samples were drawn since the last change.
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return coef * (1.0 + error * samples / horizon)
