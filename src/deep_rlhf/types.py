"""The records that flow between the parts, each field with its shape.

B prompts; N samples; P, R prompt and response length in tokens; K members of a reward ensemble. Masks are True for
real tokens, and EOS is a real token of its response.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from deep_rlhf.errors import UserError

if TYPE_CHECKING:  # the page and the help start without torch, in a second instead of several
    from torch import Tensor

CriticKind = Literal["shared", "separate", "reward"]


def check_seed(seed: int) -> None:
    """Raises UserError for a seed that some generator would refuse."""
    if not 0 <= seed < 2**32:
        raise UserError(f"seed must be between 0 and {2**32 - 1}, not {seed}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Preference:
    """One comparison of two answers to one prompt, all three as text; `prompt + a` is what a reward model reads."""

    prompt: str
    a: str
    b: str
    mu: float = 1.0  # probability that a is better: 1, 0, 1/2 for a tie, or a share of votes
    weight: float = 1.0
    margin: float = 0.0  # how much better the preferred answer is, in units of reward (0 = not said)
    label_noise: float | None = None  # share of its annotator's answers that is random (None = as the run assumes)
    id: str = ""
    source: str = ""
    annotator: str = ""
    subset: str = ""


@dataclass(frozen=True, slots=True)
class RowReport:
    """What became of the rows of a data set: how many were read, how many kept, and why the others were dropped."""

    read: int
    kept: int
    dropped: dict[str, int] = field(default_factory=dict)  # reason -> rows

    def __str__(self) -> str:
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.dropped.items() if count)
        return f"{self.kept:,} of {self.read:,} rows kept" + (f"; dropped: {reasons}" if reasons else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptBatch:
    """Prompts ready to be continued: padded on the left, so that every response starts in the same column.

    Those of an encoder-decoder are padded on the right instead, where absolute positions count from the first token.
    """

    texts: list[str]  # [B]
    input_ids: Tensor  # [B, P] int64
    mask: Tensor  # [B, P] bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Completions:
    """Sampled responses with the log-probabilities under which they were drawn."""

    prompts: list[str]  # [N]
    responses: list[str]  # [N] text without special tokens
    prompt_ids: Tensor  # [N, P] int64, padded as in PromptBatch
    prompt_mask: Tensor  # [N, P] bool
    response_ids: Tensor  # [N, R] int64, padded on the right
    response_mask: Tensor  # [N, R] bool, EOS included
    sampler_logprobs: Tensor  # [N, R] nats, at the sampling temperature
    entropy: Tensor  # [N, R] nats, of the distribution each token was drawn from
    finished: Tensor  # [N] bool: the response ended with EOS
    group: Tensor  # [N] int64: responses to one and the same prompt of a batch share a number


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout(Completions):
    """Completions that were scored, with the policy's own and the reference model's view of each token."""

    scores: Tensor  # [N] reward of the whole response, mean of the K members
    score_std: Tensor  # [N] spread across the K members (0 for one member)
    shaped_scores: Tensor  # [N] what is maximised: after the ensemble's rule, missing-EOS penalty, scaling and clipping
    logprobs: Tensor  # [N, R] the policy's, from the same forward that training uses
    ref_logprobs: Tensor  # [N, R] the reference model's
    kl: Tensor  # [N, R] nats, by the estimator that was asked for
    values: Tensor  # [N, R] of the state before each token (0 without a critic)


@dataclass(frozen=True, slots=True, kw_only=True)
class Experience(Rollout):
    """A rollout with the targets of the update."""

    rewards: Tensor  # [N, R] per token: KL penalty, and the score on the last token
    advantages: Tensor  # [N, R]
    returns: Tensor  # [N, R]


class Scorer(Protocol):
    """Anything that rewards text: a reward model, an ensemble, a user's function."""

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        """Return the reward of each response, [N, K] float32 on the CPU."""
        ...
