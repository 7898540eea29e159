"""Candidates for questions: sets of sampled responses to a prompt, and blind pairs of current and start policy."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from deep_rlhf.models.reward import RewardModel
from deep_rlhf.types import Scorer

Generate = Callable[[list[str], int], list[str]]  # (prompts, seed) -> one sampled response to each


@dataclass(frozen=True, slots=True)
class Candidate:
    """Responses to one prompt that people could compare."""

    prompt: str
    responses: tuple[str, ...]


def sample_candidates(
    generate: Generate, prompts: Sequence[str], *, samples: int, responses: int = 2, seed: int
) -> list[list[Candidate]]:
    """For each prompt, the sets of `responses` different texts out of `samples` sampled ones, in random order.

    All pairs of a few samples give many candidates cheaply: 5 samples make 10 pairs, as many as Christiano et al.
    (2017, §2.2.4) select one question from. Of larger sets, a random selection of `samples` is returned.
    """
    rng = random.Random(f"{seed}/candidates")
    texts = generate([prompt for prompt in prompts for _ in range(samples)], seed)
    found: list[list[Candidate]] = []
    for i, prompt in enumerate(prompts):
        distinct = list({text.strip(): text for text in texts[i * samples : (i + 1) * samples]}.values())
        sets = list(combinations(distinct, responses))
        rng.shuffle(sets)
        kept = sets if responses == 2 else sets[:samples]
        # shuffled within each set, so that the order of sampling decides no side
        found.append([Candidate(prompt, tuple(rng.sample(one, responses))) for one in kept])
    return found


def rewards_of(candidates: Sequence[Candidate], scorer: Scorer) -> Tensor:
    """Rewards [C, 2, K] of the two responses of each candidate; each distinct response is scored once.

    A candidate of more than two responses is represented by the pair whose reward difference varies most over members.
    """
    texts = dict.fromkeys((candidate.prompt, text) for candidate in candidates for text in candidate.responses)
    order = {text: row for row, text in enumerate(texts)}
    scores = scorer.score([prompt for prompt, _ in texts], [response for _, response in texts])
    rows = torch.tensor([[order[candidate.prompt, text] for text in candidate.responses] for candidate in candidates])
    rewards = scores[rows]  # [C, responses, K]
    if rewards.shape[1] == 2:
        return rewards
    pairs = torch.tensor(list(combinations(range(rewards.shape[1]), 2)))
    both = rewards[:, pairs]  # [C, pairs, 2, K]
    spread = (both[:, :, 0] - both[:, :, 1]).var(dim=2)
    return both[torch.arange(len(both)), spread.argmax(dim=1)]


class LogOdds:
    """Scores of a reward model before normalisation: a difference is the log-odds of being preferred."""

    def __init__(self, model: RewardModel) -> None:
        self.model = model

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        """[N, K], shifted so that 0 is the mean on which the model's scores are normalised."""
        return self.model.score(prompts, responses) * self.model.std


def win_rate_pairs(
    generate_now: Generate, generate_start: Generate, prompts: Sequence[str], *, seed: int
) -> list[tuple[str, str, str]]:
    """(prompt, response of the current policy, response of the start policy); equal responses are left out."""
    if not prompts:
        return []
    now, start = generate_now(list(prompts), seed), generate_start(list(prompts), seed + 1)
    rows = zip(prompts, now, start, strict=True)
    return [(prompt, new, old) for prompt, new, old in rows if new.strip() != old.strip()]
