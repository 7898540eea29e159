"""Answers out of a store and into another one: what makes a copy the same answer, however often it is copied.

Every function runs inside one transaction.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, RowMapping, bindparam, insert, select, update

from deep_rlhf.feedback.records import Label
from deep_rlhf.feedback.store import statements
from deep_rlhf.feedback.store.errors import StoreError
from deep_rlhf.feedback.store.mapping import comparison_values, effective_answers, label_of
from deep_rlhf.feedback.store.question_queue import Given, change_slots, check_answer, check_name, lock_question, record
from deep_rlhf.feedback.store.statements import C, E

BY_KEY = select(C.c.id).where(C.c.key == bindparam("wanted_key"))
ONE_MORE_PERSON = update(C).where(C.c.id == statements.NUMBER).values(overlap=C.c.overlap + 1)
ADD = insert(C).returning(C.c.id)


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenAnswer:
    """An answer with what identifies it and its question in every store.

    Raises StoreError if it is none that the store would have taken.
    """

    label: Label  # its two ids mean something only in the store it comes from
    token: str
    question: str  # key of the comparison
    repeats: str | None = None  # key of the comparison that this one repeats

    def __post_init__(self) -> None:
        check_name(self.label.annotator)
        check_name(self.token, "The token of an event")
        check_name(self.question, "The key of a question")
        check_answer(_given(self.label), len(self.label.comparison.answers))
        if sorted(self.label.shown_order) != list(range(len(self.label.comparison.answers))):
            raise StoreError("The order in which answers were shown names each of them once.")


def given_answers(db: Connection, until: int) -> list[GivenAnswer]:
    """Every answer that counts, up to an event, in order."""
    rows = list(effective_answers(db, 0, until))
    keys = dict(db.execute(select(C.c.id, C.c.key)).tuples().all()) if rows else {}
    return [
        GivenAnswer(
            label=label_of(row),
            token=row[E.c.token],
            question=row[C.c.key],
            repeats=keys.get(row[C.c.repeat_of]) if row[C.c.repeat_of] is not None else None,
        )
        for row in rows
    ]


def take_in(db: Connection, answers: Sequence[GivenAnswer], now: datetime) -> int:
    """Adds answers that are not there yet, each with its question; returns how many it added.

    Their questions are answered, so nobody is asked them. Left out is what the store has, also if it was taken back
    since, and a second answer of one person to one question.
    """
    tokens = [answer.token for answer in answers]
    known = set(db.execute(select(E.c.token).where(E.c.token.in_(tokens))).scalars())
    added = 0
    for answer in answers:
        if answer.token not in known:
            known.add(answer.token)
            added += _take_one(db, answer, now)
    return added


def _take_one(db: Connection, answer: GivenAnswer, now: datetime) -> bool:
    label = answer.label
    row = _question(db, answer, now)
    number, person = row["id"], label.annotator
    lease = db.execute(statements.LOCK_LEASE, {"number": number, "person": person}).one_or_none()
    if lease is not None and lease.state == "answered":
        return False
    if lease is None or lease.state != "held":
        if row["open_slots"] > 0:
            change_slots(db, [number], -1)
        else:
            db.execute(ONE_MORE_PERSON, {"number": number})
    values = {
        "comparison_id": number,
        "annotator": person,
        "state": "answered",
        "shown_order": label.shown_order,
        "leased_at": label.created,
        "leased_until": label.created,
    }
    db.execute(statements.LEND[db.dialect.name], values)
    order = label.shown_order
    record(db, row, person, answer.token, "answer", label.created, _given(label), shown_order=order, imported=True)
    return True


def _question(db: Connection, answer: GivenAnswer, now: datetime) -> RowMapping:
    number = db.execute(BY_KEY, {"wanted_key": answer.question}).scalar_one_or_none()
    if number is None:
        values: dict[str, Any] = comparison_values(answer.label.comparison, now)
        original = None
        if answer.repeats is not None:
            original = db.execute(BY_KEY, {"wanted_key": answer.repeats}).scalar_one_or_none()
        # No place left and none taken: the first answer makes one.
        values |= {"key": answer.question, "repeat_of": original, "overlap": 0, "open_slots": 0}
        number = db.execute(ADD, values).scalar_one()
    row = lock_question(db, number)
    if len(row["answers"]) != len(answer.label.comparison.answers):
        raise StoreError(f"Question {answer.question} has other answers in the store than in what is imported.")
    return row


def _given(label: Label) -> Given:
    return Given(label.choice, label.ranks, label.strength, label.seconds)
