"""The people's side: who is asked what, and what they answer.

Every function runs inside one transaction. In PostgreSQL the order of locks is always person, comparison, its leases,
events; only `ask` takes comparisons without it, and therefore passes over those that are locked.
"""

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import exists, func, insert, or_, select, update
from sqlalchemy.orm import Session, aliased

from deep_rlhf.feedback.records import MU, STRENGTHS, Question
from deep_rlhf.feedback.store.database import lock
from deep_rlhf.feedback.store.errors import Refused, StoreError
from deep_rlhf.feedback.store.rows import LONGEST_NAME, comparison_of, is_effective, is_held, upsert
from deep_rlhf.feedback.store.tables import ComparisonRow, EventRow, LeaseRow, may_be_asked

ANSWERS_OF_PACE = 100  # the newest ones: a person's pace changes while he learns


@dataclass(frozen=True, slots=True)
class Terms:
    """On which questions are lent: the time now, for how long, and the seed of the sides (None: unpredictable)."""

    now: datetime
    lease: timedelta
    seed: int | None


@dataclass(frozen=True, slots=True)
class Given:
    """What a person says about a question."""

    choice: str | None = None
    ranks: tuple[int, ...] | None = None
    strength: int | None = None
    seconds: float = 0.0


def ask(session: Session, annotator: str, count: int, terms: Terms, *, patient: bool = False) -> list[Question]:
    """Questions for this person, leased to him: first those he has already, then the next ones by priority.

    `patient` waits for questions that another transaction has locked, instead of passing over them.
    """
    check_name(annotator)
    if count < 1:
        return []
    lock(session, f"person {annotator}")
    until = terms.now + terms.lease
    renewed = session.execute(
        update(LeaseRow)
        .where(LeaseRow.annotator == annotator, is_held())
        .values(leased_until=until)
        .returning(LeaseRow.comparison_id)
    )
    found = _of_leases(session, annotator, renewed.scalars().all())[:count]
    if len(found) < count and not (found and patient):
        free_expired(session, terms.now)
        found += _lend(session, annotator, count - len(found), terms, patient=patient)
    return [
        Question(id=row.id, comparison=comparison_of(row), shown_order=tuple(order), leased_until=until)
        for row, order in found
    ]


def answer(session: Session, comparison_id: int, annotator: str, token: str, given: Given, terms: Terms) -> int:
    """Takes an answer, and returns the id of its event; the same token again returns the same id.

    Raises Refused if somebody else has the question now, if this person answered it before, or if he never got it.
    """
    known = _repeated(session, token, annotator, "answer", comparison_id)
    if known is not None:
        return known.id
    row, lease = _taken_back(session, comparison_id, annotator, "answer")
    check_answer(given, len(row.answers))
    return _close(session, row, lease, "answered", token, terms.now, given)


def skip(session: Session, comparison_id: int, annotator: str, token: str, terms: Terms) -> int:
    """Gives the question back; this person is not asked it again. Returns the id of the event. Raises as `answer`."""
    known = _repeated(session, token, annotator, "skip", comparison_id)
    if known is not None:
        return known.id
    row, lease = _taken_back(session, comparison_id, annotator, "skip")
    event = _close(session, row, lease, "skipped", token, terms.now, Given())
    _change_slots(session, [comparison_id], 1)
    return event


def undo(session: Session, annotator: str, token: str, terms: Terms) -> int | None:
    """Takes back this person's newest answer that counts and lends him its question again, which keeps its slot.

    Returns the comparison's id, None if there is no such answer. What came from a file is not taken back.
    """
    known = _repeated(session, token, annotator, "undo", None)
    if known is not None:
        return known.comparison_id
    last = session.scalar(
        select(EventRow)
        .where(EventRow.annotator == annotator, EventRow.imported.is_(False), is_effective())
        .order_by(EventRow.id.desc())
        .limit(1)
    )
    if last is None:
        return None
    row = _locked(session, last.comparison_id)
    session.execute(
        update(LeaseRow)
        .where(LeaseRow.comparison_id == row.id, LeaseRow.annotator == annotator)
        .values(state="held", leased_until=terms.now + terms.lease)
    )
    record(session, row, annotator, token, "undo", terms.now, shown_order=None, undoes=last.id)
    return row.id


def release(session: Session, annotator: str) -> None:
    """Gives back every question that this person holds."""
    lock(session, f"person {annotator}")
    held = select(LeaseRow.comparison_id).where(LeaseRow.annotator == annotator, is_held())
    ids = session.scalars(
        select(ComparisonRow.id).where(ComparisonRow.id.in_(held)).order_by(ComparisonRow.id).with_for_update()
    ).all()
    _give_back(session, ids, LeaseRow.annotator == annotator)


