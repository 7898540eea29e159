"""Simulated annotators: they label with noise, by a utility function that the caller provides.

The model is the usual one of preference learning:
- Boltzmann-rational choice: P(a better) = sigmoid((u_a − u_b) / temperature);
- 10% of the labels are uniformly random (Christiano et al. 2017, section 2.2.3);
- responses of nearly equal utility are sometimes called a tie (μ = 1/2);
- some comparisons get no label: "can't tell" (Christiano et al. 2017, section 2.2.2, drop those).
"""

import hashlib
import math
import random
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from deep_rlhf.errors import ConfigError
from deep_rlhf.feedback.records import CHOICES, Comparison
from deep_rlhf.feedback.store import Store
from deep_rlhf.settings import check_settings, setting
from deep_rlhf.types import Preference, RowReport

Utility = Callable[[str, str], float]  # (prompt, response) -> quality; only differences matter

IDENTICAL = "the two answers are identical"  # a key in summaries of earlier runs, too
CANT_TELL = "the annotator can't tell"


@dataclass(frozen=True, slots=True, kw_only=True)
class AnnotatorHabits:
    """How an annotator labels. Temperature and threshold are in units of utility; the rest are probabilities.

    Raises ConfigError for a value out of bounds.
    """

    temperature: float = setting(0.05, "utility difference that changes the odds by a factor of e", above=0)
    error_rate: float = setting(0.1, "share of labels that are uniformly random", least=0, most=1)
    tie_threshold: float = setting(0.02, "utility difference below which two responses may be called a tie")
    tie_probability: float = setting(0.5, "probability of a tie below the threshold", least=0, most=1)
    cant_tell_rate: float = setting(0.02, "share of comparisons without a label", least=0, most=1)

    def __post_init__(self) -> None:
        check_settings(self)


class SimulatedAnnotator:
    """One annotator with a name and a seed: the same comparisons in the same order get the same labels."""

    def __init__(self, name: str, utility: Utility, *, seed: int, habits: AnnotatorHabits | None = None) -> None:
        self.name = name
        self.utility = utility
        self.habits = habits or AnnotatorHabits()
        self._seed = seed
        self._rng = random.Random(seed)

    def continue_after(self, labels: int) -> None:
        """Continues as after this many labels, so that a process that begins anew labels as the former would have."""
        self._rng = random.Random(f"{self._seed}/{labels}")

    def compare(self, prompt: str, a: str, b: str) -> Preference | None:
        """Compares two responses to a prompt: μ is 1 (a is better), 0 (b is) or 1/2 (a tie); None is "can't tell"."""
        mu = self._mu(self.utility(prompt, a) - self.utility(prompt, b))
        if mu is None:
            return None
        return Preference(
            prompt=prompt, a=a, b=b, mu=mu, id=_pair_id(prompt, a, b), source="simulated", annotator=self.name
        )

    def rank(self, prompt: str, responses: tuple[str, ...]) -> tuple[int, ...]:
        """Ranks responses by how many others each beats in a round robin of noisy comparisons; 1 is the best."""
        wins = [0.0] * len(responses)
        for i, a in enumerate(responses):
            for j, b in enumerate(responses[:i]):
                preference = self.compare(prompt, a, b)
                mu = preference.mu if preference else 0.5
                wins[i] += mu
                wins[j] += 1 - mu
        better = sorted(set(wins), reverse=True)
        return tuple(1 + better.index(score) for score in wins)

    def _mu(self, difference: float) -> float | None:
        habits, rng = self.habits, self._rng
        if rng.random() < habits.cant_tell_rate:
            return None
        if rng.random() < habits.error_rate:
            return float(rng.random() < 0.5)
        if abs(difference) < habits.tie_threshold and rng.random() < habits.tie_probability:
            return 0.5
        # The tanh form of the sigmoid cannot overflow.
        return float(rng.random() < 0.5 + 0.5 * math.tanh(difference / habits.temperature / 2))


