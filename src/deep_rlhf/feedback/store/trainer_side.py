"""The trainer's side: questions in, labels out, and what the page shows about the model.

Every function runs inside one transaction.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any

from sqlalchemy import delete, func, insert, or_, select, update
from sqlalchemy.orm import Session

from deep_rlhf.feedback.records import Alarm, AnnotatorFigures, Comparison, Label, Row, Version
from deep_rlhf.feedback.store.asking import free_expired
from deep_rlhf.feedback.store.database import lock
from deep_rlhf.feedback.store.errors import StoreError
from deep_rlhf.feedback.store.rows import (
    LABEL_REASONS,
    comparison_values,
    effective_answers,
    for_label,
    is_effective,
    is_held,
    label_of,
    tells_something,
    upsert,
)
from deep_rlhf.feedback.store.tables import (
    AlarmRow,
    ComparisonRow,
    EventRow,
    LeaseRow,
    MetricsRow,
    SampleRow,
    StateRow,
    VersionRow,
    may_be_asked,
)

ANNOTATORS = "store: annotators"  # the state in which the latest fit is kept


def add(session: Session, comparisons: Sequence[Comparison], now: datetime) -> list[int]:
    """New questions; returns their ids in order."""
    originals = {number for comparison in comparisons if (number := comparison.repeat_of) is not None}
    known = set(session.scalars(select(ComparisonRow.id).where(ComparisonRow.id.in_(originals))))
    if originals - known:
        raise StoreError(f"A question repeats number {min(originals - known)}, which does not exist.")
    for comparison in comparisons:
        if comparison.overlap < 1 or not math.isfinite(comparison.priority):
            raise StoreError("A question needs a finite priority, and an overlap of at least one person.")
    rows = [ComparisonRow(**comparison_values(comparison, now)) for comparison in comparisons]
    session.add_all(rows)
    session.flush()
    return [row.id for row in rows]


def withdraw(session: Session, older_than_policy: int, now: datetime) -> int:
    """Takes label questions of older policies, that nobody answered or holds, out of the queue; returns how many."""
    free_expired(session, now)
    gone = session.execute(
        update(ComparisonRow)
        .where(
            may_be_asked(),
            ComparisonRow.open_slots == ComparisonRow.overlap,
            ComparisonRow.policy_version < older_than_policy,
            for_label(LABEL_REASONS),
        )
        .values(withdrawn=True)
        .returning(ComparisonRow.id)
    )
    return len(gone.all())


def waiting(session: Session, reasons: Collection[str] | None, now: datetime) -> int:
    """Questions that somebody could be asked now, those whose lease ran out included."""
    ran_out = select(LeaseRow.comparison_id).where(is_held(), LeaseRow.leased_until < now)
    query = select(func.count()).where(
        or_(may_be_asked(), ComparisonRow.id.in_(ran_out)), ComparisonRow.withdrawn.is_(False)
    )
    return session.scalar(query if reasons is None else query.where(for_label(reasons))) or 0


def labels(session: Session, after: int) -> list[Label]:
    """Answers that count, with a larger event id than `after`."""
    return [label_of(event, row) for event, row in effective_answers(session, after)]


def label_count(session: Session) -> int:
    """Answers that count and carry a label for training."""
    return (
        session.scalar(
            select(func.count(EventRow.id))
            .join(ComparisonRow, ComparisonRow.id == EventRow.comparison_id)
            .where(is_effective(), tells_something(), for_label(LABEL_REASONS))
        )
        or 0
    )


def last_event(session: Session) -> int:
    """The id of the newest event, 0 before the first."""
    return session.scalar(select(func.max(EventRow.id))) or 0


def undone(session: Session, after: int) -> list[int]:
    """The ids of answers that an undo with a larger id than `after` took back."""
    ids = session.scalars(select(EventRow.undoes).where(EventRow.kind == "undo", EventRow.id > after))
    return sorted(number for number in ids if number is not None)


def add_version(session: Session, version: Version, now: datetime) -> None:
    """Adds a version; one of the same kind and number, from before a crash, is replaced."""
    values = {**asdict(version), "created": version.created or now}
    session.execute(upsert(session, VersionRow, [values], ("kind", "number")))


def versions(session: Session, kind: str) -> list[Version]:
    """All versions of the policy or of the reward model, by number."""
    rows = session.scalars(select(VersionRow).where(VersionRow.kind == kind).order_by(VersionRow.number))
    return [
        Version(
            kind=row.kind,  # type: ignore[arg-type]
            number=row.number,
            step=row.step,
            labels=row.labels,
            last_event=row.last_event,
            figures=row.figures,
            created=row.created,
        )
        for row in rows
    ]


def add_metrics(session: Session, rows: Sequence[Row]) -> None:
    """More rows of metrics, whose ids become visible in their order, as those of events."""
    if rows:
        lock(session, "metrics")
        session.execute(insert(MetricsRow), [{"row": row} for row in rows])


def metrics(session: Session, after: int) -> list[Row]:
    """Rows with a larger id than `after`, each with its "id"."""
    found = session.execute(select(MetricsRow.id, MetricsRow.row).where(MetricsRow.id > after).order_by(MetricsRow.id))
    return [{**row, "id": number} for number, row in found]


def add_samples(session: Session, policy_version: int, rows: Sequence[tuple[str, str]]) -> None:
    """Prompts and what this version answers; replaces what it had."""
    session.execute(delete(SampleRow).where(SampleRow.policy_version == policy_version))
    if rows:
        session.execute(
            insert(SampleRow),
            [
                {"policy_version": policy_version, "position": i, "prompt": prompt, "answer": answer}
                for i, (prompt, answer) in enumerate(rows)
            ],
        )


def samples(session: Session) -> dict[int, list[tuple[str, str]]]:
    """(prompt, answer) of every version."""
    found: dict[int, list[tuple[str, str]]] = {}
    for row in session.scalars(select(SampleRow).order_by(SampleRow.policy_version, SampleRow.position)):
        found.setdefault(row.policy_version, []).append((row.prompt, row.answer))
    return found


def add_alarm(session: Session, alarm: Alarm, now: datetime) -> None:
    """One more alarm."""
    session.execute(insert(AlarmRow).values(**{**asdict(alarm), "created": alarm.created or now}))


def alarms(session: Session) -> list[Alarm]:
    """All alarms, the oldest first."""
    return [
        Alarm(
            name=row.name,
            step=row.step,
            action=row.action,  # type: ignore[arg-type]
            message=row.message,
            figure=row.figure,
            limit=row.limit,
            created=row.created,
        )
        for row in session.scalars(select(AlarmRow).order_by(AlarmRow.id))
    ]


def set_annotators(session: Session, figures: Sequence[AnnotatorFigures]) -> None:
    """The latest fit replaces the one before."""
    put(session, ANNOTATORS, [asdict(one) for one in figures])


def annotators(session: Session) -> list[AnnotatorFigures]:
    """The latest fit."""
    return [
        AnnotatorFigures(**{**one, "error_rate_interval": tuple(one["error_rate_interval"])})
        for one in get(session, ANNOTATORS, [])
    ]


def put(session: Session, name: str, value: Any) -> None:
    """Keeps a JSON value under this name."""
    session.execute(upsert(session, StateRow, [{"name": name, "value": value}], ("name",)))


def get(session: Session, name: str, default: Any) -> Any:
    """The value of this name, `default` if there never was one."""
    row = session.get(StateRow, name)
    return default if row is None else row.value
