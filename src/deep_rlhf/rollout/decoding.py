"""Decodes a batch of prompts one token at a time."""

import torch
from torch import Tensor

from deep_rlhf.models.policy import Policy
from deep_rlhf.rollout.cache import cached_bytes, empty_cache


class Decoding:
    """The cache and mask of a batch, and the hidden state before the next token of each row."""

    hidden: Tensor  # [n, H]

    def __init__(self, policy: Policy, prompt_ids: Tensor, prompt_mask: Tensor, limit: int) -> None:
        """Runs prompts [n, P] for responses of at most `limit` tokens; equal prompts are computed once."""
        distinct, inverse = torch.where(prompt_mask, prompt_ids, -1).unique(dim=0, return_inverse=True)
        repeat = len(distinct) < len(prompt_ids)
        if repeat:
            first = torch.empty(len(distinct), dtype=torch.int64, device=inverse.device)
            first[inverse] = torch.arange(len(inverse), device=inverse.device)
            prompt_ids, prompt_mask = prompt_ids[first], prompt_mask[first]
        self.policy = policy
        if policy.is_seq2seq:
            start = policy.start_ids(len(prompt_ids))
            self.cache = empty_cache(policy, limit)
            self.encoder_states, self.encoder_mask = policy.encode(prompt_ids, prompt_mask), prompt_mask
            self.mask = torch.ones_like(start, dtype=torch.bool)
            self._run(start)
        else:
            self.cache = empty_cache(policy, prompt_ids.shape[1] + limit - 1)  # the last token is not fed back
            self.mask = prompt_mask
            self._run(prompt_ids)
        if repeat:
            self.keep(inverse)

    def advance(self, tokens: Tensor) -> None:
        """Appends one token [n] to each row."""
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], 1)
        self._run(tokens.unsqueeze(1))

    def keep(self, rows: Tensor) -> None:
        """Keeps these rows, in this order; a row may occur more than once."""
        self.cache.batch_select_indices(rows)
        self.mask, self.hidden = self.mask[rows], self.hidden[rows]
        if self.policy.is_seq2seq:
            self.encoder_states, self.encoder_mask = self.encoder_states[rows], self.encoder_mask[rows]

    def _run(self, input_ids: Tensor) -> None:
        encoder = {}
        if self.policy.is_seq2seq:
            encoder = {
                "encoder_hidden_states": self.encoder_states,
                "encoder_attention_mask": self.encoder_mask.long(),
            }
        states = self.policy.run_trunk(input_ids, self.mask, past_key_values=self.cache, use_cache=True, **encoder)
        self.hidden = states[:, -1]


def bytes_per_token(policy: Policy) -> int:
    """Bytes of the cache per token, measured on a prompt of one token (an upper bound for some layers)."""
    one = torch.zeros(1, 1, dtype=torch.int64, device=policy.device)
    decoding = Decoding(policy, one, torch.ones_like(one, dtype=torch.bool), 1)
    tokens = 2 if policy.is_seq2seq else 1  # the decoder also reads its start token
    return cached_bytes(decoding.cache) // tokens
