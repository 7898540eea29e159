"""Who answers: the interface that simulated annotators, a replayed file and people on the page have in common."""

import threading
import time
import uuid
from collections.abc import Callable
from typing import Protocol

from deep_rlhf.errors import LabelRefused, StoreUnavailable
from deep_rlhf.feedback.annotators.simulated import AnnotatorHabits, SimulatedAnnotators, Utility
from deep_rlhf.feedback.records import CHOICES, Comparison
from deep_rlhf.feedback.store import Store


class Labeler(Protocol):
    """Somebody who answers questions, beside the trainer: all that is said goes through the store."""

    brings_questions: bool  # of its own; the policy's answers are not asked about

    def answer(self, store: Store, most: int) -> int:
        """Answers up to `most` questions that are there now, and returns how many it did."""
        ...


class People:
    """They answer on the page, whenever they like; nothing is to be done for it here."""

    brings_questions = False

    def answer(self, store: Store, most: int) -> int:
        """Nothing: their answers come by themselves."""
        return 0


class SimulatedLabeler:
    """A team of simulated annotators, each a client of the store like a person's browser; they take turns."""

    brings_questions = False

    def __init__(
        self, utility: Utility, *, count: int = 3, seed: int = 0, habits: AnnotatorHabits | None = None
    ) -> None:
        self._annotators = SimulatedAnnotators(utility, count=count, seed=seed, habits=habits).annotators
        self._tokens = 0
        self._run = uuid.uuid4().hex  # tokens are for good, and a seed makes the same annotators again

    def answer(self, store: Store, most: int) -> int:
        """One question each in turn, until nobody is asked anything."""
        done = idle = 0
        while done < most and idle < len(self._annotators):
            annotator = self._annotators[0]
            self._annotators.append(self._annotators.pop(0))
            questions = store.ask(annotator.name)
            idle = 0 if questions else idle + 1
            for question in questions:
                comparison = question.comparison
                token = f"{self._run}/{self._tokens}"
                self._tokens += 1
                if len(comparison.answers) > 2:
                    ranks = self._rank(annotator.label, comparison)
                    store.answer(question.id, annotator.name, token=token, ranks=ranks)
                else:
                    said = annotator.label(comparison.prompt, *comparison.answers)
                    choice = CHOICES[said.mu if said else None]
                    store.answer(question.id, annotator.name, token=token, choice=choice)
                done += 1
        return done

    @staticmethod
    def _rank(label: Callable[..., object], comparison: Comparison) -> tuple[int, ...]:
        """By how many of the others each answer beats in a round of noisy comparisons."""
        wins = [0.0] * len(comparison.answers)
        for i, a in enumerate(comparison.answers):
            for j, b in enumerate(comparison.answers[:i]):
                said = label(comparison.prompt, a, b)
                mu = getattr(said, "mu", 0.5)
                wins[i] += mu
                wins[j] += 1 - mu
        better = sorted(set(wins), reverse=True)
        return tuple(1 + better.index(score) for score in wins)


class InBackground:
    """Lets a labeler answer in a thread of its own, `pace` seconds an answer, until `stop`; it never stops the loop."""

    def __init__(
        self, labeler: Labeler, store: Store, *, pace: float = 0.0, wanted: Callable[[], int | None] = lambda: None
    ) -> None:
        """`wanted`: labels that are still wanted by now, None for any number; a file would go on without an end."""
        self._labeler, self._store, self._pace, self._wanted = labeler, store, pace, wanted
        self._stopped = threading.Event()
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="labeler", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopped.is_set():
            start = time.monotonic()
            try:
                done = 0 if self._wanted() == 0 else self._labeler.answer(self._store, 1)
            except LabelRefused:
                continue  # somebody else was faster
            except StoreUnavailable:
                done = 0  # the database is away for a moment
            except Exception as error:
                self.error = error
                return
            wait = self._pace * done - (time.monotonic() - start) if done else 0.2
            self._stopped.wait(max(0.0, wait))

    def stop(self) -> None:
        """Returns when the answer at hand is given."""
        self._stopped.set()
        self._thread.join()
