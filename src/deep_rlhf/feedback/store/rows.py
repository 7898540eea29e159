"""From records to rows and back, and what both sides of the store need of the tables."""

from collections.abc import Collection, Sequence
from datetime import datetime
from typing import Any
from uuid import uuid4

from sqlalchemy import ColumnElement, exists, literal_column, or_, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session, aliased

from deep_rlhf.feedback.records import Comparison, Label
from deep_rlhf.feedback.store.tables import Base, ComparisonRow, EventRow, LeaseRow

LONGEST_NAME = 200  # characters of a person's name or of a token
# Asked for their label; the other reasons measure people or the policy.
LABEL_REASONS = ("initial", "random", "variance", "information")


def comparison_values(comparison: Comparison, now: datetime) -> dict[str, Any]:
    """The columns of a new row."""
    return {
        "key": uuid4().hex,
        "prompt": comparison.prompt,
        "answers": list(comparison.answers),
        "why_selected": comparison.why_selected,
        "policy_version": comparison.policy_version,
        "reward_version": comparison.reward_version,
        "writers": list(comparison.writers),
        "predicted": comparison.predicted,
        "priority": comparison.priority,
        "overlap": comparison.overlap,
        "expected": comparison.expected,
        "repeat_of": comparison.repeat_of,
        "created": now,
        "open_slots": comparison.overlap,
    }


def comparison_of(row: ComparisonRow) -> Comparison:
    """The record."""
    return Comparison(
        prompt=row.prompt,
        answers=tuple(row.answers),
        why_selected=row.why_selected,  # type: ignore[arg-type]
        policy_version=row.policy_version,
        reward_version=row.reward_version,
        writers=tuple(row.writers),
        predicted=row.predicted,
        priority=row.priority,
        overlap=row.overlap,
        expected=row.expected,  # type: ignore[arg-type]
        repeat_of=row.repeat_of,
    )


def label_of(event: EventRow, row: ComparisonRow) -> Label:
    """The record of an answer."""
    return Label(
        event_id=event.id,
        comparison_id=row.id,
        comparison=comparison_of(row),
        annotator=event.annotator,
        choice=event.choice,  # type: ignore[arg-type]
        ranks=None if event.ranks is None else tuple(event.ranks),
        strength=event.strength,
        shown_order=tuple(event.shown_order or ()),
        seconds=event.seconds,
        created=event.created,
    )


def is_effective() -> ColumnElement[bool]:
    """The condition on an event: an answer that was not undone."""
    undo = aliased(EventRow)
    return (EventRow.kind == "answer") & ~exists().where(undo.undoes == EventRow.id)


def effective_answers(session: Session, after: int = 0) -> list[tuple[EventRow, ComparisonRow]]:
    """Answers that count, with their comparisons, in order."""
    found = session.execute(
        select(EventRow, ComparisonRow)
        .join(ComparisonRow, ComparisonRow.id == EventRow.comparison_id)
        .where(is_effective(), EventRow.id > after)
        .order_by(EventRow.id)
    )
    return [(event, row) for event, row in found]


def is_held() -> ColumnElement[bool]:
    """The condition on a lease that somebody holds; a literal, so that the partial index is used."""
    return LeaseRow.state == literal_column("'held'")


def for_label(reasons: Collection[str] = LABEL_REASONS) -> ColumnElement[bool]:
    """The condition on a comparison that it is asked for one of these reasons."""
    return ComparisonRow.why_selected.in_(list(reasons))


def tells_something() -> ColumnElement[bool]:
    """The condition on an answer that it is not "can't tell"."""
    return or_(EventRow.choice.is_(None), EventRow.choice != "cant_tell")


def upsert(
    session: Session,
    table: type[Base],
    values: Sequence[dict[str, Any]],
    key: Collection[str],
    keep: Collection[str] = (),
) -> Any:
    """An INSERT that updates a row which has the same key, in every column but those to keep."""
    insert = (postgresql if session.get_bind().dialect.name == "postgresql" else sqlite).insert
    statement = insert(table).values(list(values))
    changed = {name: statement.excluded[name] for name in values[0] if name not in (*key, *keep)}
    return statement.on_conflict_do_update(index_elements=list(key), set_=changed)
