"""The arithmetic that a job needs, whoever does it and however: multiplications and additions of matrix products.

- Real tokens only, no padding.
- A forward pass is 2 × the weights in matrix products per token, and per layer 4 × width × the number of positions
  that each token attends to (scores, then the weighted sum). Embeddings, norms, activations and the heads of one
  output are left out.
- A backward pass is two forward passes; nothing is computed twice.
- PPO: sampling is one forward pass over prompt and response, with the vocabulary's head at response positions only
  and nothing for the last token, which nothing follows; it gives the policy's log-probabilities, too. The reference
  is one such pass; training one and its backward pass per epoch. The reward model reads the whole text once. A separate
  critic reads what the policy reads, once for the values and once and back per epoch; a shared one costs nothing.
- Reward models: both sides of a pair whole for an encoder, where every token sees every other; for a decoder the tokens
  that both sides begin with are computed once.
"""

from collections.abc import Iterable
from typing import NamedTuple

from side_by_side.jobs import PPOJob, RewardJob

FORWARD_AND_BACKWARD = 3  # forward passes


class PairLengths(NamedTuple):
    """Tokens of a pair: how many both sides begin with, and the rest of each."""

    prefix: int
    rest_a: int
    rest_b: int


def ppo_operations(job: PPOJob, prompt_lengths: Iterable[int]) -> dict[str, int]:
    """Operations of a whole PPO job by part; prompt_lengths are the tokens of each episode's prompt."""
    states = scored = episodes = 0
    for length in prompt_lengths:
        read = length + job.response_tokens - 1  # tokens before which, or after which, a response token stands
        states += trunk(job, read, causal_context(read))
        scored += trunk(job, read + 1, causal_context(read + 1))
        episodes += 1
    logits = head(job, episodes * job.response_tokens)
    passes = FORWARD_AND_BACKWARD * job.ppo_epochs
    return {
        "sampling": states + logits,
        "reference": states + logits,
        "reward model": scored,
        "critic": (1 + passes) * states if job.critic == "separate" else 0,
        "training": passes * (states + logits),
    }


def reward_operations(job: RewardJob, pairs: Iterable[PairLengths]) -> dict[str, int]:
    """Operations of one epoch over the pairs that are kept."""
    forward = 0
    for pair in pairs:
        if job.architecture == "gpt2":
            context = causal_context(pair.prefix)
            context += causal_context(pair.rest_a, pair.prefix) + causal_context(pair.rest_b, pair.prefix)
            forward += trunk(job, sum(pair), context)
        else:
            for length in (pair.prefix + pair.rest_a, pair.prefix + pair.rest_b):
                forward += trunk(job, length, length**2) + 2 * job.width**2  # the layer before DistilBERT's last
    return {"training": FORWARD_AND_BACKWARD * forward}


def trunk(job: PPOJob | RewardJob, tokens: int, context: int) -> int:
    """One forward pass: per layer 12 width² weights (attention 4, MLP 8) per token, and attention over `context`.

    context: positions attended to, summed over the tokens.
    """
    return job.layers * (2 * 12 * job.width**2 * tokens + 4 * job.width * context)


def head(job: PPOJob, tokens: int) -> int:
    """Logits of the whole vocabulary for some tokens."""
    return 2 * job.width * job.vocabulary * tokens


def causal_context(tokens: int, before: int = 0) -> int:
    """Positions attended to by `tokens` tokens that follow `before` others: each sees those, and itself and earlier."""
    return tokens * before + tokens * (tokens + 1) // 2


def shared_prefix(a: list[int], b: list[int]) -> PairLengths:
    """How many ids a and b begin with in common, and what follows in each."""
    prefix = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return PairLengths(prefix, len(a) - prefix, len(b) - prefix)
