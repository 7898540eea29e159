"""Best-of-n: sample n responses to each prompt and keep the best, without training (Stiennon et al. 2020).

With β > 0 it keeps response i with probability ∝ exp(rᵢ/β) instead ("soft" best-of-n, Verdun et al. 2025). This is
self-normalised importance sampling with the reference as proposal, so its distribution tends to π* ∝ π₀ exp(r/β), the
optimum of every algorithm here, as n grows. It is the baseline that training must beat.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deep_rlhf.errors import ConfigError, RewardError
from deep_rlhf.models.policy import Policy
from deep_rlhf.models.reward import as_scorer, member_scores
from deep_rlhf.rollout.collect import complete, prompt_batch
from deep_rlhf.rollout.engine import Engine
from deep_rlhf.rollout.generate import eos_token_ids
from deep_rlhf.rollout.sampler import sampling_uniforms
from deep_rlhf.types import Scorer


@dataclass(frozen=True, slots=True)
class BestResponses:
    """The responses chosen for B prompts, and the n candidates of each."""

    responses: list[str]  # [B]
    scores: Tensor  # [B]
    candidates: list[list[str]]  # [B][n]
    candidate_scores: Tensor  # [B, n]


class BestOfN:
    """Best-of-n sampling: `BestOfN(model, tokenizer, scorer, n=16).generate(prompts)`."""

    def __init__(
        self,
        model: PreTrainedModel | Policy,
        tokenizer: PreTrainedTokenizerBase,
        scorer: Scorer | Callable[[list[str], list[str]], Sequence[float]] | str,
        *,
        n: int,
        beta: float = 0.0,
        max_new_tokens: int = 32,
        temperature: float = 1.0,
    ) -> None:
        """`scorer` is a Scorer, a function of (prompts, responses), or a value of the flag `--reward_model`.

        `beta` is in units of the reward; 0 keeps the best. Raises ConfigError for arguments out of range, and
        RewardError or ModelError for a reward that cannot be used.
        """
        if n < 1 or max_new_tokens < 1:
            raise ConfigError(f"n={n} and max_new_tokens={max_new_tokens} must both be 1 or more.")
        if not 0 <= beta < math.inf or not 0 < temperature < math.inf:
            raise ConfigError(f"beta={beta} must be 0 or more, and temperature={temperature} greater than 0.")
        self.policy = model if isinstance(model, Policy) else Policy(model)
        self.tokenizer, self.scorer = tokenizer, as_scorer(scorer)
        self.n, self.beta, self.max_new_tokens = n, beta, max_new_tokens
        self.sampler = Engine(
            self.policy, eos_ids=eos_token_ids(self.policy.language_model, tokenizer), temperature=temperature
        )

    def generate(self, prompts: Sequence[str], *, seed: int = 0) -> BestResponses:
        """Returns one response to each prompt.

        Raises RewardError if a reward is not finite, ConfigError without prompts.
        """
        if not prompts:
            raise ConfigError("Best-of-n needs at least one prompt.")
        n, count = self.n, len(prompts)
        repeated = [prompt for prompt in prompts for _ in range(n)]
        continues = not self.policy.is_seq2seq
        batch = prompt_batch(repeated, self.tokenizer, self.policy.device, left=continues)
        uniforms = sampling_uniforms(seed, 0, count * n, self.max_new_tokens)
        responses = complete(batch, self.sampler.sample(batch, uniforms), self.tokenizer, continues=continues).responses
        scores = member_scores(self.scorer, repeated, responses).mean(1)
        if not torch.isfinite(scores).all():
            bad = int((~torch.isfinite(scores)).nonzero()[0])
            raise RewardError(
                f"The reward of the response {responses[bad][:60]!r} is {float(scores[bad])}, which cannot be compared:"
                " correct the reward."
            )
        scores = scores.view(count, n)
        cumulative = selection_probabilities(scores, self.beta).cumsum(1)
        threshold = sampling_uniforms(seed, 1, count, 1) * cumulative[:, -1:]  # rounding may leave the total off 1
        chosen = torch.searchsorted(cumulative, threshold, right=True).clamp(max=n - 1)
        candidates = [responses[start : start + n] for start in range(0, count * n, n)]
        return BestResponses(
            responses=[row[i] for row, i in zip(candidates, chosen.squeeze(1).tolist(), strict=True)],
            scores=scores.gather(1, chosen).squeeze(1),
            candidates=candidates,
            candidate_scores=scores,
        )


def selection_probabilities(scores: Tensor, beta: float) -> Tensor:
    """The probability of each candidate [B, n] given its score [B, n]: softmax(r/β), or 1 for the best at β = 0.

    Of several best candidates the first is chosen; candidates are in random order, so this favours none.
    """
    if beta == 0:
        return torch.nn.functional.one_hot(scores.argmax(1), scores.shape[1]).to(scores.dtype)
    return (scores / beta).softmax(1)
