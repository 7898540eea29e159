"""Faster linear layers and GELU for transformers models: the same functions, weights and configuration.

Some architectures compute GELU by several operations in Python. On a CPU, PyTorch's default float32 product is slower
than that of oneDNN, which PyTorch contains (docs/speed.md, "Kernels").
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import FastGELUActivation, NewGELUActivation
from transformers.pytorch_utils import Conv1D

from deep_rlhf.accel.cpu.switch import has_fast_linear, is_plain

# Both compute the tanh approximation of GELU in eight operations, each of which keeps a tensor for the backward pass.
_TANH_GELU = (NewGELUActivation, FastGELUActivation)


def use_fast_kernels(model: nn.Module) -> None:
    """Replaces plain linear layers and GELUs computed in Python by faster ones, in place."""
    if is_plain():
        return
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, _TANH_GELU):
                setattr(module, name, nn.GELU(approximate="tanh"))
        if type(module) is nn.Linear:
            module.__class__ = FastLinear
        elif type(module) is Conv1D:
            module.__class__ = FastConv1D


class FastLinear(nn.Linear):
    """nn.Linear computed by oneDNN where that is faster."""

    adds_gradients = False  # set by accel.cpu.gradients.gradients_in_place

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        if _uses_onednn(input, self.weight):
            return _Product.apply(input, self.weight, self.bias, False, self.adds_gradients)
        return super().forward(input)


class FastConv1D(Conv1D):
    """transformers' Conv1D (a linear layer with its weight stored [in, out]), by oneDNN where that is faster."""

    adds_gradients = False

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        if _uses_onednn(x, self.weight):
            return _Product.apply(x, self.weight, self.bias, True, self.adds_gradients)
        return super().forward(x)


def _uses_onednn(inputs: Tensor, weight: Tensor) -> bool:
    if inputs.device.type != "cpu" or inputs.dtype != weight.dtype or torch.is_autocast_enabled("cpu"):
        return False
    return inputs.numel() > 0 and has_fast_linear(inputs.dtype)


class _Product(torch.autograd.Function):
    """inputs [..., in] times a weight [out, in], or [in, out] if `stored_by_input`, plus a bias [out] or None.

    With `adds_gradients` the backward pass adds the weight's gradient to its `grad` and returns None to autograd.
    """

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, stored_by_input: bool, adds_gradients: bool
    ) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.stored_by_input = stored_by_input
        ctx.adds_to = weight if adds_gradients else None  # saved_tensors may return another tensor object
        by_output = weight.t() if stored_by_input else weight
        return torch.ops.mkldnn._linear_pointwise(inputs, by_output, bias, "none", [], "")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        inputs, weight = ctx.saved_tensors
        rows, gradients = inputs.flatten(0, -2), gradient.flatten(0, -2)
        inputs_grad = weight_grad = bias_grad = None
        if ctx.needs_input_grad[0]:
            inputs_grad = gradient @ (weight.t() if ctx.stored_by_input else weight)
        if ctx.needs_input_grad[1]:
            left, right = (rows.t(), gradients) if ctx.stored_by_input else (gradients.t(), rows)
            if ctx.adds_to is not None:
                _add_to_gradient(ctx.adds_to, left, right)
            else:
                weight_grad = left @ right
        if ctx.needs_input_grad[2]:
            bias_grad = gradients.sum(0)
        return inputs_grad, weight_grad, bias_grad, None, None


BLOCK = 2**20  # elements of a gradient computed at once: they stay in the processor's cache until they are added


def _add_to_gradient(weight: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds left [out, n] @ right [n, in] to the gradient of a weight [out, in], which may have a wider dtype."""
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight, dtype=weight.grad_dtype)
    rows = 1 + BLOCK // weight.shape[1]
    for gradient, part in zip(weight.grad.split(rows), left.split(rows), strict=True):
        if gradient.dtype == right.dtype:
            gradient.addmm_(part, right)
        else:
            gradient.add_(part @ right)
