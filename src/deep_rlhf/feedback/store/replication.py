"""Copies labels between stores, so that a label that is copied twice is recorded once.

Every function runs inside one transaction.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, RowMapping, bindparam, insert, select, update

from deep_rlhf.errors import StoreError
from deep_rlhf.feedback.records import Label
from deep_rlhf.feedback.store import statements
from deep_rlhf.feedback.store.mapping import comparison_values, effective_labels, label_of
from deep_rlhf.feedback.store.question_queue import (
    LabelInput,
    add_event,
    change_slots,
    check_label,
    check_name,
    lock_question,
)
from deep_rlhf.feedback.store.schema import KIND_LABEL, LABELLED
from deep_rlhf.feedback.store.statements import C, E

ID_OF_KEY = select(C.c.id).where(C.c.key == bindparam("wanted_key"))
TEXTS_OF_KEY = select(C.c.prompt, C.c.answers).where(C.c.key == bindparam("wanted_key"))
ADD_OVERLAP = update(C).where(C.c.id == statements.COMPARISON).values(overlap=C.c.overlap + 1)
ADD_COMPARISON = insert(C).returning(C.c.id)


@dataclass(frozen=True, slots=True, kw_only=True)
class PortableLabel:
    """A label with the keys that identify it and its question in every store.

    Raises StoreError for a label that no store would have accepted.
    """

    label: Label  # its two ids are valid only in the store that it comes from
    token: str
    question: str  # key of the comparison
    repeats: str | None = None  # key of the comparison that this one repeats
    where: str = field(default="", compare=False)  # the row of the file that it was read from

    def __post_init__(self) -> None:
        check_name(self.label.annotator)
        check_name(self.token, "The token of an event")
        check_name(self.question, "The key of a question")
        if self.repeats is not None:
            check_name(self.repeats, "The key of a repeated question")
        check_label(_input(self.label), len(self.label.comparison.responses))
        if sorted(self.label.shown_order) != list(range(len(self.label.comparison.responses))):
            raise StoreError("shown_order must name each response once.")

    @property
    def texts(self) -> tuple[str, ...]:
        """The prompt and the responses, as an export can write them."""
        return _texts(self.label.comparison.prompt, self.label.comparison.responses)


def portable_labels(db: Connection, until: int) -> list[PortableLabel]:
    """All labels up to an event that were not undone, in order."""
    rows = list(effective_labels(db, 0, until))
    keys = dict(db.execute(select(C.c.id, C.c.key)).tuples().all()) if rows else {}
    return [
        PortableLabel(
            label=label_of(row),
            token=row[E.c.token],
            question=row[C.c.key],
            repeats=keys.get(row[C.c.repeat_of]) if row[C.c.repeat_of] is not None else None,
        )
        for row in rows
    ]


def check_import(db: Connection, labels: Sequence[PortableLabel]) -> None:
    """Raises StoreError for a label whose question the store has with other texts."""
    for one in labels:
        row = db.execute(TEXTS_OF_KEY, {"wanted_key": one.question}).one_or_none()
        if row is not None and _texts(row.prompt, row.answers) != one.texts:
            where = f"{one.where}: " if one.where else ""
            raise StoreError(
                f"{where}the store has the question {one.question} with other texts than the import; nothing was added."
            )


def import_labels(db: Connection, labels: Sequence[PortableLabel], now: datetime) -> int:
    """Adds labels that are new to the store, each with its question; returns how many it added.

    Nobody is asked the imported questions. Labels that the store has are left out, even if they were undone since, and
    so is a second label of one person on one question.
    """
    tokens = [one.token for one in labels]
    known = set(db.execute(select(E.c.token).where(E.c.token.in_(tokens))).scalars())
    added = 0
    for one in labels:
        if one.token not in known:
            known.add(one.token)
            added += _import_one(db, one, now)
    return added


def _import_one(db: Connection, portable: PortableLabel, now: datetime) -> bool:
    label = portable.label
    row = _question(db, portable, now)
    number, person = row["id"], label.annotator
    lease = db.execute(statements.LOCK_LEASE, {"comparison": number, "person": person}).one_or_none()
    if lease is not None and lease.state == LABELLED:
        return False
    if lease is None or lease.state != "held":
        if row["open_slots"] > 0:
            change_slots(db, [number], -1)
        else:
            db.execute(ADD_OVERLAP, {"comparison": number})
    values = {
        "comparison_id": number,
        "annotator": person,
        "state": LABELLED,
        "shown_order": label.shown_order,
        "leased_at": label.created,
        "leased_until": label.created,
    }
    db.execute(statements.LEASE[db.dialect.name], values)
    order = label.shown_order
    add_event(
        db, row, person, portable.token, KIND_LABEL, label.created, _input(label), shown_order=order, imported=True
    )
    return True


def _question(db: Connection, portable: PortableLabel, now: datetime) -> RowMapping:
    number = db.execute(ID_OF_KEY, {"wanted_key": portable.question}).scalar_one_or_none()
    if number is None:
        values: dict[str, Any] = comparison_values(portable.label.comparison, now)
        original = None
        if portable.repeats is not None:
            original = db.execute(ID_OF_KEY, {"wanted_key": portable.repeats}).scalar_one_or_none()
        # No slots yet: each imported label adds its own.
        values |= {"key": portable.question, "repeat_of": original, "overlap": 0, "open_slots": 0}
        number = db.execute(ADD_COMPARISON, values).scalar_one()
    row = lock_question(db, number)
    if _texts(row["prompt"], row["answers"]) != portable.texts:
        raise StoreError(f"The store has the question {portable.question} with other texts than the import.")
    return row


def _texts(prompt: str, responses: Sequence[str]) -> tuple[str, ...]:
    return tuple(text.encode(errors="replace").decode() for text in (prompt, *responses))


def _input(label: Label) -> LabelInput:
    return LabelInput(label.choice, label.ranks, label.strength, label.seconds)
