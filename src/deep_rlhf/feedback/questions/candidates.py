"""Answers of the policy to ask about: candidates for questions, and blind pairs with the policy it began as."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from deep_rlhf.models.reward import RewardModel
from deep_rlhf.types import Scorer

Write = Callable[[list[str], int], list[str]]  # (prompts, seed) -> one sampled answer to each


@dataclass(frozen=True, slots=True)
class Candidate:
    """Answers to one prompt that people could be asked to compare."""

    prompt: str
    answers: tuple[str, ...]


class Prompts:
    """Goes through the prompts, each pass in a new order, from a seed; `position` is where a continuation goes on."""

    def __init__(self, prompts: Sequence[str], *, seed: int, position: int = 0) -> None:
        self.prompts = list(prompts)
        self.seed = seed
        self.position = position

    def next(self, count: int) -> list[str]:
        """The next `count` prompts, without an end."""
        found = []
        for position in range(self.position, self.position + count):
            lap, place = divmod(position, len(self.prompts))
            order = random.Random(f"{self.seed}/{lap}").sample(range(len(self.prompts)), len(self.prompts))
            found.append(self.prompts[order[place]])
        self.position += count
        return found


def sample_candidates(
    write: Write, prompts: Sequence[str], *, samples: int, answers: int = 2, seed: int
) -> list[list[Candidate]]:
    """For each prompt, of `samples` answers to it, all sets of `answers` different ones in an order drawn by lot.

    Pairs of a few samples are many candidates at the price of the samples: 5 samples make 10 pairs, as many as
    Christiano et al. (2017, §2.2.4) choose one question from. Larger sets are as many as there are samples, by lot.
    """
    rng = random.Random(f"{seed}/candidates")
    texts = write([prompt for prompt in prompts for _ in range(samples)], seed)
    found: list[list[Candidate]] = []
    for i, prompt in enumerate(prompts):
        own = list({text.strip(): text for text in texts[i * samples : (i + 1) * samples]}.values())
        sets = list(combinations(own, answers))
        rng.shuffle(sets)
        some = sets if answers == 2 else sets[:samples]
        found.append([Candidate(prompt, tuple(rng.sample(one, answers))) for one in some])  # no side is the earlier one
    return found


def rewards_of(candidates: Sequence[Candidate], scorer: Scorer) -> Tensor:
    """Rewards [C, 2, K] of each candidate's answers; of more than two, of the pair that the members differ about most.

    Every different answer is scored once.
    """
    texts = dict.fromkeys((candidate.prompt, answer) for candidate in candidates for answer in candidate.answers)
    order = {text: row for row, text in enumerate(texts)}
    scores = scorer.score([prompt for prompt, _ in texts], [answer for _, answer in texts])
    rows = torch.tensor([[order[candidate.prompt, answer] for answer in candidate.answers] for candidate in candidates])
    rewards = scores[rows]  # [C, A, K]
    if rewards.shape[1] == 2:
        return rewards
    pairs = torch.tensor(list(combinations(range(rewards.shape[1]), 2)))
    both = rewards[:, pairs]  # [C, pairs, 2, K]
    spread = (both[:, :, 0] - both[:, :, 1]).var(dim=2)
    return both[torch.arange(len(both)), spread.argmax(dim=1)]


class LogOdds:
    """A reward model's scores in the unit in which it was fitted: differences are log-odds of being preferred."""

    def __init__(self, model: RewardModel) -> None:
        self.model = model

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        """[N, K]; each member has mean 0 where the model's normalised scores have."""
        return self.model.score(prompts, responses) * self.model.std


def win_rate_pairs(
    write_now: Write, write_start: Write, prompts: Sequence[str], *, seed: int
) -> list[tuple[str, str, str]]:
    """(prompt, answer of the policy now, answer of the start), without those in which both wrote the same."""
    if not prompts:
        return []
    now, start = write_now(list(prompts), seed), write_start(list(prompts), seed + 1)
    rows = zip(prompts, now, start, strict=True)
    return [(prompt, new, old) for prompt, new, old in rows if new.strip() != old.strip()]
