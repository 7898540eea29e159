"""The interface that people, simulated annotators and replayed files share, and a thread that runs one of them."""

import threading
import time
from collections.abc import Callable
from typing import Protocol

from deep_rlhf.errors import LabelRefused, StoreUnavailable
from deep_rlhf.feedback.store import Store

IDLE_SECONDS = 0.2  # between two attempts of a labeler that has nothing to label


class Labeler(Protocol):
    """A source of labels beside the trainer. It works through the store alone."""

    brings_questions: bool  # whether it labels questions of its own, so that the policy's responses are not asked about

    def label(self, store: Store, most: int) -> int:
        """Labels up to `most` of the questions that are available now; returns how many."""
        ...


class People:
    """People who label on the page. Their labels arrive in the store by themselves."""

    brings_questions = False

    def label(self, store: Store, most: int) -> int:
        """Does nothing."""
        return 0


class BackgroundLabeler:
    """Runs a labeler in a thread until `stop`, one label at a time, `pace` seconds each."""

    def __init__(
        self, labeler: Labeler, store: Store, *, pace: float = 0.0, wanted: Callable[[], int | None] = lambda: None
    ) -> None:
        """`wanted` returns how many labels are wanted at the moment, None for any number.

        An exception of the labeler ends the thread and is kept in `error`; labels that came too late and an unavailable
        database do not end it.
        """
        self._labeler, self._store, self._pace, self._wanted = labeler, store, pace, wanted
        self._stopped = threading.Event()
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="labeler", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopped.is_set():
            start = time.monotonic()
            try:
                done = 0 if self._wanted() == 0 else self._labeler.label(self._store, 1)
            except LabelRefused:
                continue  # somebody else was faster
            except StoreUnavailable:
                done = 0
            except Exception as error:
                self.error = error
                return
            wait = self._pace * done - (time.monotonic() - start) if done else IDLE_SECONDS
            self._stopped.wait(max(0.0, wait))

    def stop(self) -> None:
        """Stops the thread after the current label."""
        self._stopped.set()
        self._thread.join()
