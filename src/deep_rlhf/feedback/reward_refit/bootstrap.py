"""Bags: which pairs an ensemble learns from, which it never does, and how far apart its losses on the two may be."""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from deep_rlhf.algorithms.supervised.reward_trainer import Features, accuracy, label_noise_of, told_noise
from deep_rlhf.ops.preference import bradley_terry_loss
from deep_rlhf.types import Preference

OUTSIDE = 1 / 6  # share of the pairs that are in nobody's bag
LEAST_DECAY, MOST_DECAY = 1.0, 2000.0
FASTEST = 3.0  # change of the weight decay from one refit to the next


def bag_id(prompt: str, answers: Iterable[str], seed: int) -> str:
    """What the bags of a question depend on: its texts, whoever answers it and from whichever side, and the seed.

    So no duplicate of a pair leaks from a bag, all pairs of a ranking are in the same bags, for two of them may tell
    the third, and a second ensemble with another seed has other bags.
    """
    return "\0".join([str(seed), prompt, *sorted(answers)])


def is_outside(name: str) -> bool:
    """Whether a pair with this bag id is in nobody's bag, by a hash of it, so for good."""
    return int.from_bytes(hashlib.sha256(f"{name}/outside".encode()).digest()[:8]) / 2**64 < OUTSIDE


def outside(features: Sequence[Features]) -> Tensor:
    """[N] bool: the pairs that no member learns from."""
    return ~torch.stack([pair["weight"] for pair in features]).any(dim=1)


def bag_losses(
    rewards: Tensor, features: Sequence[Features], weights: Tensor, label_noise: float
) -> tuple[float, float]:
    """Mean loss per pair in the members' bags, and of pairs in nobody's bag, from rewards [N, 2, K]; NaN without any.

    weights: [N] of the pairs themselves. A pair that is twice in a bag counts twice there. Each is the mean of what the
    members lose on their own, not the loss of their mean.
    """
    a, b = rewards.unbind(1)
    mu = torch.tensor([pair["labels"] for pair in features])[:, None].expand_as(a)
    noise = label_noise_of(told_noise(features)[:, None], label_noise)
    loss = bradley_terry_loss(a, b, mu, label_noise=noise)
    inside = torch.stack([pair["weight"] for pair in features])
    out = (outside(features) * weights)[:, None].expand_as(loss)
    means = [(loss * share).sum(dim=0) / share.sum(dim=0) for share in (inside, out)]
    return means[0].nanmean().item(), means[1].mean().item()


def adapted(weight_decay: float, ratio: float, bounds: tuple[float, float]) -> float:
    """The weight decay of the next refit: stronger above the bounds of the ratio, weaker below, else the same.

    By as much as the logarithm of the ratio is off the middle of the bounds, at most threefold.
    """
    if not math.isfinite(ratio) or bounds[0] <= ratio <= bounds[1]:
        return weight_decay
    middle = (math.log(bounds[0]) + math.log(bounds[1])) / 2
    factor = min(max(math.log(max(ratio, 1.0)) / middle, 1 / FASTEST), FASTEST)
    return min(max(weight_decay * factor, LEAST_DECAY), MOST_DECAY)


def accuracies(rewards: Tensor, features: Sequence[Features]) -> list[float]:
    """Of each member, on the pairs in nobody's bag."""
    out = outside(features)
    mu = torch.tensor([pair["labels"] for pair in features])[out]
    return [accuracy(advantage, mu) for advantage in (rewards[out, 0] - rewards[out, 1]).unbind(1)]


def rankings_of(pairs: Sequence[Preference], together: Mapping[str, Sequence[str]]) -> list[list[int]]:
    """The rows of each ranking, in the order of the pairs; a pair that is of none is alone.

    together: as in `RewardFit.fit`. Pairs of a ranking follow each other.
    """
    rows: list[list[int]] = []
    before = None
    for row, pair in enumerate(pairs):
        answers = together.get(pair.id, ())
        ranking = (pair.prompt, pair.annotator, tuple(answers)) if len(answers) > 2 else None
        if ranking is not None and ranking == before:
            rows[-1].append(row)
        else:
            rows.append([row])
        before = ranking
    return rows


def texts_of(pair: Preference) -> tuple[str, frozenset[str]]:
    """What two answers to the same question have in common, whichever side each was on."""
    return pair.prompt, frozenset((pair.a, pair.b))