class SimulatedAnnotators:
    """A team that takes turns: annotator k labels the pairs k, k + count, k + 2·count, …"""

    def __init__(
        self, utility: Utility, *, count: int = 3, seed: int = 0, habits: AnnotatorHabits | None = None
    ) -> None:
        """Raises ConfigError for a count below 1."""
        if count < 1:
            raise ConfigError(f"The number of simulated annotators must be at least 1, not {count}.")
        # All characters of a string seed count, so neighbouring seeds share no annotator.
        self.annotators = [
            SimulatedAnnotator(
                f"simulated-{k}", utility, seed=random.Random(f"{seed}/{k}").getrandbits(64), habits=habits
            )
            for k in range(1, count + 1)
        ]
        self._next = 0

    def label_pairs(self, pairs: Iterable[tuple[str, str, str]]) -> tuple[list[Preference], RowReport]:
        """Labels (prompt, a, b) triples. Drops identical responses and "can't tell", and counts them in the report."""
        kept: list[Preference] = []
        dropped = {IDENTICAL: 0, CANT_TELL: 0}
        read = 0
        for prompt, a, b in pairs:
            read += 1
            if a.strip() == b.strip():
                dropped[IDENTICAL] += 1
                continue
            preference = self.annotators[self._next].compare(prompt, a, b)
            self._next = (self._next + 1) % len(self.annotators)
            if preference is None:
                dropped[CANT_TELL] += 1
            else:
                kept.append(preference)
        return kept, RowReport(read=read, kept=len(kept), dropped=dropped)


class SimulatedLabeler:
    """A team of simulated annotators who take turns, each a client of the store like a person's browser.

    What comes next depends on the labels in the store alone: a team that begins anew continues where it stopped.
    """

    brings_questions = False

    def __init__(
        self, utility: Utility, *, count: int = 3, seed: int = 0, habits: AnnotatorHabits | None = None
    ) -> None:
        self._annotators = SimulatedAnnotators(utility, count=count, seed=seed, habits=habits).annotators
        self._places = {annotator.name: place for place, annotator in enumerate(self._annotators)}
        self._store: Store | None = None  # for which it is known whose turn it is
        self._tokens = 0
        self._run = uuid.uuid4().hex  # tokens are never reused, but a seed makes the same annotators again

    def label(self, store: Store, most: int) -> int:
        """Labels one question per annotator in turn, until `most` are done or nobody is asked anything."""
        if self._store is not store:
            self._find_turn(store)
        done = idle = 0
        while done < most and idle < len(self._annotators):
            annotator = self._annotators[0]
            self._annotators.append(self._annotators.pop(0))
            questions = store.ask(annotator.name)
            idle = 0 if questions else idle + 1
            for question in questions:
                self._label_one(store, annotator, question.id, question.comparison)
                done += 1
        return done

    def _find_turn(self, store: Store) -> None:
        """It is the turn of whoever follows the one who gave the newest label."""
        team = sorted(self._annotators, key=lambda annotator: self._places[annotator.name])
        given = [label.annotator for label in store.labels() if label.annotator in self._places]
        turn = self._places[given[-1]] + 1 if given else 0
        self._annotators = team[turn:] + team[:turn]
        self._store = store

    def _label_one(self, store: Store, annotator: SimulatedAnnotator, number: int, comparison: Comparison) -> None:
        token = f"{self._run}/{self._tokens}"
        self._tokens += 1
        annotator.continue_after(store.labelled(annotator.name))
        if len(comparison.responses) > 2:
            ranks = annotator.rank(comparison.prompt, comparison.responses)
            store.add_label(number, annotator.name, token=token, ranks=ranks)
        else:
            preference = annotator.compare(comparison.prompt, *comparison.responses)
            store.add_label(number, annotator.name, token=token, choice=CHOICES[preference.mu if preference else None])


def _pair_id(prompt: str, a: str, b: str) -> str:
    """A hash of the texts, so that a pair that is labelled twice is in the same bag of an ensemble."""
    return hashlib.sha256("\0".join((prompt, a, b)).encode()).hexdigest()[:16]
