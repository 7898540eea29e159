"""Rewards of pairs of responses: separately, or both in one sequence after their common prefix, computed once.

A pair is one row, prefix | rest of a | rest of b: `input_ids` [B, T], padded on the right, and `lengths` [B, 3].
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from deep_rlhf.models.reward import reward_head
from deep_rlhf.runtime.memory import token_budget_batches

logger = logging.getLogger(__name__)

WIDTH_MULTIPLE = 32  # of forward passes: oneDNN compiles and keeps kernels for every shape


class PairScorer:
    """Computes the rewards of pairs with a sequence classifier, plain or with adapters."""

    def __init__(self, model: nn.Module, *, pad_token_id: int, longest: int) -> None:
        """`longest`: tokens of the longest text to score."""
        self.pad_token_id = pad_token_id
        self.longest = longest
        self.head = reward_head(model)
        self.shares_prefix = False

    @torch.no_grad()
    def share_prefix(self, model: Any) -> None:
        """Turns on sharing of the common prefix of a pair if it does not change the rewards of `model`.

        Both ways are computed for texts of the maximum length: a model may not be causal, may use a sliding window, or
        may not accept positions and masks.
        """
        vocabulary = model.get_input_embeddings().num_embeddings
        share = max(1, self.longest // 2)
        lengths = torch.tensor([[share, share, share], [1, 2, 1]])
        ids = torch.randint(vocabulary, (2, 3 * share + 1), generator=torch.Generator().manual_seed(0))
        ids[ids == self.pad_token_id] = (self.pad_token_id + 1) % vocabulary
        device = next(model.parameters()).device
        ids, lengths = ids.to(device), lengths.to(device)
        training = model.training
        model.eval()
        try:
            plain = self.rewards(model, ids, lengths, tokens=1)
            self.shares_prefix = True
            shared = self.rewards(model, ids, lengths, tokens=8 * share + 2 * WIDTH_MULTIPLE)
            self.shares_prefix = torch.allclose(shared, plain, atol=1e-4, rtol=1e-4)
        except Exception as error:  # for example from a model that needs an EOS, or accepts no masks or positions
            logger.debug("Prefixes are not shared: %s", error)
            self.shares_prefix = False
        finally:
            model.train(training)

    def tokens(self, lengths: list[list[int]]) -> list[int]:
        """The tokens computed for each pair, including the padding to a multiple of WIDTH_MULTIPLE."""
        return [sum(self._widths(row)) for row in lengths]

    def rewards(self, model: nn.Module, input_ids: Tensor, lengths: Tensor, *, tokens: int) -> Tensor:
        """The rewards [B, 2, K] float32 of both responses, with at most `tokens` tokens in a forward pass.

        `model` is the constructor's, or a wrapper around it. Texts of similar length share a forward pass.
        """
        widths = [width for row in lengths.tolist() for width in self._widths(row)]
        if self.shares_prefix:
            input_ids = nn.functional.pad(input_ids, (0, WIDTH_MULTIPLE), value=self.pad_token_id)
        batches = token_budget_batches(widths, tokens)
        outputs = []
        for batch in batches:
            rows, width = torch.tensor(batch, device=input_ids.device), widths[batch[0]]
            if self.shares_prefix:
                outputs.append(self._shared(model, input_ids[rows, :width], lengths[rows]))
            else:
                outputs.append(self._plain(model, input_ids, lengths, rows, width))
        order = torch.tensor([row for batch in batches for row in batch], device=input_ids.device).argsort()
        return torch.cat(outputs)[order].float().reshape(len(lengths), 2, -1)

    def _widths(self, lengths: list[int]) -> list[int]:
        """The padded widths of the sequences of a pair."""
        prefix, a, b = lengths
        if self.shares_prefix:
            return [_rounded(prefix + a + b)]
        return [max(text, min(_rounded(text), self.longest)) for text in (prefix + a, prefix + b)]

    def _plain(self, model: nn.Module, input_ids: Tensor, lengths: Tensor, sides: Tensor, width: int) -> Tensor:
        """Logits [n, K] of some `sides`: side 2 i is response a of pair i, and side 2 i + 1 its response b."""
        pairs, is_b = sides // 2, sides % 2
        prefix, a, b = lengths[pairs].unbind(1)
        column = torch.arange(width, device=input_ids.device).expand(len(sides), -1)
        real = column < (prefix + torch.where(is_b == 1, b, a))[:, None]
        source = column + torch.where((is_b[:, None] == 1) & (column >= prefix[:, None]), a[:, None], 0)
        ids = input_ids[pairs[:, None], source.where(real, 0)].where(real, self.pad_token_id)
        return model(input_ids=ids, attention_mask=real.long()).logits

    def _shared(self, model: nn.Module, input_ids: Tensor, lengths: Tensor) -> Tensor:
        """Logits [n, 2, K] of whole pairs: b attends to the prefix and itself, and its positions continue the prefix.

        The classifier returns the logits of one token per row, so a hook reads those of every token from its head.
        """
        prefix, a, b = lengths[:, :, None].unbind(1)  # [n, 1]
        column = torch.arange(input_ids.shape[1], device=input_ids.device)
        in_b = column >= prefix + a
        in_a = (column >= prefix) & ~in_b
        hidden = (column[:, None] < column) | (in_b[:, :, None] & in_a[:, None, :])  # [n, T, T]
        dtype = self.head.weight.dtype
        mask = torch.zeros(hidden.shape, dtype=dtype, device=column.device)  # additive: every backend accepts it
        mask.masked_fill_(hidden, torch.finfo(dtype).min)
        positions = torch.where(in_b, (column - a).clamp(max=prefix + b - 1), column)  # in range for padding, too
        with _outputs(self.head) as outputs:
            model(input_ids=input_ids, attention_mask=mask[:, None], position_ids=positions)
        ends = torch.cat([prefix + a, prefix + a + b], dim=1) - 1
        return outputs[0].gather(1, ends[:, :, None].expand(-1, -1, outputs[0].shape[2]))


def _rounded(size: int) -> int:
    return -(-size // WIDTH_MULTIPLE) * WIDTH_MULTIPLE


def common_prefix(a: Tensor, b: Tensor) -> int:
    """The number of common first tokens of two texts; at least one token of each is left to itself."""
    length = min(len(a), len(b)) - 1
    differs = (a[:length] != b[:length]).nonzero()
    return int(differs[0]) if len(differs) else length


@contextmanager
def _outputs(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collects the outputs of `module` until the context ends."""
    outputs: list[Tensor] = []
    handle = module.register_forward_hook(lambda _, __, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()
