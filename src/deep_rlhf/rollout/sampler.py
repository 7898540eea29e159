"""What every way of sampling offers. The engine of this package is one; a serving library can be another."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from deep_rlhf.types import PromptBatch


@dataclass(frozen=True, slots=True)
class Sampled:
    """Responses to n prompts, padded on the right; see `types.Completions` for the fields."""

    response_ids: Tensor  # [n, R] int64
    response_mask: Tensor  # [n, R] bool, EOS included
    logprobs: Tensor  # [n, R] nats
    entropy: Tensor  # [n, R] nats
    finished: Tensor  # [n] bool
    states: Tensor | None = None  # [n, R, H] the policy's hidden state before each token, where it was asked for


class Sampler(Protocol):
    """Draws one response to each prompt."""

    def sample(self, prompts: PromptBatch, uniforms: Tensor) -> Sampled:
        """Token t of response i is drawn by inverting the distribution at uniforms[i, t]; [n, R] -> at most R tokens.

        Randomness comes in as numbers, so a sample does not depend on its neighbours, on padding or on how many
        processes share the work.
        """
        ...
