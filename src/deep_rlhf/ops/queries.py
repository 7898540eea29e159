"""Acquisition functions: how informative the label of a pair would be, by the disagreement of an ensemble.

rewards [C, 2, K]: of the responses a and b of C pairs, by K members. Entropies are in nats.
"""

import torch
from torch import Tensor


def preferred_probability(rewards: Tensor) -> Tensor:
    """P(a ≻ b) = σ(r_a − r_b) by each member, [C, 2, K] -> [C, K] (Christiano et al. 2017, eq. 1)."""
    return torch.sigmoid(rewards[:, 0] - rewards[:, 1])


def preference_variance(rewards: Tensor) -> Tensor:
    """Variance of P(a ≻ b) across members, [C, 2, K] -> [C]; 0 for one member (Christiano et al. 2017, §2.2.4)."""
    return preferred_probability(rewards).var(dim=1, correction=0)


def information_gain(rewards: Tensor, *, label_noise: float = 0.0) -> Tensor:
    """Mutual information of label and ensemble member, H(mean p') − mean H(p'), [C, 2, K] -> [C] in nats.

    Houlsby et al. 2011 ("BALD"), eq. 2. p' = (1 − e) p + e/2 is the probability of the label a ≻ b if a share e =
    `label_noise` of labels is random. Unlike the variance it is small where every member is uncertain.
    """
    label = (1.0 - label_noise) * preferred_probability(rewards) + label_noise / 2.0
    return binary_entropy(label.mean(dim=1)) - binary_entropy(label).mean(dim=1)


def binary_entropy(probability: Tensor) -> Tensor:
    """−p ln p − (1 − p) ln (1 − p) in nats, any shape; 0 where p is 0 or 1."""
    return torch.special.entr(probability) + torch.special.entr(1.0 - probability)
