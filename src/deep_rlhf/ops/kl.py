"""KL divergence between policy and reference, and the adaptive KL coefficient."""

from typing import Literal

import torch
from torch import Tensor

KLPenalty = Literal["kl", "abs", "mse", "full", "k1", "k2", "k3"]


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: KLPenalty = "kl") -> Tensor:
    """Estimates KL(policy ‖ reference) per token from samples of the policy; any shape, nats.

    With d = log π − log π_ref: `kl` or `k1` d, `abs` |d|, `mse` or `k2` ½d², `k3` e^−d − 1 + d (Schulman 2020,
    "Approximating KL divergence"). k1 is unbiased and may be negative; k3 is unbiased and never is. Raises ValueError
    for `full`, which `kl_full` computes from whole distributions.
    """
    difference = logprobs - ref_logprobs
    if kind in ("kl", "k1"):
        return difference
    if kind == "abs":
        return difference.abs()
    if kind in ("mse", "k2"):
        return 0.5 * difference**2
    if kind == "k3":
        return torch.exp(-difference) - 1 + difference
    if kind == "full":
        raise ValueError("the full KL is no estimate from samples: kl_full computes it from whole distributions")
    raise ValueError(f"unknown KL estimator {kind!r}: choose kl (k1), abs, mse (k2) or k3")


def kl_full(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Exact KL(policy ‖ reference) = Σ_v π(v) (log π(v) − log π_ref(v)), [..., V] -> [...] in nats.

    Both arguments are log-probabilities of the whole vocabulary. A token of probability 0 under the policy (−inf)
    contributes 0.
    """
    probabilities = logprobs.exp()
    # −inf − (−inf) would be NaN
    difference = torch.where(probabilities > 0, logprobs - ref_logprobs, torch.zeros_like(logprobs))
    return (probabilities * difference).sum(-1)


def adapted_kl_coef(coef: float, kl: float, *, target: float, horizon: float, samples: int) -> float:
    """The next KL coefficient: β ← β (1 + clip(KL/target − 1, ±0.2) · n/horizon) (Ziegler et al. 2019, §2.2).

    kl and target are in nats per response; n = `samples` responses were drawn since the last change.
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return coef * (1.0 + error * samples / horizon)
