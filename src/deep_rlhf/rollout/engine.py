"""The sampler of this package: key/value cache, like lengths together, and answers that end leave the batch."""

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

from deep_rlhf.data.batching import token_budget_batches
from deep_rlhf.models.policy import Policy
from deep_rlhf.ops.logprobs import entropy, token_logprobs
from deep_rlhf.rollout.sampler import Sampled
from deep_rlhf.types import PromptBatch

CACHE_TOKENS = 16_384  # tokens whose keys and values are held at once: about 1.2 GB for GPT-2 small in float32


class Engine:
    """A `Sampler` over a Policy that lives in this process."""

    def __init__(self, policy: Policy, *, eos_ids: list[int], temperature: float = 1.0) -> None:
        """A response ends after any of `eos_ids`."""
        self.policy = policy
        self.eos_ids = torch.tensor(eos_ids, dtype=torch.int64)
        self.temperature = temperature

    @torch.no_grad()
    def sample(self, prompts: PromptBatch, uniforms: Tensor) -> Sampled:
        count, limit = uniforms.shape
        device = self.policy.device
        result = Sampled(
            response_ids=torch.zeros(count, limit, dtype=torch.int64, device=device),
            response_mask=torch.zeros(count, limit, dtype=torch.bool, device=device),
            logprobs=torch.zeros(count, limit, device=device),
            entropy=torch.zeros(count, limit, device=device),
            finished=torch.zeros(count, dtype=torch.bool, device=device),
        )
        lengths = prompts.mask.sum(1).tolist()
        for rows in token_budget_batches([length + limit for length in lengths], CACHE_TOKENS):
            self._fill(result, torch.tensor(rows, device=device), prompts, uniforms.to(device))
        return _trimmed(result)

    def _fill(self, result: Sampled, rows: Tensor, prompts: PromptBatch, uniforms: Tensor) -> None:
        """Samples the responses of `rows` together, one token a step, until each has ended."""
        used = prompts.mask[rows].any(0)
        decoding = _Decoding(self.policy, prompts.input_ids[rows][:, used], prompts.mask[rows][:, used])
        eos_ids = self.eos_ids.to(rows.device)
        for t in range(uniforms.shape[1]):
            logits = self.policy.head(decoding.hidden)
            tokens = draw(logits, uniforms[rows, t], self.temperature)
            result.response_ids[rows, t] = tokens
            result.response_mask[rows, t] = True
            result.logprobs[rows, t] = token_logprobs(logits, tokens, self.temperature)
            result.entropy[rows, t] = entropy(logits, self.temperature)
            ended = torch.isin(tokens, eos_ids)
            result.finished[rows] = ended
            going_on = (~ended).nonzero().squeeze(1)
            if len(going_on) == 0 or t + 1 == uniforms.shape[1]:
                return
            if len(going_on) < len(rows):
                rows, tokens = rows[going_on], tokens[going_on]
                decoding.keep(going_on)
            decoding.advance(tokens)


class _Decoding:
    """One batch being continued: the cache, the mask, and the hidden state [n, H] before the next token."""

    def __init__(self, policy: Policy, prompt_ids: Tensor, prompt_mask: Tensor) -> None:
        self.policy = policy
        if policy.is_seq2seq:
            start = policy.start_ids(len(prompt_ids))
            self.cache: DynamicCache | EncoderDecoderCache = EncoderDecoderCache(DynamicCache(), DynamicCache())
            self.encoder_states, self.encoder_mask = policy.encode(prompt_ids, prompt_mask), prompt_mask
            self.mask = torch.ones_like(start, dtype=torch.bool)
            self._run(start)
        else:
            self.cache = DynamicCache(config=policy.language_model.config)
            self.mask = prompt_mask
            self._run(prompt_ids)

    def advance(self, tokens: Tensor) -> None:
        """Appends one token [n] to each row."""
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], 1)
        self._run(tokens.unsqueeze(1))

    def keep(self, rows: Tensor) -> None:
        """Goes on with these rows only."""
        self.cache.batch_select_indices(rows)
        self.mask = self.mask[rows]
        if self.policy.is_seq2seq:
            self.encoder_states, self.encoder_mask = self.encoder_states[rows], self.encoder_mask[rows]

    def _run(self, input_ids: Tensor) -> None:
        extra = {}
        if self.policy.is_seq2seq:
            extra = {
                "encoder_hidden_states": self.encoder_states,
                "encoder_attention_mask": self.encoder_mask.long(),
            }
        states = self.policy.run_trunk(input_ids, self.mask, past_key_values=self.cache, use_cache=True, **extra)
        self.hidden = states[:, -1]


def draw(logits: Tensor, uniforms: Tensor, temperature: float) -> Tensor:
    """Inverse-CDF sampling: the first token whose cumulative probability exceeds its uniform; [n, V], [n] -> [n]."""
    cumulative = (logits.float() / temperature).softmax(-1).cumsum(-1)
    threshold = uniforms.unsqueeze(1) * cumulative[:, -1:]  # rounding may leave the total a little off 1
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(1).clamp(max=logits.shape[1] - 1)


def _trimmed(sampled: Sampled) -> Sampled:
    longest = int(sampled.response_mask.sum(1).max())
    return Sampled(
        response_ids=sampled.response_ids[:, :longest],
        response_mask=sampled.response_mask[:, :longest],
        logprobs=sampled.logprobs[:, :longest],
        entropy=sampled.entropy[:, :longest],
        finished=sampled.finished,
    )
