"""A labeler that answers beside the loop: what stops it, and what does not."""

import threading
from typing import Any

from deep_rlhf.errors import LabelRefused, StoreUnavailable
from deep_rlhf.feedback.annotators.base import BackgroundLabeler


class Clumsy:
    """Answers one question at a time; its `troubles` come first."""

    brings_questions = True

    def __init__(self, troubles: list[Exception]) -> None:
        self.troubles = troubles
        self.answered = 0
        self.done = threading.Event()

    def label(self, store: Any, most: int) -> int:
        if self.troubles:
            raise self.troubles.pop()
        self.answered += 1
        if self.answered == 3:
            self.done.set()
        return 1


def test_an_unavailable_database_and_a_faster_person_do_not_end_the_labeler() -> None:
    labeler = Clumsy([StoreUnavailable("away"), LabelRefused("taken", "taken")])
    background = BackgroundLabeler(labeler, None)  # type: ignore[arg-type]
    assert labeler.done.wait(30)
    background.stop()
    assert background.error is None


def test_an_error_ends_the_labeler_and_is_reported() -> None:
    mistake = ZeroDivisionError()
    background = BackgroundLabeler(Clumsy([mistake]), None)  # type: ignore[arg-type]
    background._thread.join(30)
    assert background.error is mistake
    background.stop()


def test_the_labeler_gives_no_more_labels_than_are_wanted() -> None:
    asked = threading.Event()
    labeler = Clumsy([])

    def wanted() -> int:
        if labeler.answered == 3:
            asked.set()
        return 3 - labeler.answered

    background = BackgroundLabeler(labeler, None, wanted=wanted)  # type: ignore[arg-type]
    assert asked.wait(30)
    background.stop()
    assert labeler.answered == 3
