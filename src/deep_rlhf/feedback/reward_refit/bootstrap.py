"""Bootstrap assignment of preference pairs to ensemble members, held-out pairs, and the losses on both."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from deep_rlhf.algorithms.supervised.reward_trainer import Features, accuracy, label_noise_of, stated_noise
from deep_rlhf.ops.preference import bradley_terry_loss
from deep_rlhf.types import Preference

HELD_OUT_SHARE = 1 / 6


def bag_id(prompt: str, responses: Iterable[str], seed: int) -> str:
    """The key that decides into which members' bags a question falls: its texts in any order, and the seed.

    Repeated labels of one question, and all pairs of one ranking (two of them may imply the third), share a key, so
    that nothing leaks from a bag into another. A second ensemble with another seed has other bags.
    """
    return "\0".join([str(seed), prompt, *sorted(responses)])


def is_held_out(key: str) -> bool:
    """Whether no member ever learns from the pairs with this bag id: a fixed sixth of all, by a hash of the key."""
    return int.from_bytes(hashlib.sha256(f"{key}/outside".encode()).digest()[:8]) / 2**64 < HELD_OUT_SHARE


def held_out_mask(features: Sequence[Features]) -> Tensor:
    """[N] bool: True for the pairs that no member learns from."""
    return ~torch.stack([pair["weight"] for pair in features]).any(dim=1)


def bag_losses(
    rewards: Tensor, features: Sequence[Features], weights: Tensor, label_noise: float
) -> tuple[float, float]:
    """Mean loss per pair in the members' bags, and on held-out pairs; NaN where there are none.

    rewards: [N, 2, K]. weights: [N], of the pairs. A pair that a bag contains twice counts twice there. Both numbers
    are means of the members' own losses, not the loss of their mean reward.
    """
    a, b = rewards.unbind(1)
    mu = torch.tensor([pair["labels"] for pair in features])[:, None].expand_as(a)
    noise = label_noise_of(stated_noise(features)[:, None], label_noise)
    loss = bradley_terry_loss(a, b, mu, label_noise=noise)
    bags = torch.stack([pair["weight"] for pair in features])
    held_out = (held_out_mask(features) * weights)[:, None].expand_as(loss)
    means = [(loss * share).sum(dim=0) / share.sum(dim=0) for share in (bags, held_out)]
    return means[0].nanmean().item(), means[1].mean().item()


def held_out_accuracies(rewards: Tensor, features: Sequence[Features]) -> list[float]:
    """The accuracy of each member on the held-out pairs. rewards: [N, 2, K]."""
    held_out = held_out_mask(features)
    mu = torch.tensor([pair["labels"] for pair in features])[held_out]
    return [accuracy(advantage, mu) for advantage in (rewards[held_out, 0] - rewards[held_out, 1]).unbind(1)]


def rankings_of(pairs: Sequence[Preference], ranking_responses: Mapping[str, Sequence[str]]) -> list[list[int]]:
    """The rows of each ranking, in the order of the pairs; a pair that is not part of a ranking is alone.

    ranking_responses: as in `RewardFit.fit`. The pairs of a ranking must be adjacent.
    """
    rows: list[list[int]] = []
    previous = None
    for row, pair in enumerate(pairs):
        responses = ranking_responses.get(pair.id, ())
        ranking = (pair.prompt, pair.annotator, tuple(responses)) if len(responses) > 2 else None
        if ranking is not None and ranking == previous:
            rows[-1].append(row)
        else:
            rows.append([row])
        previous = ranking
    return rows


def texts_of(pair: Preference) -> tuple[str, frozenset[str]]:
    """The texts of a pair, whichever response is on which side: equal for two labels of the same question."""
    return pair.prompt, frozenset((pair.a, pair.b))
