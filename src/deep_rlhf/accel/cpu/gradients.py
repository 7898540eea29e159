"""Gradients of weights, added where they are kept: not made anew in each backward pass and added to the last ones."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from deep_rlhf.accel.cpu.kernels import FastConv1D, FastLinear


@contextmanager
def gradients_in_place(model: Any) -> Iterator[None]:
    """Within, backward passes of a transformers model or a peft.PeftModel add to `grad` directly where they can.

    That is in linear layers with fast kernels and in the table of token embeddings. Not for torch.autograd.grad, which
    returns gradients instead.
    """
    layers = [module for module in model.modules() if isinstance(module, FastLinear | FastConv1D) and _is_free(module)]
    for layer in layers:
        layer.adds_gradients = True
    try:
        with _of_table(model.get_input_embeddings()):
            yield
    finally:
        for layer in layers:
            layer.adds_gradients = False


def _is_free(layer: Any) -> bool:
    """Whether nobody waits for the gradient of its weight."""
    return not (layer.weight._backward_hooks or layer.weight._post_accumulate_grad_hooks)


@contextmanager
def _of_table(embedding: nn.Module) -> Iterator[None]:
    """While it lasts, backward passes keep the gradients of tokens that were read, which join the table's at the end.

    Autograd would fill a gradient of the table's size with zeros in each of them, and add all of it to the last one.
    """
    if type(embedding) is not nn.Embedding or not embedding.weight.requires_grad or not _is_free(embedding):
        yield  # others may scale what they read
        return
    read = _Read(embedding)

    def cut(_: nn.Module, args: tuple[Tensor, ...], embedded: Tensor) -> Tensor:
        leaf = embedded.detach()
        if torch.is_grad_enabled():
            leaf.requires_grad_().register_hook(partial(read.add, args[0]))
        return leaf

    handle = embedding.register_forward_hook(cut)
    try:
        yield
        read.join()
    finally:
        handle.remove()


class _Read:
    """Gradients of tokens that were read from a table: no more of them than a quarter of its rows."""

    def __init__(self, embedding: nn.Embedding) -> None:
        self.embedding = embedding
        self.parts: list[tuple[Tensor, Tensor]] = []

    def add(self, ids: Tensor, gradient: Tensor) -> None:
        """ids [...], gradient [..., H]."""
        if self.embedding.padding_idx is not None:
            gradient = gradient.masked_fill((ids == self.embedding.padding_idx).unsqueeze(-1), 0.0)
        self.parts.append((ids.flatten(), gradient.flatten(0, -2)))
        if sum(len(part) for part, _ in self.parts) > self.embedding.num_embeddings // 4:
            self.join()

    @torch.no_grad()
    def join(self) -> None:
        """Adds what is kept to the table's gradient."""
        weight = self.embedding.weight
        for ids, gradient in self.parts:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight, dtype=weight.grad_dtype)
            weight.grad.index_add_(0, ids, gradient.to(weight.grad.dtype))
        self.parts.clear()
