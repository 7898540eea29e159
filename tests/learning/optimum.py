"""Tasks so small that the best policy is known: π* ∝ π₀ exp(r/β) over every response there is.

16 tokens and responses of at most one or three of them, which may end early: at most 3,616 responses, each of which
has its probability and its reward. That is the maximiser of E[r] − β KL(π ‖ π₀) (Ziegler et al. 2019, eq. 2), so an
algorithm that is subtly wrong ends somewhere else.
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

WORDS = ["w" + letter for letter in "abcdefghijklm"]
VOCABULARY = 3 + len(WORDS)
PROMPT = "wa"
EOS = 1
SCALES = {0.1: 0.7, 0.5: 2.5, 1.0: 5.0}  # β: what the reward is multiplied by, so that each optimum lies far away
SEEDS = (1, 2, 3)
BOUNDS = {1: 0.02, 3: 0.05}  # on KL(π ‖ π*) in nats, by the longest response


def reward_for(beta: float) -> Callable[[list[str], list[str]], list[float]]:
    """The reward at which a KL coefficient is tested.

    Later letters are better, and better still in order, so no position can be learned alone.
    """

    def reward(prompts: list[str], responses: list[str]) -> list[float]:
        scores = []
        for response in responses:
            letters = [ord(word[1]) - ord("a") for word in response.split()]
            rising = sum(a < b for a, b in itertools.pairwise(letters))
            scores.append(SCALES[beta] * (sum(0.04 * letter - 0.24 for letter in letters) + 0.1 * rising))
        return scores

    return reward


class Optimum:
    """Every response of at most `length` tokens, and what the best policy makes of them."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        length: int,
        beta: float,
    ) -> None:
        """`model` is the reference, as it is now."""
        self.tokenizer, self.length = tokenizer, length
        self.responses = list(_responses(length))
        texts = tokenizer.batch_decode(self.responses, skip_special_tokens=True)
        rewards = torch.tensor(reward_for(beta)([PROMPT] * len(texts), texts), dtype=torch.float64)
        self.log_optimum = (self.log_policy(model) + rewards / beta).log_softmax(0)

    @torch.no_grad()
    def log_policy(self, model: PreTrainedModel) -> Tensor:
        """log-probability of each response, float64."""
        total = torch.zeros(len(self.responses), dtype=torch.float64)
        for size in range(self.length):
            rows = [row for row, response in enumerate(self.responses) if len(response) > size]
            prefixes = sorted({self.responses[row][:size] for row in rows})
            following = self._following(model, torch.tensor(prefixes, dtype=torch.int64).reshape(len(prefixes), size))
            place = {prefix: i for i, prefix in enumerate(prefixes)}
            before = [place[self.responses[row][:size]] for row in rows]
            total[rows] += following[before, [self.responses[row][size] for row in rows]]
        return total

    def _following(self, model: PreTrainedModel, prefixes: Tensor) -> Tensor:
        """log-probabilities [n, V] of what follows the prompt and each prefix [n, size]."""
        given = torch.tensor([self.tokenizer(PROMPT).input_ids] * len(prefixes))
        if model.config.is_encoder_decoder:
            start = torch.full((len(prefixes), 1), model.config.decoder_start_token_id)
            logits = model(input_ids=given, decoder_input_ids=torch.cat([start, prefixes], 1)).logits
        else:
            logits = model(input_ids=torch.cat([given, prefixes], 1)).logits
        return logits[:, -1].double().log_softmax(-1)

    def distance(self, model: PreTrainedModel) -> float:
        """KL(π ‖ π*) in nats per response."""
        log_policy = self.log_policy(model)
        return float((log_policy.exp() * (log_policy - self.log_optimum)).sum())


def _responses(length: int) -> itertools.chain[tuple[int, ...]]:
    """All token sequences that end at their first EOS or after `length` tokens."""
    going_on = [token for token in range(VOCABULARY) if token != EOS]
    ended = [(*words, EOS) for size in range(length) for words in itertools.product(going_on, repeat=size)]
    return itertools.chain(ended, itertools.product(going_on, repeat=length))


def grpo_fixed_point(log_reference: Tensor, log_optimum: Tensor, beta: float, *, scale_rewards: bool) -> Tensor:
    """log of where GRPO with k3 in its loss ends, for responses of one token: the best of E[r] − β KL(π₀ ‖ π).

    With `scale_rewards` βσ stands in place of β, σ the standard deviation of the rewards at that very point.
    """
    rewards = beta * (log_optimum - log_reference)  # but for a constant, which changes nothing
    fixed = _forward_kl_optimum(log_reference, rewards, beta)
    for _ in range(50 if scale_rewards else 0):
        mean = (fixed.exp() * rewards).sum()
        deviation = (fixed.exp() * (rewards - mean) ** 2).sum().sqrt().item()
        fixed = _forward_kl_optimum(log_reference, rewards, beta * deviation)
    return fixed


def _forward_kl_optimum(log_reference: Tensor, rewards: Tensor, coef: float) -> Tensor:
    """log of cπ₀/(λ − r), with the λ above every r for which that sums to 1, by bisection."""
    weights = coef * log_reference.exp()
    low, high = rewards.max(), rewards.max() + coef
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if (weights / (middle - rewards)).sum() > 1 else (low, middle)
    return torch.log(weights / (high - rewards))


# Sizes and the spread of the random weights. Adapters change the attention alone, so theirs must be able to do more.
MODELS: dict[str, tuple[str, dict[str, int], float]] = {
    "gpt2": ("gpt2", {"n_layer": 1}, 0.2),
    "wide gpt2": ("gpt2", {"n_layer": 1, "n_embd": 128}, 0.1),
    "t5": ("t5", {"num_layers": 1, "d_model": 64}, 0.15),
}


def reference_model(make_model: Callable[..., Any], name: str, seed: int) -> Any:
    """A one-layer model with a distribution of its own, far from the optimum."""
    kind, sizes, spread = MODELS[name]
    return make_model(kind, seed=seed, spread=spread, vocab_size=VOCABULARY, **sizes)
