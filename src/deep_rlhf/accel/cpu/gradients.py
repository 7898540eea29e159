"""Accumulates gradients of weights in place, instead of allocating a new gradient in each backward pass."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from deep_rlhf.accel.cpu.kernels import FastConv1D, FastLinear
from deep_rlhf.accel.cpu.switch import has_gradients_in_place


@contextmanager
def gradients_in_place(model: Any) -> Iterator[None]:
    """Makes backward passes of a transformers model or a peft.PeftModel add to `grad` directly, until the context ends.

    This concerns linear layers with fast kernels and the token embeddings. It does not work with torch.autograd.grad.
    """
    if not has_gradients_in_place():
        yield
        return
    layers = [module for module in model.modules() if isinstance(module, FastLinear | FastConv1D) and _is_free(module)]
    for layer in layers:
        layer.adds_gradients = True
    try:
        with _embeddings_in_place(model.get_input_embeddings()):
            yield
    finally:
        for layer in layers:
            layer.adds_gradients = False


def _is_free(layer: Any) -> bool:
    """Whether no hook reads the gradient of its weight."""
    return not (layer.weight._backward_hooks or layer.weight._post_accumulate_grad_hooks)


@contextmanager
def _embeddings_in_place(embedding: nn.Module) -> Iterator[None]:
    """Collects the gradients of the embedded tokens and adds them to the embedding's gradient at the end.

    Autograd would fill a gradient of the whole embedding with zeros in each backward pass, and add all of it.
    """
    if type(embedding) is not nn.Embedding or not embedding.weight.requires_grad or not _is_free(embedding):
        yield  # a subclass may scale the embedding
        return
    pending = _PendingGradients(embedding)

    def cut(_: nn.Module, args: tuple[Tensor, ...], embedded: Tensor) -> Tensor:
        leaf = embedded.detach()
        if torch.is_grad_enabled():
            leaf.requires_grad_().register_hook(partial(pending.add, args[0]))
        return leaf

    handle = embedding.register_forward_hook(cut)
    try:
        yield
        pending.flush()
    finally:
        handle.remove()


class _PendingGradients:
    """Gradients of embedded tokens, not yet added to the embedding's; at most a quarter as many as it has rows."""

    def __init__(self, embedding: nn.Embedding) -> None:
        self.embedding = embedding
        self.parts: list[tuple[Tensor, Tensor]] = []

    def add(self, ids: Tensor, gradient: Tensor) -> None:
        """ids [...], gradient [..., H]."""
        if self.embedding.padding_idx is not None:
            gradient = gradient.masked_fill((ids == self.embedding.padding_idx).unsqueeze(-1), 0.0)
        self.parts.append((ids.flatten(), gradient.flatten(0, -2)))
        if sum(len(part) for part, _ in self.parts) > self.embedding.num_embeddings // 4:
            self.flush()

    @torch.no_grad()
    def flush(self) -> None:
        """Adds the pending gradients to the embedding's gradient."""
        weight = self.embedding.weight
        for ids, gradient in self.parts:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight, dtype=weight.grad_dtype)
            weight.grad.index_add_(0, ids, gradient.to(weight.grad.dtype))
        self.parts.clear()
