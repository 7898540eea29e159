"""The trainer's side: questions in, labels out, and what the page shows about the model.

Every function runs inside one transaction.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, delete, exists, func, insert, or_, select, update

from deep_rlhf.feedback.records import FOR_LABEL, Alarm, Comparison, Label, Row, Version
from deep_rlhf.feedback.store.engine import EVENTS_LOCK, METRICS_LOCK, lock
from deep_rlhf.feedback.store.errors import StoreError
from deep_rlhf.feedback.store.mapping import (
    asked_for,
    comparison_values,
    effective_answers,
    label_of,
    tells_something,
    upsert,
)
from deep_rlhf.feedback.store.question_queue import free_expired
from deep_rlhf.feedback.store.schema import AlarmRow, MetricsRow, SampleRow, StateRow, VersionRow, may_be_asked
from deep_rlhf.feedback.store.statements import EFFECTIVE, RAN_OUT, C, E, L, table_of

VERSIONS, METRICS, SAMPLES = table_of(VersionRow), table_of(MetricsRow), table_of(SampleRow)
ALARMS, STATE = table_of(AlarmRow), table_of(StateRow)


def add(db: Connection, comparisons: Sequence[Comparison], now: datetime) -> list[int]:
    """New questions; returns their ids in order."""
    originals = {number for comparison in comparisons if (number := comparison.repeat_of) is not None}
    known = set(db.execute(select(C.c.id).where(C.c.id.in_(originals))).scalars()) if originals else set()
    if originals - known:
        raise StoreError(f"A question repeats number {min(originals - known)}, which does not exist.")
    for comparison in comparisons:
        if comparison.overlap < 1 or not math.isfinite(comparison.priority):
            raise StoreError("A question needs a finite priority, and an overlap of at least one person.")
    if not comparisons:
        return []
    rows = [comparison_values(comparison, now) for comparison in comparisons]
    return list(db.execute(insert(C).returning(C.c.id, sort_by_parameter_order=True), rows).scalars())


def withdraw(db: Connection, older_than_policy: int, now: datetime) -> int:
    """Takes questions about older policies, that nobody answered or holds, out of the queue; returns how many.

    A repeat is about the policy of its original, so those that wait go, and others come: else they would pile up.
    """
    free_expired(db, now)
    untouched = may_be_asked() & (C.c.open_slots == C.c.overlap)
    old = (C.c.policy_version < older_than_policy) & asked_for((*FOR_LABEL, "win_rate", "repeat"))
    return db.execute(update(C).where(untouched, old).values(withdrawn=True)).rowcount


def waiting(db: Connection, now: datetime) -> int:
    """Questions that somebody could be asked now, those whose lease ran out included."""
    query = select(func.count()).select_from(C).where(or_(may_be_asked(), C.c.id.in_(RAN_OUT)))
    return db.execute(query, {"now": now}).scalar_one()


def unseen(db: Connection, now: datetime) -> int:
    """Of the questions that wait, those for anybody: nobody answered or skipped them, and they repeat no other."""
    had = exists().where(L.c.comparison_id == C.c.id, L.c.state.in_(("answered", "skipped")))
    query = select(func.count()).select_from(C).where(or_(may_be_asked(), C.c.id.in_(RAN_OUT)))
    return db.execute(query.where(C.c.repeat_of.is_(None), ~had), {"now": now}).scalar_one()


def labels(db: Connection, after: int, until: int) -> list[Label]:
    """Answers that count, with an event id above `after` up to `until`."""
    return [label_of(row) for row in effective_answers(db, after, until)]


def label_count(db: Connection) -> int:
    """Answers that count and carry a label for training."""
    query = select(func.count(E.c.id)).join(C, C.c.id == E.c.comparison_id)
    return db.execute(query.where(EFFECTIVE, tells_something(), asked_for(FOR_LABEL))).scalar_one()


def last_event(db: Connection) -> int:
    """The id of the newest event, 0 before the first; whatever has a smaller one is there."""
    lock(db, EVENTS_LOCK)
    return db.execute(select(func.max(E.c.id))).scalar_one() or 0


def add_version(db: Connection, version: Version, now: datetime) -> None:
    """Adds a version; one of the same kind and number, from before a crash, is replaced."""
    upsert(db, VERSIONS, {**asdict(version), "created": version.created or now})


def versions(db: Connection, kind: str) -> list[Version]:
    """All versions of the policy or of the reward model, by number."""
    query = select(VERSIONS).where(VERSIONS.c.kind == kind).order_by(VERSIONS.c.number)
    return [Version(**row) for row in db.execute(query).mappings()]


def add_metrics(db: Connection, rows: Sequence[Row]) -> None:
    """More rows of metrics, whose ids become visible in their order, as those of events."""
    if rows:
        lock(db, METRICS_LOCK)
        db.execute(insert(METRICS), [{"row": row} for row in rows])


def metrics(db: Connection, after: int) -> list[Row]:
    """Rows with a larger id than `after`, each with its "id"."""
    query = select(METRICS).where(METRICS.c.id > after).order_by(METRICS.c.id)
    return [{**row, "id": number} for number, row in db.execute(query)]


def add_samples(db: Connection, policy_version: int, rows: Sequence[tuple[str, str]]) -> None:
    """Prompts and what this version answers; replaces what it had."""
    db.execute(delete(SAMPLES).where(SAMPLES.c.policy_version == policy_version))
    values = [
        {"policy_version": policy_version, "position": position, "prompt": prompt, "answer": answer}
        for position, (prompt, answer) in enumerate(rows)
    ]
    if values:
        db.execute(insert(SAMPLES), values)


def samples(db: Connection) -> dict[int, list[tuple[str, str]]]:
    """(prompt, answer) of every version."""
    found: dict[int, list[tuple[str, str]]] = {}
    for row in db.execute(select(SAMPLES).order_by(SAMPLES.c.policy_version, SAMPLES.c.position)):
        found.setdefault(row.policy_version, []).append((row.prompt, row.answer))
    return found


def add_alarm(db: Connection, alarm: Alarm, now: datetime) -> None:
    """One more alarm."""
    db.execute(insert(ALARMS).values({**asdict(alarm), "created": alarm.created or now}))


def alarms(db: Connection) -> list[Alarm]:
    """All alarms, the oldest first."""
    columns = [column for column in ALARMS.c if column.name != "id"]
    return [Alarm(**row) for row in db.execute(select(*columns).order_by(ALARMS.c.id)).mappings()]


def put(db: Connection, name: str, value: Any) -> None:
    """Keeps a JSON value under this name."""
    upsert(db, STATE, {"name": name, "value": value})


def get(db: Connection, name: str, default: Any) -> Any:
    """The value of this name, `default` if there never was one."""
    row = db.execute(select(STATE.c.value).where(STATE.c.name == name)).one_or_none()
    return default if row is None else row.value