def free_expired(session: Session, now: datetime) -> None:
    """Takes back the questions whose leases ran out."""
    expired = select(LeaseRow.comparison_id).where(is_held(), LeaseRow.leased_until < now)
    ids = session.scalars(
        select(ComparisonRow.id)
        .where(ComparisonRow.id.in_(expired))
        .order_by(ComparisonRow.id)
        .with_for_update(skip_locked=True)
    ).all()
    _give_back(session, ids, LeaseRow.leased_until < now)


def answered(session: Session, annotator: str) -> int:
    """How many answers of this person count."""
    return (
        session.scalar(select(func.count()).where(LeaseRow.annotator == annotator, LeaseRow.state == "answered")) or 0
    )


def pace(session: Session, annotator: str) -> float | None:
    """Median seconds of this person's newest answers, None before the first."""
    seconds = session.scalars(
        select(EventRow.seconds)
        .where(EventRow.annotator == annotator, EventRow.imported.is_(False), is_effective())
        .order_by(EventRow.id.desc())
        .limit(ANSWERS_OF_PACE)
    ).all()
    return statistics.median(seconds) if seconds else None


def record(
    session: Session,
    row: ComparisonRow,
    annotator: str,
    token: str,
    kind: str,
    now: datetime,
    given: Given = Given(),
    *,
    shown_order: Sequence[int] | None,
    undoes: int | None = None,
    imported: bool = False,
) -> int:
    """Writes an event and returns its id.

    PostgreSQL hands out ids before the commit; the lock makes them visible in their order. A reader that has seen
    everything up to an id therefore never misses one below it.
    """
    lock(session, "events")
    return session.execute(
        insert(EventRow)
        .values(
            token=token,
            kind=kind,
            comparison_id=row.id,
            annotator=annotator,
            choice=given.choice,
            ranks=None if given.ranks is None else list(given.ranks),
            strength=given.strength,
            shown_order=None if shown_order is None else list(shown_order),
            seconds=float(given.seconds),
            why_selected=row.why_selected,
            policy_version=row.policy_version,
            reward_version=row.reward_version,
            undoes=undoes,
            imported=imported,
            created=now,
        )
        .returning(EventRow.id)
    ).scalar_one()


def check_name(name: str, what: str = "The name of an annotator") -> None:
    """Raises StoreError for a name or a token that no database takes, or no page can show."""
    if not name or len(name) > LONGEST_NAME or not name.isprintable():
        raise StoreError(f"{what} must have 1 to {LONGEST_NAME} printable characters.")


def check_answer(given: Given, answers: int) -> None:
    """Raises StoreError for an answer that does not fit a question with so many answers."""
    if not math.isfinite(given.seconds) or given.seconds < 0:
        raise StoreError(f"The seconds of an answer must be a number from 0 on, not {given.seconds}.")
    if given.strength is not None and given.strength not in STRENGTHS:
        raise StoreError(f"A strength is one of {', '.join(map(str, STRENGTHS))}, not {given.strength}.")
    if given.choice == "cant_tell" and given.ranks is None:
        return
    if answers == 2:
        if given.choice not in MU or given.ranks is not None:
            raise StoreError(f"The answer to a pair is one of {', '.join(MU)}.")
    elif given.choice is not None or given.ranks is None or len(given.ranks) != answers:
        raise StoreError(f"The answer to this question is a rank for each of its {answers} answers, or cant_tell.")
    elif not all(isinstance(rank, int) and 1 <= rank <= answers for rank in given.ranks) or 1 not in given.ranks:
        raise StoreError(f"Ranks are numbers from 1, the best, to {answers}.")


# ---- parts of the above


def _of_leases(session: Session, annotator: str, ids: Sequence[int]) -> list[tuple[ComparisonRow, list[int]]]:
    if not ids:
        return []
    found = session.execute(
        select(ComparisonRow, LeaseRow.shown_order)
        .join(LeaseRow, LeaseRow.comparison_id == ComparisonRow.id)
        .where(LeaseRow.annotator == annotator, ComparisonRow.id.in_(ids))
        .order_by(LeaseRow.leased_at, ComparisonRow.priority.desc(), ComparisonRow.id)
    )
    return [(row, order) for row, order in found]


