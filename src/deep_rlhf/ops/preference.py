"""Preference models: losses of reward models and policies on pairs of responses, and bootstrap weights."""

import hashlib
import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

# P(count <= 0), P(count <= 1), … of a Poisson(1) variable; it exceeds 18 with a chance of 3e-18.
_POISSON_CDF = list(accumulate(math.exp(-1) / math.factorial(count) for count in range(19)))


def bradley_terry_loss(
    rewards_a: Tensor, rewards_b: Tensor, mu: Tensor, *, margin: Tensor | float = 0.0, label_noise: Tensor | float = 0.0
) -> Tensor:
    """Cross-entropy of P(a ≻ b) = σ(r_a − r_b) against mu, per pair; all of one shape (Christiano et al. 2017, eq. 1).

    mu is the probability that a is better: 1, 0, or ½ for a tie. With `margin` m ≥ 0 the preferred response must win by
    m: σ(r_w − r_l − m) (Touvron et al. 2023, eq. 2). With `label_noise` e, a share e of the labels is uniformly random:
    p' = (1 − e) p + e/2 (Christiano et al. 2017, §2.2.3, with 10 %), computed in log space. It may differ from pair to
    pair, 0…1: labels of less reliable annotators have smaller gradients.
    """
    difference = rewards_a - rewards_b

    def log_probability(advantage: Tensor) -> Tensor:
        clean = logsigmoid(advantage)
        if isinstance(label_noise, Tensor):
            return torch.logaddexp(torch.log1p(-label_noise) + clean, torch.log(label_noise / 2))
        if label_noise == 0.0:
            return clean
        return torch.logaddexp(math.log1p(-label_noise) + clean, clean.new_tensor(math.log(label_noise / 2)))

    return -(mu * log_probability(difference - margin) + (1.0 - mu) * log_probability(-difference - margin))


def dpo_loss(
    logprobs_a: Tensor,
    logprobs_b: Tensor,
    ref_logprobs_a: Tensor,
    ref_logprobs_b: Tensor,
    mu: Tensor,
    *,
    beta: float,
    label_noise: Tensor | float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The Bradley–Terry loss of the implicit rewards r = β log(π/π_ref), per pair (Rafailov et al. 2023, eq. 7).

    All [N]: log-probabilities in nats of whole responses (summed over their tokens) under policy and reference; mu and
    label_noise as in `bradley_terry_loss`. Returns (loss [N], rewards of a [N], rewards of b [N]).
    """
    rewards_a = beta * (logprobs_a - ref_logprobs_a)
    rewards_b = beta * (logprobs_b - ref_logprobs_b)
    return bradley_terry_loss(rewards_a, rewards_b, mu, label_noise=label_noise), rewards_a, rewards_b


def bootstrap_weights(ids: Sequence[str], members: int) -> Tensor:
    """Bootstrap weights: how often each ensemble member's sample contains each pair, [B, K] float32.

    Drawing |D| pairs with replacement gives each pair a Binomial(|D|, 1/|D|) ≈ Poisson(1) count (Oza & Russell 2001).
    The count is a hash of pair id and member, so it is the same in every refit. The pairs of weight 0 (a share 1/e) are
    the member's validation set (Christiano et al. 2017, §2.2.3). A single member has weight 1 for all pairs.
    """
    if members == 1:
        return torch.ones(len(ids), 1)
    counts = [_poisson_count(f"{pair}/{member}") for pair in ids for member in range(members)]
    return torch.tensor(counts).reshape(len(ids), members)


def _poisson_count(key: str) -> float:
    uniform = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) / 2**64
    return float(bisect_right(_POISSON_CDF, uniform))
