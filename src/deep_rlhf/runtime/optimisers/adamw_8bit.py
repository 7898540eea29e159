"""AdamW whose two moments take a byte each (Dettmers et al. 2022), by bitsandbytes: import it only where it is used."""

from bitsandbytes.optim import AdamW8bit
from torch import nn

from deep_rlhf.runtime.precision import MasterOptimizer

# A CPU unpacks the moments of a whole tensor to step it, so a table of embeddings would take more than 8 bits save.
VALUES_AT_ONCE = 2**20


class MasterAdamW8bit(MasterOptimizer, AdamW8bit):
    """8-bit AdamW on the float32 masters of the parameters; tensors of less than 4,096 values keep 32 bits."""

    def _parts(self, master: nn.Parameter) -> list[nn.Parameter]:
        return [nn.Parameter(part) for part in master.detach().view(-1).split(VALUES_AT_ONCE)]