def _lend(
    session: Session, annotator: str, count: int, terms: Terms, *, patient: bool
) -> list[tuple[ComparisonRow, list[int]]]:
    """The next questions by priority that this person never answered, skipped or holds, now leased to him.

    A repeat goes only to somebody who answered the original. Whoever had a question before, and lost it, sees it with
    the same sides: a page that is still open then shows what is recorded.
    """
    mine, original = aliased(LeaseRow), aliased(LeaseRow)
    rows = session.scalars(
        select(ComparisonRow)
        .where(
            may_be_asked(),
            ~exists().where(
                mine.comparison_id == ComparisonRow.id,
                mine.annotator == annotator,
                mine.state.in_(["held", "answered", "skipped"]),
            ),
            or_(
                ComparisonRow.repeat_of.is_(None),
                exists().where(
                    original.comparison_id == ComparisonRow.repeat_of,
                    original.annotator == annotator,
                    original.state == "answered",
                ),
            ),
        )
        .order_by(ComparisonRow.priority.desc(), ComparisonRow.id)
        .limit(count)
        .with_for_update(of=ComparisonRow, skip_locked=not patient)
    ).all()
    if not rows:
        return []
    _change_slots(session, [row.id for row in rows], -1)
    values = [
        {
            "comparison_id": row.id,
            "annotator": annotator,
            "state": "held",
            "shown_order": sides(len(row.answers), row.id, annotator, terms.seed),
            "leased_at": terms.now,
            "leased_until": terms.now + terms.lease,
        }
        for row in rows
    ]
    key = ("comparison_id", "annotator")
    statement = upsert(session, LeaseRow, values, key, keep=("shown_order",))
    orders = dict(session.execute(statement.returning(LeaseRow.comparison_id, LeaseRow.shown_order)).tuples().all())
    return [(row, orders[row.id]) for row in rows]


def sides(answers: int, comparison_id: int, annotator: str, seed: int | None) -> list[int]:
    """A random order of the answers; with a seed the same for the same person and question, whoever asks first."""
    rng: random.Random = random.SystemRandom() if seed is None else random.Random(f"{seed} {comparison_id} {annotator}")
    return rng.sample(range(answers), answers)


def _repeated(session: Session, token: str, annotator: str, kind: str, comparison_id: int | None) -> EventRow | None:
    """The event that this token has written before; raises StoreError if it was another one."""
    check_name(annotator)
    check_name(token, "The token of an event")
    lock(session, f"person {annotator}")
    event = session.scalar(select(EventRow).where(EventRow.token == token))
    if event is None:
        return None
    if (event.annotator, event.kind) != (annotator, kind) or comparison_id not in (None, event.comparison_id):
        raise StoreError("This token was used for something else: make a new one for each answer.")
    return event


def _locked(session: Session, comparison_id: int) -> ComparisonRow:
    row = session.scalar(select(ComparisonRow).where(ComparisonRow.id == comparison_id).with_for_update())
    if row is None:
        raise Refused(f"There is no question {comparison_id}.", "unknown")
    return row


def _taken_back(session: Session, comparison_id: int, annotator: str, what: str) -> tuple[ComparisonRow, LeaseRow]:
    """The question and this person's lease on it, held again if it ran out and the question is still free."""
    row = _locked(session, comparison_id)
    lease = session.scalar(
        select(LeaseRow)
        .where(LeaseRow.comparison_id == comparison_id, LeaseRow.annotator == annotator)
        .with_for_update()
    )
    if lease is None:
        raise Refused(f"Question {comparison_id} was not put to {annotator}.", "unknown")
    if lease.state == "answered":
        raise Refused(f"{annotator} has answered question {comparison_id} already.", "gone")
    if lease.state != "held":
        if row.open_slots < 1:
            raise Refused(f"Somebody else has question {comparison_id} by now: this {what} came too late.", "taken")
        _change_slots(session, [comparison_id], -1)
    return row, lease


def _close(
    session: Session, row: ComparisonRow, lease: LeaseRow, state: str, token: str, now: datetime, given: Given
) -> int:
    session.execute(
        update(LeaseRow)
        .where(LeaseRow.comparison_id == row.id, LeaseRow.annotator == lease.annotator)
        .values(state=state)
    )
    kind = "answer" if state == "answered" else "skip"
    return record(session, row, lease.annotator, token, kind, now, given, shown_order=lease.shown_order)


def _give_back(session: Session, ids: Sequence[int], whose: Any) -> None:
    """Ends the held leases on these (locked) comparisons that fit the condition."""
    for comparison_id in ids:
        ended = session.execute(
            update(LeaseRow)
            .where(LeaseRow.comparison_id == comparison_id, is_held(), whose)
            .values(state="released")
            .returning(LeaseRow.annotator)
        ).all()
        _change_slots(session, [comparison_id], len(ended))


def _change_slots(session: Session, ids: Sequence[int], by: int) -> None:
    session.execute(
        update(ComparisonRow).where(ComparisonRow.id.in_(ids)).values(open_slots=ComparisonRow.open_slots + by)
    )
