"""The labels of a store as far as a session has read them: one copy for the loop and for its questions."""

from deep_rlhf.feedback.records import Label
from deep_rlhf.feedback.reward_refit.preferences import training_labels
from deep_rlhf.feedback.store import Store


class LabelLog:
    """Labels that were not undone, by event id. `refresh` reads only what is new."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._last_event = 0
        self.labels: list[Label] = []
        self.count = 0  # as Store.label_count

    def refresh(self) -> bool:
        """Reads the labels of new events, and drops those that were undone; returns whether there was any event.

        Raises StoreUnavailable.
        """
        last, before = self._store.last_event(), self._last_event
        if last == before:
            return False
        new = self._store.labels(after=before, until=last)
        undone = self._store.undone(after=before, until=last)
        if undone:
            self.labels = [label for label in self.labels if label.event_id not in undone]
        self.labels += new
        self.count = training_labels(self.labels) if undone else self.count + training_labels(new)
        self._last_event = last
        return True
