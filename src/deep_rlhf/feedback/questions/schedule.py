"""When to ask for how many labels: many at first, then fewer and fewer (Christiano et al. 2017, appendix A)."""

import math
from dataclasses import dataclass

from deep_rlhf.errors import UserError


@dataclass(frozen=True, slots=True)
class LabelSchedule:
    """An initial batch of labels, then a rate ∝ c / (c + t), which brings the sum to `total` when the run ends.

    initial: labels of the start policy's answers (500 on Atari, a quarter of all on MuJoCo). decay: c, in the unit of
    the steps: after c steps labels are asked for half as often (a tenth of the run on Atari). Raises UserError for a
    value out of range.
    """

    initial: int
    total: int
    decay: float

    def __post_init__(self) -> None:
        if not 0 <= self.initial <= self.total:
            raise UserError(f"The initial labels must be 0 to all {self.total}, not {self.initial}.")
        if not self.decay > 0:
            raise UserError(f"The decay of the label rate must be above 0 steps, not {self.decay}.")

    def due(self, step: float, steps: float) -> int:
        """How many labels are wanted when `step` of `steps` are done; all of them afterwards.

        The integral of the rate: initial + (total − initial) · ln(1 + t/c) / ln(1 + T/c).
        """
        if step >= steps:
            return self.total
        share = math.log1p(max(step, 0) / self.decay) / math.log1p(steps / self.decay)
        return self.initial + int((self.total - self.initial) * share)
