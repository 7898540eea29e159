"""Splits samples into forward passes that fit in memory, and into smaller ones after running out of it."""

import logging
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from deep_rlhf.errors import ResourceError
from deep_rlhf.models.policy import Policy
from deep_rlhf.runtime.memory import is_out_of_memory
from deep_rlhf.types import Completions

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Padded tokens per pass, without and with gradients. On a CPU more tokens are not faster.
TOKENS = {"cpu": (4_096, 768)}
TOKENS_OF_GPU = (65_536, 16_384)


class ForwardPasses:
    """Splits samples of similar length into passes of bounded size, which is halved for good if memory runs out."""

    def __init__(self, policy: Policy, *, training: bool, max_rows: int | None = None, trunks: int = 1) -> None:
        """`training` passes keep activations and the logits of every response token; both are bounded.

        `max_rows` bounds the samples per pass in addition to the bound on tokens. With a separate critic, two `trunks`
        share the tokens.
        """
        self._policy = policy
        self._training = training
        self._max_rows = max_rows or 1_000_000
        self._trunks = trunks
        self._halvings = 0

    def cut(self, completions: Completions, rows: Tensor) -> list[Tensor]:
        """Splits `rows` into parts of similar length, longest first, one per pass."""
        tokens = TOKENS.get(self._policy.device.type, TOKENS_OF_GPU)[self._training] // self._trunks >> self._halvings
        logits = (self._policy.chunk_size if self._training else tokens) >> self._halvings
        responses = completions.response_mask[rows].sum(1)
        lengths = (completions.prompt_mask[rows].sum(1) + responses).tolist()
        response_lengths = responses.tolist()
        parts: list[list[int]] = []
        longest = response_tokens = 0
        for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
            fits = (
                parts
                and (len(parts[-1]) + 1) * longest <= tokens
                and response_tokens + response_lengths[row] <= logits
                and len(parts[-1]) < max(1, self._max_rows >> self._halvings)
            )
            if fits:
                parts[-1].append(row)
                response_tokens += response_lengths[row]
            else:
                parts.append([row])
                longest, response_tokens = lengths[row], response_lengths[row]
        return [rows[torch.tensor(part, device=rows.device)] for part in parts]

    def run(self, completions: Completions, rows: Tensor, work: Callable[[list[Tensor]], T]) -> T:
        """Calls `work` with the parts of `rows`; if memory runs out, calls it again with parts half as large.

        Raises ResourceError if a single sample does not fit.
        """
        while True:
            parts = self.cut(completions, rows)
            try:
                return work(parts)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if all(len(part) == 1 for part in parts):
                    raise ResourceError(
                        "Out of memory in a forward pass of a single response: lower max_prompt_length or"
                        " max_new_tokens, or see `deep-rlhf plan` for settings that need less."
                    ) from error
            self._halvings += 1
            logger.warning("Out of memory: halving the forward passes from now on.")
            if self._policy.device.type == "cuda":
                torch.cuda.empty_cache()
