"""How many labels to ask for at each point of a run: many at first, then fewer (Christiano et al. 2017, appendix A)."""

import math
from dataclasses import dataclass
from typing import Protocol

from deep_rlhf.errors import ConfigError


class Schedule(Protocol):
    """The number of labels that are wanted at each point of a run."""

    def due(self, step: float, steps: float) -> int:
        """The number of labels wanted by `step` of `steps`."""
        ...


@dataclass(frozen=True, slots=True)
class LabelSchedule:
    """An initial batch of labels, then a rate proportional to c / (c + t), with `total` labels by the end of the run.

    initial: labels about the start policy (500 on Atari, a quarter of all on MuJoCo). decay: c, in steps; after c steps
    the rate has halved (a tenth of the run on Atari). Raises ConfigError for a value out of range.
    """

    initial: int
    total: int
    decay: float

    def __post_init__(self) -> None:
        if not 0 <= self.initial <= self.total:
            raise ConfigError(f"The initial labels must be 0 to all {self.total}, not {self.initial}.")
        if not self.decay > 0:
            raise ConfigError(f"The decay of the label rate must be above 0 steps, not {self.decay}.")

    def due(self, step: float, steps: float) -> int:
        """As in Schedule: initial + (total − initial) · ln(1 + t/c) / ln(1 + T/c)."""
        if step >= steps:
            return self.total
        share = math.log1p(max(step, 0) / self.decay) / math.log1p(steps / self.decay)
        return self.initial + int((self.total - self.initial) * share)
