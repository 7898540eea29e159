"""The switch of the fast CPU code: which parts work here. Without them the package falls back to plain PyTorch.

The fast code uses private operators of PyTorch (oneDNN's linear layers and weight packing, the gradient of softmax),
`Tensor.grad_dtype` and glibc's `mallopt`; a release, a build or a platform may lack any of them.
DEEP_RLHF_PLAIN=1 in the environment turns all of it off.
"""

import ctypes
import logging
import os
import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor

from deep_rlhf.runtime.precision import multiplies_bf16

logger = logging.getLogger(__name__)

PLAIN_VARIABLE = "DEEP_RLHF_PLAIN"
CPU = torch.device("cpu")


def is_plain() -> bool:
    """Whether DEEP_RLHF_PLAIN turns all fast code off."""
    return os.environ.get(PLAIN_VARIABLE, "") not in ("", "0")


def has_fast_linear(dtype: torch.dtype) -> bool:
    """Whether linear layers in `dtype` may use oneDNN's private operators on this CPU."""
    return linear_operators_work(dtype) and not is_plain()


def has_fast_attention() -> bool:
    """Whether attention may be computed by matrix products with our own backward pass."""
    return not is_plain() and hasattr(torch, "_softmax_backward_data")


def has_gradients_in_place() -> bool:
    """Whether backward passes may add to the gradients of weights themselves."""
    return not is_plain() and hasattr(Tensor, "grad_dtype")


def libc_function(name: str) -> Any:
    """A function of the C library that controls its allocator, or None where it has none of that name."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" and not is_plain() else None


@cache
def linear_operators_work(dtype: torch.dtype) -> bool:
    """Whether oneDNN's private linear operators exist, are fast in `dtype`, and give the right product; tried once."""
    fast = dtype == torch.float32 or (dtype == torch.bfloat16 and multiplies_bf16(CPU))
    if not fast or not torch.backends.mkldnn.is_available():
        return False
    inputs = torch.linspace(-1, 1, 3 * 8, device=CPU).reshape(3, 8).to(dtype)
    weight = torch.linspace(1, -2, 4 * 8, device=CPU).reshape(4, 8).to(dtype)
    bias = torch.linspace(0, 1, 4, device=CPU).to(dtype)
    expected = inputs.float() @ weight.float().t() + bias.float()
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    try:
        with torch.no_grad():
            packed = torch.ops.mkldnn._reorder_linear_weight(weight)
            for form in (weight, packed):
                product = torch.ops.mkldnn._linear_pointwise(inputs, form, bias, "none", [], "").float()
                if not torch.allclose(product, expected, atol=tolerance, rtol=tolerance):
                    raise RuntimeError("the product is wrong")
    except (AttributeError, NotImplementedError, RuntimeError, TypeError) as error:
        logger.warning("The fast kernels for %s do not work here; plain PyTorch is used: %s", dtype, error)
        return False
    return True
