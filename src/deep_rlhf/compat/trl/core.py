"""Names that scripts import from `trl.core`."""

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TopKLogitsWarper, TopPLogitsWarper, set_seed

__all__ = ["LengthSampler", "respond_to_batch", "set_seed"]


class LengthSampler:
    """Draws a length from min_value, …, max_value − 1, with NumPy's global generator."""

    def __init__(self, min_value: int, max_value: int) -> None:
        self.values = list(range(min_value, max_value))

    def __call__(self) -> int:
        return int(np.random.choice(self.values))


@torch.no_grad()
def respond_to_batch(
    model: nn.Module, queries: Tensor, txt_len: int = 20, top_k: int = 0, top_p: float = 1.0
) -> Tensor:
    """Samples exactly `txt_len` tokens [n, txt_len] after unpadded queries [n, L]; EOS does not end a response."""
    warpers = [TopKLogitsWarper(top_k)] if top_k > 0 else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1.0 else []
    ids = queries
    for _ in range(txt_len):
        logits = model(ids)[0][:, -1].float()
        for warper in warpers:
            logits = warper(ids, logits)
        ids = torch.cat([ids, torch.multinomial(logits.softmax(-1), 1)], 1)
    return ids[:, queries.shape[1] :]
