"""The sampler of this package: key/value cache, like lengths together, and answers that end leave the batch."""

import logging
import sys
from typing import NamedTuple

import torch
from torch import Tensor

from deep_rlhf.accel.cpu.attention import fast_attention
from deep_rlhf.data.batching import token_budget_batches
from deep_rlhf.errors import UserError
from deep_rlhf.models.policy import Policy
from deep_rlhf.ops.logprobs import scaled
from deep_rlhf.rollout.decoding import Decoding, bytes_per_token
from deep_rlhf.rollout.packed import packed_weights
from deep_rlhf.rollout.sampler import Sampled
from deep_rlhf.runtime.memory import is_out_of_memory
from deep_rlhf.types import PromptBatch

logger = logging.getLogger(__name__)

CPU_BYTES = 2**30  # for the rows sampled together on a CPU: more rows would not make a step more efficient
GPU_SHARE = 0.5  # of the free memory, for the same on a GPU
LEAVE_AT = 0.75  # ended rows leave the batch when this share of it is going on: leaving copies the cache of the others


class Engine:
    """A `Sampler` over a Policy that lives in this process."""

    def __init__(
        self, policy: Policy, *, eos_ids: list[int], temperature: float = 1.0, keep_states: bool = False
    ) -> None:
        """A response ends after any of `eos_ids`. `keep_states` asks for `Sampled.states`."""
        self.policy = policy
        self.eos_ids = torch.tensor(eos_ids, dtype=torch.int64)
        self.temperature = temperature
        self.keep_states = keep_states
        self._most_rows = sys.maxsize  # at once; halved when memory runs out

    @torch.no_grad()
    def sample(self, prompts: PromptBatch, uniforms: Tensor) -> Sampled:
        """See `Sampler`. Where memory runs out, the same responses are drawn in smaller batches.

        Raises UserError when not even one response fits.
        """
        uniforms = uniforms.to(self.policy.device)
        parts: list[tuple[Tensor, Sampled]] = []
        with packed_weights(self.policy), fast_attention(self.policy.dtype, self.policy.device):
            pending = self._batches(prompts, uniforms.shape[1])
            while pending:
                rows = pending.pop(0)
                part = self._sample_if_it_fits(prompts, uniforms, rows)
                if part is None:
                    self._most_rows = len(rows) // 2
                    logger.warning("Out of memory: from now on %d responses are sampled at a time.", self._most_rows)
                    pending = [half for batch in [rows, *pending] for half in batch.split(self._most_rows)]
                else:
                    parts.append((rows, part))
        return _joined(parts)

    def _batches(self, prompts: PromptBatch, limit: int) -> list[Tensor]:
        """Rows of like length that are sampled together."""
        device = self.policy.device
        budget = _budget(device)
        of_token = bytes_per_token(self.policy)
        vocabulary = self.policy.language_model.get_output_embeddings().weight.shape[0]
        of_logits = 4 * 4 * vocabulary  # float32 logits, logarithms, probabilities, and one more while they are made
        lengths = prompts.mask.sum(1).tolist()
        batches = token_budget_batches([(length + limit) * of_token + of_logits for length in lengths], budget)
        return [part for batch in batches for part in torch.tensor(batch, device=device).split(self._most_rows)]

    def _sample_if_it_fits(self, prompts: PromptBatch, uniforms: Tensor, rows: Tensor) -> Sampled | None:
        """None where memory ran out and the rows can be halved; what the attempt held is free again on return."""
        used = prompts.mask[rows].any(0)
        try:
            return self._sample_together(prompts.input_ids[rows][:, used], prompts.mask[rows][:, used], uniforms[rows])
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if len(rows) == 1:
                raise UserError(
                    "Memory runs out while a single response is sampled: lower max_prompt_length or max_new_tokens."
                ) from error
            return None

    def _sample_together(self, prompt_ids: Tensor, prompt_mask: Tensor, uniforms: Tensor) -> Sampled:
        """Responses [n, R] sampled one token a step, until each has ended."""
        decoding = Decoding(self.policy, prompt_ids, prompt_mask, uniforms.shape[1])
        result = _nothing_yet(uniforms, decoding.hidden if self.keep_states else None)
        eos_ids = self.eos_ids.to(uniforms.device)
        rows = torch.arange(len(uniforms), device=uniforms.device)  # those in the batch, some of which have ended
        ended = torch.zeros_like(rows, dtype=torch.bool)
        for t in range(uniforms.shape[1]):
            drawn = draw(self.policy.head(decoding.hidden), uniforms[rows, t], self.temperature)
            tokens = drawn.token_ids
            result.response_ids[rows, t] = tokens
            result.response_mask[rows, t] = ~ended
            result.logprobs[rows, t] = drawn.logprobs
            result.entropy[rows, t] = drawn.entropy
            if result.states is not None:
                result.states[rows, t] = decoding.hidden
            ended |= torch.isin(tokens, eos_ids)
            result.finished[rows] = ended
            going_on = (~ended).nonzero().squeeze(1)
            if len(going_on) == 0 or t + 1 == uniforms.shape[1]:
                break
            if len(going_on) <= LEAVE_AT * len(rows):
                rows, tokens, ended = rows[going_on], tokens[going_on], ended[going_on]
                decoding.keep(going_on)
            decoding.advance(tokens)
        return result


