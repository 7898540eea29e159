"""Collects the labels of a session: how many are wanted, which questions wait, and who answers them."""

from collections.abc import Callable

from deep_rlhf.feedback.annotators.base import Labeler, People
from deep_rlhf.feedback.loop.config import SessionConfig
from deep_rlhf.feedback.loop.stop_signal import StopSignal
from deep_rlhf.feedback.questions.questions import CurrentModels, Questions
from deep_rlhf.feedback.questions.schedule import LabelSchedule, Schedule
from deep_rlhf.feedback.state import LoopState
from deep_rlhf.feedback.store import Store

POLL_SECONDS = 0.2  # while waiting for labels
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

        Raises StopRequested if the loop is stopped while it waits for people.
        """
        target = self._store.label_count() + count
        if isinstance(self.labeler, People):
            while (missing := target - self._store.label_count()) > 0:
                self._ask(self._questions.missing(missing), models)
                report("waiting for labels", f"The reward model is fitted after {missing} more labels.")
                self._stop_signal.wait(POLL_SECONDS)
            return
        for _ in range(ROUNDS):
            if (missing := target - self._store.label_count()) <= 0:
                return
            if self.labeler.brings_questions:
                if self.labeler.label(self._store, missing) == 0:
                    return  # the file has no more labels
                continue
            self._ask(missing, models)
            self.labeler.label(self._store, 2**31)

    def _ask(self, count: int, models: CurrentModels) -> None:
        if count > 0:
            self._questions.ask(count, models)


def _schedule_of(config: SessionConfig) -> LabelSchedule | None:
    """None if there is no label budget."""
    if config.labels is None:
        return None
    return LabelSchedule(initial=config.initial_labels, total=config.labels, decay=config.label_decay)
