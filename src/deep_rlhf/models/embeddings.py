"""The table of token embeddings, whose gradient is as large as the vocabulary however few tokens were read."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


@contextmanager
def one_table_gradient(embedding: nn.Module) -> Iterator[None]:
    """While it lasts, backward passes add the gradient of each token that was read to the table's, and no more.

    Autograd would fill a gradient of the table's size with zeros in each of them, and add all of it to the last one.
    """
    if type(embedding) is not nn.Embedding or not embedding.weight.requires_grad:  # others may scale what they read
        yield
        return

    @torch.no_grad()
    def add(ids: Tensor, gradient: Tensor) -> None:
        weight = embedding.weight
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight, dtype=weight.grad_dtype)
        if embedding.padding_idx is not None:
            gradient = gradient.masked_fill((ids == embedding.padding_idx).unsqueeze(-1), 0.0)
        weight.grad.index_add_(0, ids.flatten(), gradient.flatten(0, -2).to(weight.grad.dtype))

    def cut(_: nn.Module, args: tuple[Tensor, ...], embedded: Tensor) -> Tensor:
        leaf = embedded.detach()
        if torch.is_grad_enabled():
            leaf.requires_grad_().register_hook(partial(add, args[0]))
        return leaf

    handle = embedding.register_forward_hook(cut)
    try:
        yield
    finally:
        handle.remove()


def embed_as(embedding: nn.Module, dtype: torch.dtype) -> RemovableHandle:
    """Embedded tokens are cast to `dtype` until the handle is removed; the table keeps its own."""
    return embedding.register_forward_hook(lambda _, __, embedded: embedded.to(dtype))
