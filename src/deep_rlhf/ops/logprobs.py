"""Log-probabilities, entropy and KL from hidden states, without ever holding [batch, length, vocabulary]."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from deep_rlhf.ops.kl import kl_full


def token_logprobs(logits: Tensor, token_ids: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / T)[token]: logits [..., V], token_ids [...] -> [...] in nats, float32.

    The temperature T divides the logits in sampling and in training alike (Huang et al. 2024).
    """
    scaled = logits.float() / temperature
    return scaled.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1) - scaled.logsumexp(-1)


def entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy of softmax(z), z = logits / T, in nats: H = log Σ exp z − Σ p·z; [..., V] -> [...].

    A suppressed token (a logit of −inf) contributes 0.
    """
    # −inf · 0 would be NaN; the lowest finite number · 0 is 0
    scaled = (logits.float() / temperature).clamp(min=torch.finfo(torch.float32).min)
    return scaled.logsumexp(-1) - (scaled.softmax(-1) * scaled).sum(-1)


def chunked_token_logprobs(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    token_ids: Tensor,
    *,
    temperature: float = 1.0,
    chunk_size: int = 512,
) -> Tensor:
    """`token_logprobs(head(hidden), token_ids)` with at most [chunk_size, V] logits alive at any time.

    hidden [M, H] states before each token, head maps [m, H] -> [m, V], token_ids [M] -> [M] in nats. A single chunk
    keeps its logits for the backward pass; several are recomputed there, which bounds memory at the cost of one more
    product with the head. It cannot be differentiated twice.
    """

    def logprobs_of(states: Tensor, ids: Tensor) -> Tensor:
        return _TokenLogprobs.apply(head(states), ids, temperature)

    return _by_chunks(logprobs_of, hidden, token_ids, chunk_size)


def chunked_logprobs_and_entropy(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    token_ids: Tensor,
    *,
    temperature: float = 1.0,
    chunk_size: int = 512,
) -> tuple[Tensor, Tensor]:
    """`chunked_token_logprobs` and the entropy of each token's distribution from the same logits.

    Returns (logprobs [M], entropy [M]) in nats, both with gradients.
    """

    def both_of(states: Tensor, ids: Tensor) -> Tensor:
        logits = head(states)
        return torch.stack([token_logprobs(logits, ids, temperature), entropy(logits, temperature)])

    logprobs, entropies = _by_chunks(both_of, hidden, token_ids, chunk_size)
    return logprobs, entropies


def chunked_kl_full(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    ref_hidden: Tensor,
    ref_head: Callable[[Tensor], Tensor],
    *,
    temperature: float = 1.0,
    chunk_size: int = 512,
) -> Tensor:
    """`kl_full` of the next token under policy and reference, [M] in nats, float32, without gradient.

    hidden and ref_hidden [M, H] states before each token; the heads map [m, H] -> [m, V]. At most two [chunk_size, V]
    logits are alive at any time; both are divided by the temperature. A token suppressed in both contributes 0.
    """
    with torch.no_grad():
        return torch.cat(
            [
                kl_full(
                    (head(states).float() / temperature).log_softmax(1),
                    (ref_head(ref_states).float() / temperature).log_softmax(1),
                )
                for states, ref_states in zip(hidden.split(chunk_size), ref_hidden.split(chunk_size), strict=True)
            ]
        )


def _by_chunks(
    function: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, token_ids: Tensor, chunk_size: int
) -> Tensor:
    chunks = list(zip(hidden.split(chunk_size), token_ids.split(chunk_size), strict=True))
    if len(chunks) == 1 or not torch.is_grad_enabled():
        return torch.cat([function(states, ids) for states, ids in chunks], dim=-1)
    return torch.cat([checkpoint(function, states, ids, use_reentrant=False) for states, ids in chunks], dim=-1)


class _TokenLogprobs(torch.autograd.Function):
    """`token_logprobs` of logits [m, V] that saves only the logits and overwrites them with their gradient.

    Plain autograd would save four tensors of that size and pass over memory ten times instead of three.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, token_ids: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward(logits, token_ids)
        ctx.temperature = temperature
        logprobs = torch.empty(len(logits), device=logits.device)
        for rows in _blocks(logits):
            distribution = scaled(logits[rows], temperature).log_softmax(1)
            logprobs[rows] = distribution.gather(1, token_ids[rows].unsqueeze(1)).squeeze(1)
        return logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        logits, token_ids = ctx.saved_tensors
        ctx.maybe_clear_saved_tensors()  # they are overwritten below
        scale = gradient / -ctx.temperature
        for rows in _blocks(logits):
            # d log p(token) / d logit_v = 1[v = token] − p(v)
            difference = scaled(logits[rows], ctx.temperature).softmax(1)
            difference.scatter_add_(1, token_ids[rows].unsqueeze(1), difference.new_full((len(difference), 1), -1.0))
            logits[rows] = difference.mul_(scale[rows].unsqueeze(1))
        return logits, None, None


BLOCK = 524_288  # logits processed at once on a CPU: 2 MB in float32 stay in its cache


def _blocks(logits: Tensor) -> Iterator[slice]:
    """Slices of the rows of logits [m, V]; a single slice on a GPU."""
    count, width = logits.shape
    size = 1 + (BLOCK // width if logits.device.type == "cpu" else count)
    return (slice(start, start + size) for start in range(0, count, size))


def scaled(logits: Tensor, temperature: float) -> Tensor:
    """logits / temperature in float32; the logits themselves if they are unchanged, else a copy."""
    if temperature == 1.0:
        return logits.float()
    return logits / temperature if logits.dtype == torch.float32 else logits.float().div_(temperature)
