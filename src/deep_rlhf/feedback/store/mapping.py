"""Maps records to database rows and back; conditions and queries that both sides of the store share."""

import math
from collections.abc import Collection, Iterator
from datetime import datetime
from typing import Any
from uuid import uuid4

from sqlalchemy import ColumnElement, Connection, RowMapping, Table, or_, select
from sqlalchemy.dialects import postgresql, sqlite

from deep_rlhf.feedback.records import Comparison, Label
from deep_rlhf.feedback.store.statements import EFFECTIVE, C, E


class DamagedRow(Exception):
    """A row whose columns do not fit together: the table, the row and the problem."""

    def __init__(self, table: str, key: object, problem: str) -> None:
        super().__init__(f"table {table}, row {key}: {problem}")


def comparison_values(comparison: Comparison, now: datetime) -> dict[str, Any]:
    """The columns of a new comparison."""
    return {
        "key": uuid4().hex,
        "prompt": comparison.prompt,
        "answers": comparison.responses,
        "why_selected": comparison.why_selected,
        "policy_version": comparison.policy_version,
        "reward_version": comparison.reward_version,
        "writers": comparison.writers,
        "predicted": comparison.predicted,
        "priority": comparison.priority,
        "overlap": comparison.overlap,
        "expected": comparison.expected,
        "repeat_of": comparison.repeat_of,
        "created": now,
        "open_slots": comparison.overlap,
        "withdrawn": False,
    }


def comparison_of(row: RowMapping) -> Comparison:
    """The record of a row that has all columns of comparisons, and maybe others. Raises DamagedRow."""
    if (row[C.c.why_selected] == "gold") != (row[C.c.expected] is not None):
        raise DamagedRow("comparisons", row[C.c.id], "column expected does not fit column why_selected")
    return Comparison(
        prompt=row[C.c.prompt],
        responses=tuple(row[C.c.answers]),
        why_selected=row[C.c.why_selected],
        policy_version=row[C.c.policy_version],
        reward_version=row[C.c.reward_version],
        writers=tuple(row[C.c.writers]),
        predicted=row[C.c.predicted],
        priority=row[C.c.priority],
        overlap=row[C.c.overlap],
        expected=row[C.c.expected],
        repeat_of=row[C.c.repeat_of],
    )


def label_of(row: RowMapping) -> Label:
    """The record of a row that joins events and comparisons. Raises DamagedRow."""
    label = Label(
        event_id=row[E.c.id],
        comparison_id=row[C.c.id],
        comparison=comparison_of(row),
        annotator=row[E.c.annotator],
        choice=row[E.c.choice],
        ranks=None if row[E.c.ranks] is None else tuple(row[E.c.ranks]),
        strength=row[E.c.strength],
        shown_order=tuple(row[E.c.shown_order]),
        seconds=row[E.c.seconds],
        created=row[E.c.created],
        imported=row[E.c.imported],
    )
    problem = _problem_of(label)
    if problem is not None:
        raise DamagedRow("events", label.event_id, problem)
    return label


def _problem_of(label: Label) -> str | None:
    """What does not fit together in a label, None for one that some version of this program wrote."""
    responses = len(label.comparison.responses)
    if not (math.isfinite(label.seconds) and label.seconds >= 0):
        return "column seconds is not a time span"
    if sorted(label.shown_order) != list(range(responses)):
        return "column shown_order does not name each response once"
    if label.ranks is None:
        fits = label.choice == "cant_tell" or (responses == 2 and label.choice is not None)
        return None if fits else "column choice does not fit the responses"
    fits = label.choice is None and responses > 2 and len(label.ranks) == responses and min(label.ranks) == 1
    return None if fits and max(label.ranks) <= responses else "column ranks does not fit the responses"


def effective_labels(db: Connection, after: int, until: int) -> Iterator[RowMapping]:
    """Labels that were not undone, with their comparisons, by event id: `after` < id ≤ `until`."""
    query = select(E, C).join(C, C.c.id == E.c.comparison_id).where(EFFECTIVE, E.c.id > after, E.c.id <= until)
    return iter(db.execute(query.order_by(E.c.id)).mappings())


def asked_for(reasons: Collection[str]) -> ColumnElement[bool]:
    """The condition that a comparison was selected for one of these reasons."""
    return C.c.why_selected.in_(list(reasons))


def is_decided() -> ColumnElement[bool]:
    """The condition that a label is not "can't tell"."""
    return or_(E.c.choice.is_(None), E.c.choice != "cant_tell")


def upsert(db: Connection, table: Table, values: dict[str, Any]) -> None:
    """Inserts a row, or updates every column of the one that has the same primary key."""
    statement = (postgresql if db.dialect.name == "postgresql" else sqlite).insert(table).values(values)
    key = [column.name for column in table.primary_key]
    changed = {name: statement.excluded[name] for name in values if name not in key}
    db.execute(statement.on_conflict_do_update(index_elements=key, set_=changed))
