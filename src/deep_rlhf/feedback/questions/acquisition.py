"""Which of many candidate pairs to ask about (Christiano et al. 2017, §2.2.4).

Where it departs from the paper: besides the variance of the members' predictions there is the expected information
gain, and a share of every choice is drawn at random for good, for "in some tasks it actually impairs performance": what
is learned from the two arms can be compared at any time.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from deep_rlhf.errors import UserError
from deep_rlhf.feedback.records import WAYS, Reason, Way
from deep_rlhf.ops.queries import information_gain, preference_variance, preferred_probability

RANDOM_SHARE = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """One question to ask."""

    index: int  # of the candidate
    reason: Reason  # "random", or the way by which it was chosen
    score: float  # what the way maximises; the variance under the way "random"
    predicted: float  # P(a is better), mean of the members


def choose(
    rewards: Tensor,
    count: int,
    *,
    way: Way,
    random_share: float = RANDOM_SHARE,
    generator: torch.Generator,
    label_noise: float = 0.1,
) -> list[Chosen]:
    """`count` of C candidate pairs, or all if there are fewer, in the order in which to ask them.

    rewards: [C, 2, K] of both answers by K members. The random arm is drawn first, from all candidates alike, so it is
    a fair sample of what the policy writes; its size is `random_share` × count, a fraction of a question drawn by lot.
    The rest have the highest scores of what is left. The two arms are mixed in the result: who asks the first half of
    it still asks both. Raises UserError for an unknown way, and a share outside 0…1.
    """
    if way not in WAYS:
        raise UserError(f"Questions are chosen by {', '.join(WAYS)}, not by {way!r}.")
    if not 0 <= random_share <= 1:
        raise UserError(f"The random share of the questions must lie between 0 and 1, not {random_share}.")
    count = min(count, len(rewards))
    if count == 0:
        return []
    score = scores(rewards, way, label_noise)
    predicted = preferred_probability(rewards).mean(dim=1)

    drawn = count if way == "random" else _rounded_by_lot(random_share * count, generator)
    arm = torch.randperm(len(rewards), generator=generator)[:drawn]
    rest = score.clone()
    rest[arm] = -torch.inf
    best = rest.argsort(descending=True, stable=True)[: count - drawn]
    indices = [*arm.tolist(), *best.tolist()]
    return [
        Chosen(
            index=indices[place],
            reason="random" if place < drawn else way,
            score=score[indices[place]].item(),
            predicted=predicted[indices[place]].item(),
        )
        for place in torch.randperm(count, generator=generator).tolist()
    ]


def scores(rewards: Tensor, way: Way, label_noise: float = 0.1) -> Tensor:
    """What `way` prefers more of, [C]."""
    if way == "information":
        return information_gain(rewards, label_noise=label_noise)
    return preference_variance(rewards)


def _rounded_by_lot(number: float, generator: torch.Generator) -> int:
    """One of the two nearest whole numbers, so that the mean of many is `number`."""
    whole = int(number)
    return whole + int(torch.rand((), generator=generator).item() < number - whole)
