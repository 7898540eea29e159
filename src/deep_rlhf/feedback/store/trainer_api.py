"""The trainer's side of the store: adds questions, versions, metrics, samples and alarms; reads labels.

Every function runs inside one transaction.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, delete, exists, func, insert, or_, select, update

from deep_rlhf.errors import StoreError
from deep_rlhf.feedback.records import FOR_LABEL, Alarm, Comparison, Label, Reason, Row, Version
from deep_rlhf.feedback.store.engine import EVENTS_LOCK, METRICS_LOCK, lock
from deep_rlhf.feedback.store.mapping import (
    asked_for,
    comparison_of,
    comparison_values,
    effective_labels,
    is_decided,
    label_of,
    upsert,
)
from deep_rlhf.feedback.store.question_queue import release_expired
from deep_rlhf.feedback.store.schema import ALARMS, LABELLED, METRICS, SAMPLES, STATE, VERSIONS, may_be_asked
from deep_rlhf.feedback.store.statements import EFFECTIVE, EXPIRED_IDS, C, E, L


def add(db: Connection, comparisons: Sequence[Comparison], now: datetime) -> list[int]:
    """Adds questions; returns their ids in order.

    Raises StoreError for a priority or overlap out of range, and for a repeat of an unknown comparison.
    """
    originals = {number for comparison in comparisons if (number := comparison.repeat_of) is not None}
    known = set(db.execute(select(C.c.id).where(C.c.id.in_(originals))).scalars()) if originals else set()
    if originals - known:
        raise StoreError(f"Question {min(originals - known)}, which another one repeats, does not exist.")
    for comparison in comparisons:
        if comparison.overlap < 1 or not math.isfinite(comparison.priority):
            found = f"priority {comparison.priority} and overlap {comparison.overlap}"
            raise StoreError(f"A question must have a finite priority and an overlap of at least 1, not {found}.")
    if not comparisons:
        return []
    rows = [comparison_values(comparison, now) for comparison in comparisons]
    return list(db.execute(insert(C).returning(C.c.id, sort_by_parameter_order=True), rows).scalars())


def withdraw(db: Connection, older_than_policy: int, now: datetime) -> int:
    """Withdraws questions about older policies that nobody labelled or holds; returns how many.

    Pending repeats are withdrawn, too; new ones are created for the current policy.
    """
    release_expired(db, now)
    untouched = may_be_asked() & (C.c.open_slots == C.c.overlap)
    old = (C.c.policy_version < older_than_policy) & asked_for((*FOR_LABEL, "win_rate", "repeat"))
    return db.execute(update(C).where(untouched, old).values(withdrawn=True)).rowcount


def waiting(db: Connection, now: datetime) -> int:
    """How many questions could be given to somebody now, including those with an expired lease."""
    query = select(func.count()).select_from(C).where(or_(may_be_asked(), C.c.id.in_(EXPIRED_IDS)))
    return db.execute(query, {"now": now}).scalar_one()


def unseen(db: Connection, now: datetime) -> int:
    """How many of these could be given to anybody: not labelled or skipped by anyone, and no repeats."""
    had = exists().where(L.c.comparison_id == C.c.id, L.c.state.in_((LABELLED, "skipped")))
    query = select(func.count()).select_from(C).where(or_(may_be_asked(), C.c.id.in_(EXPIRED_IDS)))
    return db.execute(query.where(C.c.repeat_of.is_(None), ~had), {"now": now}).scalar_one()


def labels(db: Connection, after: int, until: int) -> list[Label]:
    """Labels that were not undone, by event id: `after` < id ≤ `until`."""
    return [label_of(row) for row in effective_labels(db, after, until)]


def undone(db: Connection, after: int, until: int) -> set[int]:
    """The ids of the labels and skips that were undone by an event: `after` < id of the event ≤ `until`."""
    query = select(E.c.undoes).where(E.c.undoes.is_not(None), E.c.id > after, E.c.id <= until)
    return set(db.execute(query).scalars())


def asked(db: Connection, reason: Reason) -> list[Comparison]:
    """All questions that were ever asked for this reason, in order."""
    query = select(C).where(asked_for((reason,))).order_by(C.c.id)
    return [comparison_of(row) for row in db.execute(query).mappings()]


def label_count(db: Connection) -> int:
    """How many labels a reward model can learn from: decided, not undone, selected for training."""
    query = select(func.count(E.c.id)).join(C, C.c.id == E.c.comparison_id)
    return db.execute(query.where(EFFECTIVE, is_decided(), asked_for(FOR_LABEL))).scalar_one()


def last_event(db: Connection) -> int:
    """The id of the newest event, 0 before the first. All events with smaller ids are committed."""
    lock(db, EVENTS_LOCK)
    return db.execute(select(func.max(E.c.id))).scalar_one() or 0


def add_version(db: Connection, version: Version, now: datetime) -> None:
    """Adds a version, or replaces the one of the same kind and number, left by a crashed run."""
    upsert(db, VERSIONS, {**asdict(version), "created": version.created or now})


def versions(db: Connection, kind: str) -> list[Version]:
    """All versions of one kind, by number."""
    query = select(VERSIONS).where(VERSIONS.c.kind == kind).order_by(VERSIONS.c.number)
    return [Version(**row) for row in db.execute(query).mappings()]


def add_metrics(db: Connection, rows: Sequence[Row]) -> int:
    """Adds rows of metrics and returns the newest id. Ids become visible in order, like those of events."""
    if rows:
        lock(db, METRICS_LOCK)
        db.execute(insert(METRICS), [{"row": row} for row in rows])
    return newest_ids(db)[0]


def metrics(db: Connection, after: int) -> list[Row]:
    """Rows with a larger id than `after`, each with its "id"."""
    query = select(METRICS).where(METRICS.c.id > after).order_by(METRICS.c.id)
    return [{**row, "id": number} for number, row in db.execute(query)]


def add_samples(db: Connection, policy_version: int, rows: Sequence[tuple[str, str]]) -> None:
    """Replaces the sampled (prompt, response) pairs of a policy version."""
    db.execute(delete(SAMPLES).where(SAMPLES.c.policy_version == policy_version))
    values = [
        {"policy_version": policy_version, "position": position, "prompt": prompt, "answer": response}
        for position, (prompt, response) in enumerate(rows)
    ]
    if values:
        db.execute(insert(SAMPLES), values)


def samples(db: Connection) -> dict[int, list[tuple[str, str]]]:
    """The (prompt, response) pairs of every policy version."""
    found: dict[int, list[tuple[str, str]]] = {}
    for row in db.execute(select(SAMPLES).order_by(SAMPLES.c.policy_version, SAMPLES.c.position)):
        found.setdefault(row.policy_version, []).append((row.prompt, row.answer))
    return found


def add_alarm(db: Connection, alarm: Alarm, now: datetime) -> int:
    """Adds an alarm and returns its id."""
    row = {**asdict(alarm), "created": alarm.created or now}
    return db.execute(insert(ALARMS).values(row).returning(ALARMS.c.id)).scalar_one()


def alarms(db: Connection) -> list[Alarm]:
    """All alarms, the oldest first."""
    columns = [column for column in ALARMS.c if column.name != "id"]
    return [Alarm(**row) for row in db.execute(select(*columns).order_by(ALARMS.c.id)).mappings()]


def newest_ids(db: Connection) -> tuple[int, int]:
    """The ids of the newest row of metrics and of the newest alarm; 0 before the first."""
    newest = [db.execute(select(func.max(table.c.id))).scalar_one() or 0 for table in (METRICS, ALARMS)]
    return newest[0], newest[1]


def remove_after(db: Connection, metrics_id: int, alarm_id: int) -> None:
    """Removes rows of metrics and alarms with larger ids."""
    for table, number in ((METRICS, metrics_id), (ALARMS, alarm_id)):
        db.execute(delete(table).where(table.c.id > number))


def put(db: Connection, key: str, value: Any) -> None:
    """Writes a JSON value under a key."""
    upsert(db, STATE, {"name": key, "value": value})


def get(db: Connection, key: str, default: Any) -> Any:
    """The JSON value under a key, `default` if there is none."""
    row = db.execute(select(STATE.c.value).where(STATE.c.name == key)).one_or_none()
    return default if row is None else row.value
