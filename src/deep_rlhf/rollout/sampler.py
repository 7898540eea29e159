"""The interface of a sampler, and how a token is drawn from a uniform random number."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from deep_rlhf.ops.logprobs import scaled
from deep_rlhf.types import PromptBatch


@dataclass(frozen=True, slots=True)
class Sampled:
    """Responses to n prompts, padded on the right; `types.Completions` describes the fields."""

    response_ids: Tensor  # [n, R] int64
    response_mask: Tensor  # [n, R] bool, EOS included
    logprobs: Tensor  # [n, R] nats
    entropy: Tensor  # [n, R] nats
    finished: Tensor  # [n] bool
    states: Tensor | None = None  # [n, R, H] the policy's hidden state before each token, if requested


class Sampler(Protocol):
    """Draws one response to each prompt.

    `engine.Engine` is the only implementation. A serving library (vLLM, SGLang) cannot be one: none of them accepts
    the uniforms, and none returns the entropy of every token or the hidden states.
    """

    def sample(self, prompts: PromptBatch, uniforms: Tensor) -> Sampled:
        """Draws token t of response i by inverting its distribution at uniforms[i, t]; [n, R] -> at most R tokens.

        The random numbers are an argument, so a response does not depend on the other rows, on padding or on the
        number of processes.
        """
        ...


class DrawnTokens(NamedTuple):
    """One token for each of n rows, its log-probability, and the entropy of its distribution."""

    token_ids: Tensor  # [n] int64
    logprobs: Tensor  # [n] nats
    entropy: Tensor  # [n] nats


def draw_tokens(logits: Tensor, uniforms: Tensor, temperature: float) -> DrawnTokens:
    """Inverse-CDF sampling: the first token whose cumulative probability exceeds its uniform; [n, V], [n] -> [n]."""
    log_distribution = scaled(logits, temperature).log_softmax(-1)
    # −inf · 0 would be NaN; the lowest finite number · 0 is 0
    log_distribution.clamp_(min=torch.finfo(torch.float32).min)
    distribution = log_distribution.exp()
    entropy = -(distribution.unsqueeze(1) @ log_distribution.unsqueeze(2)).flatten()
    cumulative = distribution.cumsum_(-1)
    threshold = uniforms.unsqueeze(1) * cumulative[:, -1:]  # rounding may leave the total a little off 1
    token_ids = torch.searchsorted(cumulative, threshold, right=True).clamp(max=logits.shape[1] - 1)
    return DrawnTokens(token_ids.squeeze(1), log_distribution.gather(1, token_ids).squeeze(1), entropy)


def sampling_uniforms(seed: int, batch: int, count: int, tokens: int) -> Tensor:
    """The random numbers [count, tokens] of the `batch`-th batch of a run; they depend on the arguments alone."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + batch)
    return torch.rand(count, tokens, generator=generator)
