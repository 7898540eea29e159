"""How much an answer would tell: what ensemble members make of a pair whose label is not known yet.

rewards [C, 2, K]: of the answers a and b of C pairs, by K members. Entropies are in nats.
"""

import torch
from torch import Tensor


def preferred_probability(rewards: Tensor) -> Tensor:
    """P(a ≻ b) = σ(r_a − r_b) of each member, [C, K] (Christiano et al. 2017, eq. 1)."""
    return torch.sigmoid(rewards[:, 0] - rewards[:, 1])


def preference_variance(rewards: Tensor) -> Tensor:
    """Variance of P(a ≻ b) across the members, [C]; 0 for one member (Christiano et al. 2017, §2.2.4)."""
    return preferred_probability(rewards).var(dim=1, correction=0)


def information_gain(rewards: Tensor, *, label_noise: float = 0.0) -> Tensor:
    """Mutual information between the answer and the member that is right, [C]: H(mean p') − mean H(p').

    Houlsby et al. 2011 ("BALD"), eq. 2. p' = (1 − e) p + e/2 is the probability of the *answer*, of which a share e =
    `label_noise` is random. Unlike the variance it is small where all members are unsure by themselves.
    """
    answer = (1.0 - label_noise) * preferred_probability(rewards) + label_noise / 2.0
    return binary_entropy(answer.mean(dim=1)) - binary_entropy(answer).mean(dim=1)


def binary_entropy(probability: Tensor) -> Tensor:
    """−p ln p − (1 − p) ln (1 − p), of any shape; 0 where p is 0 or 1."""
    return torch.special.entr(probability) + torch.special.entr(1.0 - probability)
