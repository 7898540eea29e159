"""AdamW with 8-bit moments (Dettmers et al. 2022); importing this module needs bitsandbytes."""

from bitsandbytes.optim import AdamW8bit
from torch import nn

from deep_rlhf.runtime.optimisers.master import MasterOptimizer

# On a CPU a step unpacks the moments of a whole tensor, so large tensors are split: otherwise stepping the token
# embeddings would take more memory than 8 bits save.
VALUES_PER_TENSOR = 2**20


class MasterAdamW8bit(MasterOptimizer, AdamW8bit):
    """8-bit AdamW on the float32 masters of the parameters; tensors of less than 4,096 values keep 32 bits."""

    def _split_master(self, master: nn.Parameter) -> list[nn.Parameter]:
        return [nn.Parameter(part) for part in master.detach().view(-1).split(VALUES_PER_TENSOR)]
