"""Acquisition rules: which of many candidate pairs to ask about (Christiano et al. 2017, §2.2.4).

Departures from the paper: besides the variance of the members' predictions there is the expected information gain. A
share of the questions is always selected at random, because active selection "in some tasks actually impairs
performance"; with this control arm the two can be compared at any time.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from deep_rlhf.errors import ConfigError
from deep_rlhf.feedback.records import ACQUISITION_RULES, AcquisitionRule, Reason
from deep_rlhf.ops.queries import information_gain, preference_variance, preferred_probability

RANDOM_SHARE = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Selected:
    """A candidate that was selected as a question."""

    index: int  # of the candidate
    reason: Reason  # "random", or the acquisition rule
    score: float  # what the rule maximises; the variance under the rule "random"
    predicted: float  # P(a is better), mean of the members


def select(
    rewards: Tensor,
    count: int,
    *,
    rule: AcquisitionRule,
    random_share: float = RANDOM_SHARE,
    generator: torch.Generator,
    label_noise: float = 0.1,
) -> list[Selected]:
    """Selects `count` of C candidate pairs (or all, if there are fewer), in the order in which to ask them.

    rewards: [C, 2, K] of both responses by K members. The random control arm is drawn first and uniformly, so it is an
    unbiased sample of what the policy generates; its size is `random_share` · count, rounded up or down at random. The
    rest are the candidates with the highest scores among those left. Both arms are shuffled together. Raises
    ConfigError for an unknown rule and for a share outside [0, 1].
    """
    if rule not in ACQUISITION_RULES:
        raise ConfigError(f"Questions are chosen by {', '.join(ACQUISITION_RULES)}, not by {rule!r}.")
    if not 0 <= random_share <= 1:
        raise ConfigError(f"The random share of the questions must lie between 0 and 1, not {random_share}.")
    count = min(count, len(rewards))
    if count == 0:
        return []
    score = acquisition_scores(rewards, rule, label_noise)
    predicted = preferred_probability(rewards).mean(dim=1)

    drawn = count if rule == "random" else _randomly_rounded(random_share * count, generator)
    control_arm = torch.randperm(len(rewards), generator=generator)[:drawn]
    rest = score.clone()
    rest[control_arm] = -torch.inf
    best = rest.argsort(descending=True, stable=True)[: count - drawn]
    indices = [*control_arm.tolist(), *best.tolist()]
    return [
        Selected(
            index=indices[place],
            reason="random" if place < drawn else rule,
            score=score[indices[place]].item(),
            predicted=predicted[indices[place]].item(),
        )
        for place in torch.randperm(count, generator=generator).tolist()
    ]


def acquisition_scores(rewards: Tensor, rule: AcquisitionRule, label_noise: float = 0.1) -> Tensor:
    """What the rule maximises, [C], for rewards [C, 2, K]."""
    if rule == "information":
        return information_gain(rewards, label_noise=label_noise)
    return preference_variance(rewards)


def _randomly_rounded(number: float, generator: torch.Generator) -> int:
    """`number` rounded up or down at random so that the expected value is `number`."""
    whole = int(number)
    return whole + int(torch.rand((), generator=generator).item() < number - whole)
