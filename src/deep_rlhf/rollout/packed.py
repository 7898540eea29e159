"""Matrix products with few rows on a CPU: weights in the layout that oneDNN reads fastest.

Sampling multiplies a handful of rows by every weight, once for each token. oneDNN does that faster with weights
that were packed beforehand (docs/speed.md, "Kernels"); packing costs about two such products.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from deep_rlhf.accel.cpu.kernels import FastConv1D, FastLinear
from deep_rlhf.runtime.precision import multiplies_bf16

_Linear = FastLinear | FastConv1D


@contextmanager
def packed_weights(model: nn.Module) -> Iterator[None]:
    """Within, a model on a CPU computes its plain linear layers from packed copies of the weights, without gradients.

    The copies take as much memory as those weights. The weights must not change meanwhile.
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
    weight = layer.weight
    known = weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and multiplies_bf16(weight.device))
    plain = "forward" not in vars(layer)  # accelerate's hooks hide it, too
    return weight.device.type == "cpu" and known and plain and torch.backends.mkldnn.is_available()


def _packed_forward(layer: _Linear) -> Callable[[Tensor], Tensor]:
    weight = layer.weight.detach()
    by_output = weight.t().contiguous() if isinstance(layer, FastConv1D) else weight  # [out, in]
    packed = torch.ops.mkldnn._reorder_linear_weight(by_output)
    return partial(_product, packed, layer.bias)


def _product(packed: Tensor, bias: Tensor | None, inputs: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(inputs, packed, bias, "none", [], "")
