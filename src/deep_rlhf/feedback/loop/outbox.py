"""What a session has to tell the store: it waits here while the database is away, and in the session's checkpoints."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from deep_rlhf.feedback.records import Alarm, Row, Version
from deep_rlhf.feedback.store import Store

Samples = list[tuple[str, str]]  # prompts and responses


@dataclass(slots=True)
class Outbox:
    """Metrics, alarms and versions that are not in the store yet; `send` writes them, each of them once."""

    run: str = ""  # tells this run from others that write to the same store
    rows: list[Row] = field(default_factory=list)
    alarms: list[Alarm] = field(default_factory=list)
    versions: list[tuple[Version, Samples]] = field(default_factory=list)
    current_policy: int | None = None  # questions about older versions of the policy are to be withdrawn
    # Ids of the newest row and the newest alarm that were sent: later ones date from after a checkpoint.
    metrics_id: int = 0
    alarm_id: int = 0
    # How many of `rows` and `alarms` were in a transaction of which nobody knows whether it was committed.
    doubtful_rows: int = 0
    doubtful_alarms: int = 0

    def send(self, store: Store) -> None:
        """Writes everything that waits. Raises StoreUnavailable; what was not written still waits then."""
        while self.versions:
            version, samples = self.versions[0]
            if version.kind == "policy":
                store.add_samples(version.number, samples)
            store.add_version(version)
            self.versions.pop(0)
        if self.current_policy is not None:
            store.withdraw(older_than_policy=self.current_policy)
            self.current_policy = None
        if self.rows or self.alarms:
            self._send_rows_and_alarms(store)

    def _send_rows_and_alarms(self, store: Store) -> None:
        newest = store.newest_ids()  # no other session writes to the store, so larger ids show that a write arrived
        if newest[0] > self.metrics_id:
            del self.rows[: self.doubtful_rows]
        if newest[1] > self.alarm_id:
            del self.alarms[: self.doubtful_alarms]
        self.metrics_id, self.alarm_id = newest
        self.doubtful_rows = self.doubtful_alarms = 0
        if self.rows:
            self.doubtful_rows = len(self.rows)
            self.metrics_id = store.add_metrics(self.rows)
            self.rows, self.doubtful_rows = [], 0
        while self.alarms:
            self.doubtful_alarms = 1
            self.alarm_id = store.add_alarm(self.alarms[0])
            self.alarms.pop(0)
            self.doubtful_alarms = 0

    @property
    def state(self) -> dict[str, Any]:
        """JSON values for a checkpoint."""
        return {
            "run": self.run,
            "rows": list(self.rows),
            "alarms": [asdict(alarm) for alarm in self.alarms],
            "versions": [(asdict(version), samples) for version, samples in self.versions],
            "current_policy": self.current_policy,
            "metrics_id": self.metrics_id,
            "alarm_id": self.alarm_id,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "Outbox":
        """The outbox that `state` described."""
        alarms = [Alarm(**alarm) for alarm in state["alarms"]]
        versions = [(Version(**version), samples) for version, samples in state["versions"]]
        return cls(**{**state, "alarms": alarms, "versions": versions})
