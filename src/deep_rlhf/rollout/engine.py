"""The sampler: key/value cache, batches of similar lengths, and finished responses leave the batch."""

import logging
import sys

import torch
from torch import Tensor

from deep_rlhf.accel.cpu.attention import fast_attention
from deep_rlhf.accel.cpu.packed import packed_weights
from deep_rlhf.errors import ResourceError
from deep_rlhf.models.policy import Policy
from deep_rlhf.rollout.decoding import Decoding, bytes_per_token
from deep_rlhf.rollout.sampler import Sampled, draw_tokens
from deep_rlhf.runtime.memory import is_out_of_memory, token_budget_batches
from deep_rlhf.types import PromptBatch

logger = logging.getLogger(__name__)

CPU_BYTES = 2**30  # memory for the rows sampled together on a CPU; more rows would not make a step more efficient
GPU_SHARE = 0.5  # share of the free memory for the rows sampled together on a GPU
COMPACT_AT = 0.75  # share of unfinished rows at which finished rows leave the batch, which copies the others' cache


class Engine:
    """A `Sampler` that runs a Policy in this process."""

    def __init__(
        self, policy: Policy, *, eos_ids: list[int], temperature: float = 1.0, keep_states: bool = False
    ) -> None:
        """A response ends after any of `eos_ids`. With `keep_states`, samples include `Sampled.states`."""
        self.policy = policy
        self.eos_ids = torch.tensor(eos_ids, dtype=torch.int64)
        self.temperature = temperature
        self.keep_states = keep_states
        self._max_rows = sys.maxsize  # per batch; halved when memory runs out

    @torch.no_grad()
    def sample(self, prompts: PromptBatch, uniforms: Tensor) -> Sampled:
        """See `Sampler`. If memory runs out, the same responses are drawn in smaller batches.

        Raises ResourceError if a single response does not fit.
        """
        uniforms = uniforms.to(self.policy.device)
        parts: list[tuple[Tensor, Sampled]] = []
        with packed_weights(self.policy), fast_attention(self.policy.dtype, self.policy.device):
            pending = self._batches(prompts, uniforms.shape[1])
            while pending:
                rows = pending.pop(0)
                part = self._sample_if_it_fits(prompts, uniforms, rows)
                if part is None:
                    self._max_rows = len(rows) // 2
                    logger.warning("Out of memory: sampling %d responses at a time from now on.", self._max_rows)
                    pending = [half for batch in [rows, *pending] for half in batch.split(self._max_rows)]
                else:
                    parts.append((rows, part))
        return _merge_parts(parts)

    def _batches(self, prompts: PromptBatch, limit: int) -> list[Tensor]:
        """Rows of similar prompt lengths that are sampled together."""
        device = self.policy.device
        budget = _budget(device)
        token_bytes = bytes_per_token(self.policy)
        vocabulary = self.policy.language_model.get_output_embeddings().weight.shape[0]
        logit_bytes = 4 * 4 * vocabulary  # float32: logits, logarithms, probabilities, and one temporary
        lengths = prompts.mask.sum(1).tolist()
        batches = token_budget_batches([(length + limit) * token_bytes + logit_bytes for length in lengths], budget)
        return [part for batch in batches for part in torch.tensor(batch, device=device).split(self._max_rows)]

    def _sample_if_it_fits(self, prompts: PromptBatch, uniforms: Tensor, rows: Tensor) -> Sampled | None:
        """None if memory ran out and the rows can be halved; the attempt's memory is free again on return."""
        used = prompts.mask[rows].any(0)
        try:
            return self._sample_together(prompts.input_ids[rows][:, used], prompts.mask[rows][:, used], uniforms[rows])
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if len(rows) == 1:
                raise ResourceError(
                    "Out of memory while sampling a single response: lower max_prompt_length or max_new_tokens."
                ) from error
            return None

    def _sample_together(self, prompt_ids: Tensor, prompt_mask: Tensor, uniforms: Tensor) -> Sampled:
        """Samples responses [n, R] one token per step, until each has ended."""
        decoding = Decoding(self.policy, prompt_ids, prompt_mask, uniforms.shape[1])
        result = _empty_sample(uniforms, decoding.hidden if self.keep_states else None)
        eos_ids = self.eos_ids.to(uniforms.device)
        rows = torch.arange(len(uniforms), device=uniforms.device)  # those in the batch, some of which are finished
        finished = torch.zeros_like(rows, dtype=torch.bool)
        for t in range(uniforms.shape[1]):
            drawn = draw_tokens(self.policy.head(decoding.hidden), uniforms[rows, t], self.temperature)
            tokens = drawn.token_ids
            result.response_ids[rows, t] = tokens
            result.response_mask[rows, t] = ~finished
            result.logprobs[rows, t] = drawn.logprobs
            result.entropy[rows, t] = drawn.entropy
            if result.states is not None:
                result.states[rows, t] = decoding.hidden
            finished |= torch.isin(tokens, eos_ids)
            result.finished[rows] = finished
            unfinished = (~finished).nonzero().squeeze(1)
            if len(unfinished) == 0 or t + 1 == uniforms.shape[1]:
                break
            if len(unfinished) <= COMPACT_AT * len(rows):
                rows, tokens, finished = rows[unfinished], tokens[unfinished], finished[unfinished]
                decoding.keep(unfinished)
            decoding.advance(tokens)
        return result


def _budget(device: torch.device) -> int:
    """Bytes for the rows that are sampled together; on a GPU, memory that PyTorch caches counts as free."""
    if device.type != "cuda":
        return CPU_BYTES
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(GPU_SHARE * (torch.cuda.mem_get_info(device)[0] + cached))


def _empty_sample(uniforms: Tensor, hidden: Tensor | None) -> Sampled:
    zeros = torch.zeros_like(uniforms, dtype=torch.float32)
    return Sampled(
        response_ids=torch.zeros_like(uniforms, dtype=torch.int64),
        response_mask=torch.zeros_like(uniforms, dtype=torch.bool),
        logprobs=zeros,
        entropy=zeros.clone(),
        finished=torch.zeros_like(uniforms[:, 0], dtype=torch.bool),
        states=None if hidden is None else hidden.new_zeros(*uniforms.shape, hidden.shape[-1]),
    )


def _merge_parts(parts: list[tuple[Tensor, Sampled]]) -> Sampled:
    """The rows of all parts in their original order, cut to the longest response, with 0 outside the mask."""
    order = torch.cat([rows for rows, _ in parts]).argsort()
    mask = torch.cat([part.response_mask for _, part in parts])[order]
    longest = int(mask.sum(1).max())
    mask = mask[:, :longest]

    def merged(name: str) -> Tensor:
        values = torch.cat([getattr(part, name)[:, :longest] for _, part in parts])[order]
        return values.masked_fill_(~mask.reshape(mask.shape + (1,) * (values.dim() - 2)), 0)

    return Sampled(
        response_ids=merged("response_ids"),
        response_mask=mask,
        logprobs=merged("logprobs"),
        entropy=merged("entropy"),
        finished=torch.cat([part.finished for _, part in parts])[order],
        states=None if parts[0][1].states is None else merged("states"),
    )
