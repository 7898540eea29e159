"""The records that pass from one package to the next, each field with its shape.

B prompts; N samples; P, R prompt and response length in tokens; K members of a reward ensemble. Masks are True for
real tokens, and EOS is a real token of its response. A field with a token axis declares in its metadata whether that is
the prompt's or the response's, for `rollout.records`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:  # the page and --help start without torch, in a second instead of several
    from torch import Tensor

CriticKind = Literal["shared", "separate", "reward"]

# The metadata of a field with shape [N, P] or [N, R].
AXIS = "axis"
PROMPT_TOKENS, RESPONSE_TOKENS = {AXIS: "prompt"}, {AXIS: "response"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Preference:
    """One comparison of two responses to one prompt, all three as text; a reward model reads `prompt + a`."""

    prompt: str
    a: str
    b: str
    mu: float = 1.0  # probability that a is better: 1, 0, 1/2 for a tie, or a share of votes
    weight: float = 1.0
    margin: float = 0.0  # how much better the preferred response is, in units of reward (0 = not given)
    label_noise: float | None = None  # share of its annotator's labels that is random (None = the run's assumption)
    id: str = ""
    source: str = ""
    annotator: str = ""
    subset: str = ""


@dataclass(frozen=True, slots=True)
class RowReport:
    """The rows of a data set: how many were read, how many kept, and why the others were dropped."""

    read: int
    kept: int
    dropped: dict[str, int] = field(default_factory=dict)  # reason -> rows

    def __str__(self) -> str:
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.dropped.items() if count)
        return f"{self.kept:,} of {self.read:,} rows kept" + (f"; dropped: {reasons}" if reasons else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptBatch:
    """Tokenised prompts, padded on the left, so that every response starts in the same column.

    For an encoder-decoder they are padded on the right, since absolute positions count from the first token.
    """

    texts: list[str]  # [B]
    input_ids: Tensor  # [B, P] int64
    mask: Tensor  # [B, P] bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Completions:
    """Sampled responses with the sampler's log-probabilities."""

    prompts: list[str]  # [N]
    responses: list[str]  # [N] text without special tokens
    prompt_ids: Tensor = field(metadata=PROMPT_TOKENS)  # [N, P] int64, padded as in PromptBatch
    prompt_mask: Tensor = field(metadata=PROMPT_TOKENS)  # [N, P] bool
    response_ids: Tensor = field(metadata=RESPONSE_TOKENS)  # [N, R] int64, padded on the right
    response_mask: Tensor = field(metadata=RESPONSE_TOKENS)  # [N, R] bool, EOS included
    sampler_logprobs: Tensor = field(metadata=RESPONSE_TOKENS)  # [N, R] nats, at the sampling temperature
    entropy: Tensor = field(metadata=RESPONSE_TOKENS)  # [N, R] nats, of the distribution each token was drawn from
    finished: Tensor  # [N] bool: the response ended with EOS
    group: Tensor  # [N] int64: responses to the same prompt of a batch share a number


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout(Completions):
    """Completions with their scores, and with log-probabilities and values of each response token."""

    scores: Tensor  # [N] reward of the whole response, mean of the K members
    score_std: Tensor  # [N] standard deviation across the K members (0 for one member)
    shaped_scores: Tensor  # [N] the maximised score: after ensemble rule, missing-EOS penalty, scaling and clipping
    # [N, R] nats, the policy's before the update: the sampler's, or those of a forward pass of the trainer where the
    # settings ask for one (`recomputes_logprobs`) or states are needed that the sampler did not keep
    logprobs: Tensor = field(metadata=RESPONSE_TOKENS)
    ref_logprobs: Tensor = field(metadata=RESPONSE_TOKENS)  # [N, R] nats, the reference model's
    kl: Tensor = field(metadata=RESPONSE_TOKENS)  # [N, R] nats, by the configured estimator
    values: Tensor = field(metadata=RESPONSE_TOKENS)  # [N, R] of the state before each token (0 without a critic)


@dataclass(frozen=True, slots=True, kw_only=True)
class Experience(Rollout):
    """A rollout with the targets of the update."""

    rewards: Tensor = field(metadata=RESPONSE_TOKENS)  # [N, R] KL penalty per token, and the score on the last token
    advantages: Tensor = field(metadata=RESPONSE_TOKENS)  # [N, R]
    returns: Tensor = field(metadata=RESPONSE_TOKENS)  # [N, R]


class Scorer(Protocol):
    """Assigns rewards to responses: a reward model, an ensemble, a user's function."""

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        """Returns the reward of each response by each ensemble member, [N, K] float32 on the CPU."""
        ...
