"""Faster kernels for what transformers computes: the same functions, with the same weights and configuration.

Some architectures write out GELU in Python. And PyTorch's default product in float32 on a CPU reached between a quarter
and nine tenths of the rate of oneDNN's, which comes with PyTorch, too (docs/speed.md).
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import FastGELUActivation, NewGELUActivation
from transformers.pytorch_utils import Conv1D

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

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        if _is_for_onednn(input):
            return _Product.apply(input, self.weight, self.bias, False)
        return super().forward(input)


class FastConv1D(Conv1D):
    """transformers' Conv1D, a linear layer whose weight is stored [in, out], by oneDNN where that is faster."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        if _is_for_onednn(x):
            return _Product.apply(x, self.weight, self.bias, True)
        return super().forward(x)


def _is_for_onednn(inputs: Tensor) -> bool:
    """In bfloat16 PyTorch asks oneDNN by itself."""
    plain = inputs.device.type == "cpu" and inputs.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return plain and inputs.numel() > 0 and torch.backends.mkldnn.is_available()


class _Product(torch.autograd.Function):
    """inputs [..., in] by a weight [out, in], or [in, out] if `stored_by_input`, plus a bias [out] or None."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, stored_by_input: bool) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.stored_by_input = stored_by_input
        by_output = weight.t() if stored_by_input else weight
        return torch.ops.mkldnn._linear_pointwise(inputs, by_output, bias, "none", [], "")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        inputs, weight = ctx.saved_tensors
        rows, gradients = inputs.flatten(0, -2), gradient.flatten(0, -2)
        of_inputs = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_inputs = gradient @ (weight.t() if ctx.stored_by_input else weight)
        if ctx.needs_input_grad[1]:
            of_weight = rows.t() @ gradients if ctx.stored_by_input else gradients.t() @ rows
        if ctx.needs_input_grad[2]:
            of_bias = gradients.sum(0)
        return of_inputs, of_weight, of_bias, None
