"""Linear layers with packed weights: products of few rows, without gradients.

Sampling multiplies a few rows by every weight, once per token. oneDNN does that faster with weights that were
reordered ("packed") beforehand (docs/speed.md, "Kernels"); packing takes about as long as two such products.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from deep_rlhf.accel.cpu.kernels import FastConv1D, FastLinear
from deep_rlhf.accel.cpu.switch import has_fast_linear

_Linear = FastLinear | FastConv1D


@contextmanager
def packed_weights(model: nn.Module) -> Iterator[None]:
    """Makes the fast linear layers of a model on a CPU use packed copies of their weights, until the context ends.

    The copies take as much memory as the weights, which must not change meanwhile. Gradients are not supported.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, _Linear) and _can_be_packed(layer)]
    for layer in layers:
        vars(layer)["forward"] = _packed_forward(layer)  # hides the method of its class
    try:
        yield
    finally:
        for layer in layers:
            del vars(layer)["forward"]


def _can_be_packed(layer: _Linear) -> bool:
    plain = "forward" not in vars(layer)  # accelerate's hooks hide it, too
    return plain and layer.weight.device.type == "cpu" and has_fast_linear(layer.weight.dtype)


def _packed_forward(layer: _Linear) -> Callable[[Tensor], Tensor]:
    weight = layer.weight.detach()
    by_output = weight.t().contiguous() if isinstance(layer, FastConv1D) else weight  # [out, in]
    packed = torch.ops.mkldnn._reorder_linear_weight(by_output)
    return partial(_product, packed, layer.bias)


def _product(packed: Tensor, bias: Tensor | None, inputs: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(inputs, packed, bias, "none", [], "")
