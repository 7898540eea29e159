"""What a session tells its store and learns from it. The policy never waits for the database: it goes on learning."""

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any
from uuid import uuid4

from deep_rlhf.errors import StoreUnavailable
from deep_rlhf.feedback.loop.label_log import LabelLog
from deep_rlhf.feedback.loop.outbox import Outbox
from deep_rlhf.feedback.monitoring.win_rate import blind_pairs, recent_versions, win_rate
from deep_rlhf.feedback.records import Label, Version
from deep_rlhf.feedback.state import NEWEST_RUN, WIN_RATE, LoopState, PolicyWinRate, report_status
from deep_rlhf.feedback.store import Store

logger = logging.getLogger(__name__)

RETRY_SECONDS = 5.0  # without the store after it did not answer
RETRY_FACTOR = 10  # times the time that it took not to answer


class StoreLink:
    """The store of a session, which may be away for a while.

    `outbox` holds what the store does not have yet; `labels` and `policies` are copies of what it has.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.outbox = Outbox()
        self.log = LabelLog(store)
        self.policies: list[Version] = []  # of the policy, in this run
        self._reported: str | None = None  # the newest status text
        self._retry_at = 0.0  # by the monotonic clock

    def begin(self) -> None:
        """Begins a new run. Raises StoreUnavailable."""
        self.outbox.run = uuid4().hex
        self.outbox.metrics_id, self.outbox.alarm_id = self.store.newest_ids()
        NEWEST_RUN.write(self.store, self.outbox.run)

    def restore(self, outbox: Mapping[str, Any] | None, *, policy: int) -> None:
        """Continues a run from a checkpoint with this outbox and version of the policy. Raises StoreUnavailable.

        Metrics and alarms of updates that a kill has undone are removed, unless another run has written since.
        """
        self.policies = [one for one in self.store.versions("policy") if one.number <= policy]
        if outbox is None:  # of an earlier release
            self.begin()
            return
        self.outbox = Outbox.from_state(outbox)
        if NEWEST_RUN.read(self.store) == self.outbox.run:
            self.store.remove_after(metrics_id=self.outbox.metrics_id, alarm_id=self.outbox.alarm_id)
        NEWEST_RUN.write(self.store, self.outbox.run)
        self.write_win_rate()

    def add_policy(self, version: Version, samples: list[tuple[str, str]]) -> None:
        """Records a new version of the policy with samples, and withdraws questions about older ones."""
        self.policies.append(version)
        self.outbox.versions.append((version, samples))
        self.outbox.current_policy = version.number
        self.send()
        self.write_win_rate()

    @property
    def labels(self) -> list[Label]:
        """The labels that were read so far."""
        return self.log.labels

    def attempt(self, act: Callable[[], None]) -> None:
        """Calls `act` unless the database is away: then it is left out, and tried again some seconds later."""
        if (start := time.monotonic()) < self._retry_at:
            return
        try:
            act()
        except StoreUnavailable as error:
            logger.warning("%s Training goes on; what is new waits for the store.", error)
            end = time.monotonic()  # a database that answers late must not hold up training all the time
            self._retry_at = end + max(RETRY_SECONDS, RETRY_FACTOR * (end - start))

    def send(self) -> None:
        """Writes what waits in the outbox, if the database answers."""
        self.attempt(lambda: self.outbox.send(self.store))

    def send_all(self) -> None:
        """As `send`, whether or not it was tried a moment ago."""
        self._retry_at = 0.0
        self.send()

    def refresh_labels(self) -> None:
        """Reads new labels, and stores the win rate if there are any; if the database answers."""

        def read() -> None:
            if self.log.refresh():
                WIN_RATE.write(self.store, self.win_rate())

        self.attempt(read)

    def write_win_rate(self) -> None:
        """Stores the win rate, if the database answers."""
        self.attempt(lambda: WIN_RATE.write(self.store, self.win_rate()))

    def win_rate(self) -> PolicyWinRate | None:
        """The win rate of the newest policies."""
        return win_rate(self.blind_pairs())

    def blind_pairs(self) -> list[Label]:
        """The labels of blind pairs that are about the newest policies."""
        return blind_pairs(self.labels, recent_versions(self.policies))

    def report(self, state: LoopState, text: str, *, step: int) -> None:
        """Stores what the loop is doing, if that is new and the database answers."""

        def write() -> None:
            report_status(self.store, state, step=step, text=text)
            self._reported = text

        if text != self._reported:
            self.attempt(write)
