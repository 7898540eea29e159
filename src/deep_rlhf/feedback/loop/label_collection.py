"""Collects the labels of a session: how many are wanted, which questions wait, and who answers them."""

import logging
from collections.abc import Callable

from deep_rlhf.errors import DataError
from deep_rlhf.feedback.annotators.base import Labeler, People
from deep_rlhf.feedback.loop.config import SessionConfig
from deep_rlhf.feedback.loop.stop_signal import StopSignal
from deep_rlhf.feedback.questions.questions import CurrentModels, Questions
from deep_rlhf.feedback.questions.schedule import LabelSchedule, Schedule
from deep_rlhf.feedback.state import LoopState
from deep_rlhf.feedback.store import Store

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.2  # while waiting for labels
HOPELESS = 200  # prompts in a row without two different responses
ROUNDS = 20  # in batched mode, of questions that annotators may answer with "can't tell"


class LabelCollector:
    """Adds questions to the store as labels are wanted, and in batched mode waits for the labels."""

    def __init__(
        self,
        config: SessionConfig,
        store: Store,
        questions: Questions,
        labeler: Labeler,
        *,
        schedule: Schedule | None,
        stop_signal: StopSignal,
    ) -> None:
        """`schedule` replaces that of `config`."""
        self._updates, self._store, self._questions, self.labeler = config.updates, store, questions, labeler
        self._temperature = config.temperature
        self._failures = 0  # prompts in a row that made no question
        self._schedule, self._stop_signal = schedule or _schedule_of(config), stop_signal

    def wanted(self, step: int) -> int | None:
        """How many more labels are wanted by update `step`; None for as many as people give."""
        if self._schedule is None:
            return None
        return max(0, self._schedule.due(step, self._updates) - self._store.label_count())

    def top_up(self, step: int, models: CurrentModels) -> None:
        """Adds questions until enough are waiting, unless the labeler brings its own."""
        if not self.labeler.brings_questions:
            self._ask(self._questions.missing(self.wanted(step)), models)

    def collect(self, count: int, models: CurrentModels, report: Callable[[LoopState, str], None]) -> None:
        """Waits for `count` more labels, and asks again as long as questions are skipped or answered "can't tell".

        Raises StopRequested if the loop is stopped while it waits for people, and DataError if nothing can be asked.
        """
        target = self._store.label_count() + count
        if isinstance(self.labeler, People):
            while (missing := target - self._store.label_count()) > 0:
                self._ask(self._questions.missing(missing), models)
                report("waiting for labels", f"The reward model is fitted after {missing} more labels.")
                self._stop_signal.wait(POLL_SECONDS)
            return
        for _ in range(ROUNDS):
            if not self.labeler.brings_questions:  # first what a loop that was killed has asked
                self.labeler.label(self._store, 2**31)
            if (missing := target - self._store.label_count()) <= 0:
                return
            if not self.labeler.brings_questions:
                self._ask(missing, models)
            elif self.labeler.label(self._store, missing) == 0:
                return  # the file has no more labels
        if not self.labeler.brings_questions:
            self.labeler.label(self._store, 2**31)
            if self._failures and models.scorer is None:
                raise self._nothing_to_ask()

    def _ask(self, count: int, models: CurrentModels) -> None:
        """Adds questions. Raises DataError if none can be found and nothing can change that."""
        if count <= 0:
            return
        if self._questions.ask(count, models):
            self._failures = 0
            return
        before, self._failures = self._failures, self._failures + count
        if before < HOPELESS <= self._failures:
            if models.scorer is None:  # the policy changes only once there is a reward model
                raise self._nothing_to_ask()
            logger.warning(
                "The policy's responses to a prompt are all equal: no question can be added until it changes."
            )

    def _nothing_to_ask(self) -> DataError:
        return DataError(
            f"The policy's responses to a prompt are all equal at temperature={self._temperature:g} (tried with"
            f" {self._failures} prompts), so there is nothing to compare: raise the temperature, or give another model."
        )


def _schedule_of(config: SessionConfig) -> LabelSchedule | None:
    """None if there is no label budget."""
    if config.labels is None:
        return None
    return LabelSchedule(initial=config.initial_labels, total=config.labels, decay=config.label_decay)
