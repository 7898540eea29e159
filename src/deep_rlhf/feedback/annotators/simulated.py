"""Annotators who are programs: they answer as people do, with noise, from a utility that the caller hands in.

The model of an annotator is the usual one of preference learning:
- Boltzmann-rational: P(a better) = sigmoid((u_a − u_b) / temperature);
- 10 % of the answers are uniformly random, whatever is shown (Christiano et al. 2017, section 2.2.3);
- answers of nearly the same utility are now and then called equal (mu = 1/2);
- a few comparisons get no answer: "can't tell" (Christiano et al. 2017, section 2.2.2, leave those out).
"""

import hashlib
import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from deep_rlhf.errors import UserError
from deep_rlhf.types import Preference, RowReport

Utility = Callable[[str, str], float]  # (prompt, answer) -> how good the answer is; only differences matter

IDENTICAL = "the two answers are identical"
CANT_TELL = "the annotator can't tell"


@dataclass(frozen=True, slots=True, kw_only=True)
class AnnotatorHabits:
    """How an annotator answers. Rates and probabilities lie in 0…1; the temperature and threshold are utilities."""

    temperature: float = 0.05
    error_rate: float = 0.1
    tie_threshold: float = 0.02
    tie_probability: float = 0.5  # of calling two answers equal whose utilities are closer than tie_threshold
    cant_tell_rate: float = 0.02

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise UserError(f"An annotator's temperature must be above 0, not {self.temperature}.")
        for name in ("error_rate", "tie_probability", "cant_tell_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"An annotator's {name} must lie between 0 and 1, not {getattr(self, name)}.")


class SimulatedAnnotator:
    """One annotator with a name and a seed: the same comparisons in the same order get the same labels."""

    def __init__(self, name: str, utility: Utility, *, seed: int, habits: AnnotatorHabits | None = None) -> None:
        self.name = name
        self.utility = utility
        self.habits = habits or AnnotatorHabits()
        self._rng = random.Random(seed)

    def label(self, prompt: str, a: str, b: str) -> Preference | None:
        """Compare two answers to one prompt: mu is 1 (a is better), 0 (b is) or 1/2 (a tie); None is "can't tell"."""
        mu = self._compare(self.utility(prompt, a) - self.utility(prompt, b))
        if mu is None:
            return None
        return Preference(
            prompt=prompt, a=a, b=b, mu=mu, id=_pair_id(prompt, a, b), source="simulated", annotator=self.name
        )

    def _compare(self, difference: float) -> float | None:
        habits, rng = self.habits, self._rng
        if rng.random() < habits.cant_tell_rate:
            return None
        if rng.random() < habits.error_rate:
            return float(rng.random() < 0.5)
        if abs(difference) < habits.tie_threshold and rng.random() < habits.tie_probability:
            return 0.5
        # tanh form of the sigmoid: it cannot overflow.
        return float(rng.random() < 0.5 + 0.5 * math.tanh(difference / habits.temperature / 2))


class SimulatedAnnotators:
    """A team that takes turns: annotator k labels the pairs k, k + count, k + 2·count, …"""

    def __init__(
        self, utility: Utility, *, count: int = 3, seed: int = 0, habits: AnnotatorHabits | None = None
    ) -> None:
        if count < 1:
            raise UserError(f"The number of simulated annotators must be at least 1, not {count}.")
        # A string seeds with all its characters, so that neighbouring seeds share no annotator.
        self.annotators = [
            SimulatedAnnotator(
                f"simulated-{k}", utility, seed=random.Random(f"{seed}/{k}").getrandbits(64), habits=habits
            )
            for k in range(1, count + 1)
        ]
        self._next = 0

    def label_pairs(self, pairs: Iterable[tuple[str, str, str]]) -> tuple[list[Preference], RowReport]:
        """Label (prompt, a, b) triples; identical answers and "can't tell" are left out and counted in the report."""
        kept: list[Preference] = []
        dropped = {IDENTICAL: 0, CANT_TELL: 0}
        read = 0
        for prompt, a, b in pairs:
            read += 1
            if a.strip() == b.strip():
                dropped[IDENTICAL] += 1
                continue
            preference = self.annotators[self._next].label(prompt, a, b)
            self._next = (self._next + 1) % len(self.annotators)
            if preference is None:
                dropped[CANT_TELL] += 1
            else:
                kept.append(preference)
        return kept, RowReport(read=read, kept=len(kept), dropped=dropped)


def _pair_id(prompt: str, a: str, b: str) -> str:
    """The same for the same texts, so that a pair labelled twice falls into the same bag of an ensemble."""
    return hashlib.sha256("\0".join((prompt, a, b)).encode()).hexdigest()[:16]
