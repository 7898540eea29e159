"""Looks for weights that are NaN or infinite: none is trained on, and none is ever saved."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from deep_rlhf.errors import NotFiniteError


def check_finite(weights: nn.Module | Iterable[tuple[str, Tensor]], what: str) -> None:
    """Raises NotFiniteError if a weight of a module, or one of these (name, tensor), is NaN or infinite.

    `what` begins the message: "what: the weight NAME contains nan". Each tensor is read once, without a copy.
    """
    named = weights.named_parameters() if isinstance(weights, nn.Module) else weights
    with torch.no_grad():
        for name, weight in named:
            if not weight.is_floating_point() or not weight.numel():  # such as 4-bit weights
                continue
            low, high = (float(bound) for bound in weight.aminmax())  # NaN if one of them is
            for bound in (low, high):
                if not -float("inf") < bound < float("inf"):
                    raise NotFiniteError(f"{what}: the weight {name} contains {bound}.")