def _budget(device: torch.device) -> int:
    """Bytes for the rows that are sampled together; on a GPU what PyTorch keeps for later is free, too."""
    if device.type != "cuda":
        return CPU_BYTES
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(GPU_SHARE * (torch.cuda.mem_get_info(device)[0] + kept))


class Drawn(NamedTuple):
    """One token for each of n rows, with what the distribution says of it."""

    token_ids: Tensor  # [n] int64
    logprobs: Tensor  # [n] nats
    entropy: Tensor  # [n] nats, of the distribution


def draw(logits: Tensor, uniforms: Tensor, temperature: float) -> Drawn:
    """Inverse-CDF sampling: the first token whose cumulative probability exceeds its uniform; [n, V], [n] -> [n]."""
    log_distribution = scaled(logits, temperature).log_softmax(-1)
    # −inf · 0 would be NaN; the lowest finite number · 0 is 0
    log_distribution.clamp_(min=torch.finfo(torch.float32).min)
    distribution = log_distribution.exp()
    entropy = -(distribution.unsqueeze(1) @ log_distribution.unsqueeze(2)).flatten()
    cumulative = distribution.cumsum_(-1)
    threshold = uniforms.unsqueeze(1) * cumulative[:, -1:]  # rounding may leave the total a little off 1
    token_ids = torch.searchsorted(cumulative, threshold, right=True).clamp(max=logits.shape[1] - 1)
    return Drawn(token_ids.squeeze(1), log_distribution.gather(1, token_ids).squeeze(1), entropy)


def _nothing_yet(uniforms: Tensor, hidden: Tensor | None) -> Sampled:
    zeros = torch.zeros_like(uniforms, dtype=torch.float32)
    return Sampled(
        response_ids=torch.zeros_like(uniforms, dtype=torch.int64),
        response_mask=torch.zeros_like(uniforms, dtype=torch.bool),
        logprobs=zeros,
        entropy=zeros.clone(),
        finished=torch.zeros_like(uniforms[:, 0], dtype=torch.bool),
        states=None if hidden is None else hidden.new_zeros(*uniforms.shape, hidden.shape[-1]),
    )


def _joined(parts: list[tuple[Tensor, Sampled]]) -> Sampled:
    """The rows of all parts in their places, without the columns that no response reaches, and 0 after each end."""
    order = torch.cat([rows for rows, _ in parts]).argsort()
    mask = torch.cat([part.response_mask for _, part in parts])[order]
    longest = int(mask.sum(1).max())
    mask = mask[:, :longest]

    def real(name: str) -> Tensor:
        values = torch.cat([getattr(part, name)[:, :longest] for _, part in parts])[order]
        return values.masked_fill_(~mask.reshape(mask.shape + (1,) * (values.dim() - 2)), 0)

    return Sampled(
        response_ids=real("response_ids"),
        response_mask=mask,
        logprobs=real("logprobs"),
        entropy=real("entropy"),
        finished=torch.cat([part.finished for _, part in parts])[order],
        states=None if parts[0][1].states is None else real("states"),
    )
