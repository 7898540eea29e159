"""Faster kernels for what transformers computes: the same functions, with the same weights and configuration.

Some architectures write out GELU in Python. And PyTorch's default product in float32 on a CPU is slower than oneDNN's,
which comes with PyTorch, too (docs/speed.md, "Kernels").
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import FastGELUActivation, NewGELUActivation
from transformers.pytorch_utils import Conv1D

from deep_rlhf.runtime.precision import multiplies_bf16

# Both write out the tanh approximation of GELU: eight passes over memory, and as many tensors kept.
_TANH_GELU = (NewGELUActivation, FastGELUActivation)


def use_fast_kernels(model: nn.Module) -> None:
    """Replaces written-out GELUs and the products of plain linear layers, in place."""
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, _TANH_GELU):
                setattr(module, name, nn.GELU(approximate="tanh"))
        if type(module) is nn.Linear:
            module.__class__ = FastLinear
        elif type(module) is Conv1D:
            module.__class__ = FastConv1D


class FastLinear(nn.Linear):
    """nn.Linear, by oneDNN where that is faster."""

    adds_gradients = False  # see models.gradients

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        if _is_for_onednn(input, self.weight):
            return _Product.apply(input, self.weight, self.bias, False, self.adds_gradients)
        return super().forward(input)


class FastConv1D(Conv1D):
    """transformers' Conv1D, a linear layer whose weight is stored [in, out], by oneDNN where that is faster."""

    adds_gradients = False

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        if _is_for_onednn(x, self.weight):
            return _Product.apply(x, self.weight, self.bias, True, self.adds_gradients)
        return super().forward(x)


def _is_for_onednn(inputs: Tensor, weight: Tensor) -> bool:
    if inputs.device.type != "cpu" or inputs.dtype != weight.dtype or torch.is_autocast_enabled("cpu"):
        return False
    known = inputs.dtype == torch.float32 or (inputs.dtype == torch.bfloat16 and multiplies_bf16(inputs.device))
    return known and inputs.numel() > 0 and torch.backends.mkldnn.is_available()


class _Product(torch.autograd.Function):
    """inputs [..., in] by a weight [out, in], or [in, out] if `stored_by_input`, plus a bias [out] or None.

    With `adds_gradients` the weight's gradient is added to its `grad`, and autograd is given none.
    """

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, stored_by_input: bool, adds_gradients: bool
    ) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.stored_by_input = stored_by_input
        ctx.adds_to = weight if adds_gradients else None  # what was saved may come back as another tensor
        by_output = weight.t() if stored_by_input else weight
        return torch.ops.mkldnn._linear_pointwise(inputs, by_output, bias, "none", [], "")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        inputs, weight = ctx.saved_tensors
        rows, gradients = inputs.flatten(0, -2), gradient.flatten(0, -2)
        of_inputs = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_inputs = gradient @ (weight.t() if ctx.stored_by_input else weight)
        if ctx.needs_input_grad[1]:
            left, right = (rows.t(), gradients) if ctx.stored_by_input else (gradients.t(), rows)
            if ctx.adds_to is not None:
                _add_to_gradient(ctx.adds_to, left, right)
            else:
                of_weight = left @ right
        if ctx.needs_input_grad[2]:
            of_bias = gradients.sum(0)
        return of_inputs, of_weight, of_bias, None, None


BLOCK = 2**20  # numbers of a gradient made at once: they stay in the processor's cache until they are added


def _add_to_gradient(weight: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds left [out, n] @ right [n, in] to the gradient of a weight [out, in], which may be of a wider format."""
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight, dtype=weight.grad_dtype)
    rows = 1 + BLOCK // weight.shape[1]
    for gradient, part in zip(weight.grad.split(rows), left.split(rows), strict=True):
        if gradient.dtype == right.dtype:
            gradient.addmm_(part, right)
        else:
            gradient.add_(part @ right)
