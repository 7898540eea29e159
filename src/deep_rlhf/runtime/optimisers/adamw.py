"""AdamW on float32 master weights, and the choice between 32-bit and 8-bit moments."""

from collections.abc import Iterable
from typing import Any, Literal

import torch

from deep_rlhf.extras import optional_packages
from deep_rlhf.runtime.optimisers.master import MasterOptimizer

OptimizerName = Literal["adamw", "adamw_8bit"]


class MasterAdamW(MasterOptimizer, torch.optim.AdamW):
    """Fused AdamW on the float32 masters of the parameters."""

    def __init__(self, params: Iterable[Any], **options: Any) -> None:
        super().__init__(params, fused=True, **options)


def make_adamw(name: OptimizerName, params: Iterable[Any], **options: Any) -> MasterOptimizer:
    """AdamW with moments in float32 or 8 bits and PyTorch's `options`. Raises ResourceError without bitsandbytes."""
    if name == "adamw":
        return MasterAdamW(params, **options)
    with optional_packages(f"optimizer={name}"):
        from deep_rlhf.runtime.optimisers.adamw_8bit import MasterAdamW8bit
    return MasterAdamW8bit(params, **options)
