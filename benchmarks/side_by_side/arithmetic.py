"""The arithmetic that a job needs in any implementation: multiplications and additions of matrix products.

- Only real tokens count, no padding.
- A forward pass needs 2 × the weights in matrix products per token, and per layer 4 × width × the number of positions
  that each token attends to (scores, then the weighted sum). Embeddings, norms, activations and heads with one output
  are left out.
- A backward pass counts as two forward passes; nothing is recomputed.
- PPO: sampling is one forward pass over prompt and response, with the output embeddings at response positions only and
  nothing for the last token; it also yields the policy's log-probabilities. The reference needs one such pass; training
  one forward and backward pass per epoch. The reward model computes the whole text once. A separate critic needs one
  pass for the values, and a forward and backward pass per epoch; a shared critic needs nothing.
- Reward models: both texts of a pair for an encoder, where every token attends to every other; for a decoder the common
  prefix of the two texts is computed once.
"""

from collections.abc import Iterable
from typing import NamedTuple

from side_by_side.jobs import PPOJob, RewardJob

FORWARD_AND_BACKWARD = 3  # in units of a forward pass


class PairLengths(NamedTuple):
    """Tokens of a pair: the common prefix, and the rest of each text."""

    prefix: int
    rest_a: int
    rest_b: int


def ppo_operations(job: PPOJob, prompt_lengths: Iterable[int]) -> dict[str, int]:
    """Operations of a whole PPO job by part; prompt_lengths: tokens of each episode's prompt."""
    states = scored = episodes = 0
    for length in prompt_lengths:
        read = length + job.response_tokens - 1  # all tokens but the last
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
    """Operations of one epoch over the pairs."""
    forward = 0
    for pair in pairs:
        if job.architecture == "gpt2":
            context = causal_context(pair.prefix)
            context += causal_context(pair.rest_a, pair.prefix) + causal_context(pair.rest_b, pair.prefix)
            forward += trunk(job, sum(pair), context)
        else:
            for length in (pair.prefix + pair.rest_a, pair.prefix + pair.rest_b):
                forward += trunk(job, length, length**2) + 2 * job.width**2  # DistilBERT's pre-classifier layer
    return {"training": FORWARD_AND_BACKWARD * forward}


def trunk(job: PPOJob | RewardJob, tokens: int, context: int) -> int:
    """One forward pass: per layer 12 width² weights (attention 4, MLP 8) per token, and attention over `context`.

    context: positions attended to, summed over the tokens.
    """
    return job.layers * (2 * 12 * job.width**2 * tokens + 4 * job.width * context)


def head(job: PPOJob, tokens: int) -> int:
    """Operations of the logits of the whole vocabulary for `tokens` tokens."""
    return 2 * job.width * job.vocabulary * tokens


def causal_context(tokens: int, before: int = 0) -> int:
    """Positions attended to, summed over `tokens` tokens that follow `before` others, with causal attention."""
    return tokens * before + tokens * (tokens + 1) // 2


def shared_prefix(a: list[int], b: list[int]) -> PairLengths:
    """Lengths of the common prefix of a and b, and of the rest of each."""
    prefix = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return PairLengths(prefix, len(a) - prefix, len(b) - prefix)
