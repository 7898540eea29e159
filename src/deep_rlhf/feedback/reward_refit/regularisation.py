"""L2 regularisation towards the initial weights (L2-SP), with a strength that adapts to over-fitting.

L2 towards zero would erase what the trunk knows of the language, so the trunk is regularised towards the weights that
it started with and only the reward heads towards zero (Li et al. 2018, "L2-SP"). The penalty is decoupled from the
gradient (Loshchilov & Hutter 2019), so that Adam does not rescale it.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback

from deep_rlhf.models.reward import reward_head

LEAST_DECAY, MOST_DECAY = 1.0, 2000.0
MOST_CHANGE = 3.0  # largest factor between the weight decays of two successive refits


class L2SPCallback(TrainerCallback):
    """Moves the weights towards `anchor` by the fraction learning rate × weight decay after every optimiser step."""

    def __init__(self, model: nn.Module, anchor: Mapping[str, Tensor], weight_decay: float) -> None:
        self._weights = [(parameter, anchor[name]) for name, parameter in model.named_parameters() if name in anchor]
        self._weight_decay = weight_decay

    @torch.no_grad()
    def on_optimizer_step(self, *_: Any, optimizer: Any, **__: Any) -> None:
        """Called by transformers.Trainer."""
        fraction = min(1.0, optimizer.param_groups[0]["lr"] * self._weight_decay)
        for parameter, anchor in self._weights:
            parameter.lerp_(anchor.to(parameter.device), fraction)


def anchor_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """The weights that L2-SP draws to: a copy of the current trunk, and zeros for the reward heads."""
    head = {id(parameter) for parameter in reward_head(model).parameters()}
    return {
        name: torch.zeros_like(parameter) if id(parameter) in head else parameter.detach().clone()
        for name, parameter in model.named_parameters()
    }


def adapted_weight_decay(weight_decay: float, ratio: float, bounds: tuple[float, float]) -> float:
    """The weight decay of the next refit (Christiano et al. 2017, §2.2.3).

    `ratio` is held-out loss / training loss. Above `bounds` the decay grows, below it shrinks, within it stays. The
    factor is ln(ratio) / ln(geometric mean of the bounds), and at most 3 or 1/3.
    """
    if not math.isfinite(ratio) or bounds[0] <= ratio <= bounds[1]:
        return weight_decay
    middle = (math.log(bounds[0]) + math.log(bounds[1])) / 2
    factor = min(max(math.log(max(ratio, 1.0)) / middle, 1 / MOST_CHANGE), MOST_CHANGE)
    return min(max(weight_decay * factor, LEAST_DECAY), MOST_DECAY)
