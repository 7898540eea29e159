"""Log-probabilities of chosen tokens from hidden states, without ever holding [batch, length, vocabulary]."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from deep_rlhf.ops.kl import kl_full


def token_logprobs(logits: Tensor, token_ids: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / T)[token]: logits [..., V], token_ids [...] -> [...] in nats, float32.

    The temperature divides the logits wherever they are used, in sampling and in training alike (Huang et al. 2024).
    """
    scaled = logits.float() / temperature
    return scaled.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1) - scaled.logsumexp(-1)


def entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy of softmax(logits / T) over the last dimension, in nats: H = log Z − Σ p·z.

    A suppressed token (a logit of −inf) adds nothing.
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

    hidden [M, H] states before each token, head maps [m, H] -> [m, V], token_ids [M] -> [M]. In the backward pass
    each chunk's logits are computed again, so memory stays flat at the price of one more product with the head.
    """

    def of_chunk(states: Tensor, ids: Tensor) -> Tensor:
        return token_logprobs(head(states), ids, temperature)

    return _by_chunks(of_chunk, hidden, token_ids, chunk_size)


def chunked_logprobs_and_entropy(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    token_ids: Tensor,
    *,
    temperature: float = 1.0,
    chunk_size: int = 512,
) -> tuple[Tensor, Tensor]:
    """As `chunked_token_logprobs`, and the entropy before each token: (logprobs [M], entropy [M]), both with gradient.

    The logits are made once for both.
    """

    def of_chunk(states: Tensor, ids: Tensor) -> Tensor:
        logits = head(states)
        return torch.stack([token_logprobs(logits, ids, temperature), entropy(logits, temperature)])

    logprobs, entropies = _by_chunks(of_chunk, hidden, token_ids, chunk_size)
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
    logits are alive at any time; both are divided by the temperature. A token suppressed in both adds nothing.
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
    of_chunk: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, token_ids: Tensor, chunk_size: int
) -> Tensor:
    chunks = zip(hidden.split(chunk_size), token_ids.split(chunk_size), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([of_chunk(states, ids) for states, ids in chunks], dim=-1)
    return torch.cat([checkpoint(of_chunk, states, ids, use_reentrant=False) for states, ids in chunks], dim=-1)
