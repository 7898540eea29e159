"""The people's side: who is asked what, and what they answer.

Every function runs inside one transaction. In PostgreSQL the order of locks is always person, comparison, its leases,
events; only `ask` takes comparisons when it may hold leases, and then passes over those that are locked.
"""

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, RowMapping

from deep_rlhf.feedback.records import MU, STRENGTHS, Question
from deep_rlhf.feedback.store import statements
from deep_rlhf.feedback.store.engine import lock, number_of
from deep_rlhf.feedback.store.errors import Refused, StoreError
from deep_rlhf.feedback.store.mapping import comparison_of

LONGEST_NAME = 200  # characters of a person's name or of a token
ANSWERS_OF_PACE = 100  # the newest ones: a person's pace changes while he learns


@dataclass(frozen=True, slots=True)
class Terms:
    """On which questions are lent: the time now, for how long, and the seed of the sides (None: unpredictable)."""

    now: datetime
    lease: timedelta
    seed: int | None

    @property
    def until(self) -> datetime:
        """When a lease of now ends."""
        return self.now + self.lease


@dataclass(frozen=True, slots=True)
class Given:
    """What a person says about a question."""

    choice: str | None = None
    ranks: tuple[int, ...] | None = None
    strength: int | None = None
    seconds: float = 0.0


def ask(db: Connection, person: str, count: int, terms: Terms, *, patient: bool = False) -> list[Question]:
    """Questions for this person, leased to him: first those he has already, then the next ones by priority.

    `patient` waits for questions that another transaction has locked, instead of passing over them.
    """
    check_name(person)
    if count < 1:
        return []
    lock(db, number_of(f"person {person}"))
    held = db.execute(statements.HELD_BY, {"person": person, "count": count}).all()
    until = min((row.leased_until for row in held), default=terms.until)
    if until < terms.now + terms.lease / 2:  # not each time: it would be a write more for every question
        until = terms.until
        db.execute(statements.RENEW, {"person": person, "until": until})
    questions = [_question(row, row.shown_order, until) for row in held]
    if len(questions) < count and not (questions and patient):
        questions += _lend(db, person, count - len(questions), terms, patient=patient)
    return questions


def answer(db: Connection, number: int, person: str, token: str, given: Given, terms: Terms) -> int:
    """Takes an answer to a comparison, and returns the id of its event; the same token again returns the same id.

    Raises Refused if somebody else has the question now, if this person answered it before, or if he never got it.
    """
    row = _leased(db, number, person, token, "answer")
    if isinstance(row, int):
        return row
    check_answer(given, len(row["answers"]))
    db.execute(statements.END_LEASE, {"number": number, "person": person, "new_state": "answered"})
    return record(db, row, person, token, "answer", terms.now, given, shown_order=row["shown_order"])


def skip(db: Connection, number: int, person: str, token: str, terms: Terms) -> int:
    """Gives the question back; this person is not asked it again. Returns the id of the event. Raises as `answer`."""
    row = _leased(db, number, person, token, "skip")
    if isinstance(row, int):
        return row
    db.execute(statements.END_LEASE, {"number": number, "person": person, "new_state": "skipped"})
    change_slots(db, [number], 1)
    return record(db, row, person, token, "skip", terms.now, shown_order=row["shown_order"])


def undo(db: Connection, person: str, token: str, terms: Terms) -> int | None:
    """Takes back what this person did last, an answer or a skip, and lends him its question again.

    Returns the comparison's id, None if there is nothing to take back; what came from a file never is. Raises Refused
    if somebody else has the skipped question now.
    """
    check_name(person)
    lock(db, number_of(f"person {person}"))
    known = _repeated(db, token, person, "undo", None)
    if known is not None:
        return known["comparison_id"]
    last = db.execute(statements.LAST_DEED, {"person": person}).one_or_none()
    if last is None:
        return None
    row = lock_question(db, last.comparison_id)
    if last.kind == "skip":  # which gave its slot back
        if row["open_slots"] < 1:
            raise Refused(f"Somebody else has question {row['id']} by now: it stays skipped.", "taken")
        change_slots(db, [row["id"]], -1)
    db.execute(statements.HOLD_AGAIN, {"number": row["id"], "person": person, "until": terms.until})
    record(db, row, person, token, "undo", terms.now, undoes=last.id)
    return row["id"]


def release(db: Connection, person: str) -> None:
    """Gives back every question that this person holds."""
    lock(db, number_of(f"person {person}"))
    for number in db.execute(statements.TO_RELEASE, {"person": person}).scalars().all():
        ended = db.execute(statements.RELEASE, {"number": number, "person": person})
        change_slots(db, [number], ended.rowcount)


def free_expired(db: Connection, now: datetime) -> None:
    """Takes back the questions whose leases ran out."""
    for number, person in db.execute(statements.EXPIRED, {"now": now}).all():
        db.execute(statements.END_LEASE, {"number": number, "person": person, "new_state": "released"})
        change_slots(db, [number], 1)


def answered(db: Connection, person: str) -> int:
    """How many answers of this person count."""
    return db.execute(statements.ANSWERED, {"person": person}).scalar_one()


def pace(db: Connection, person: str) -> float | None:
    """Median seconds of this person's newest answers, None before the first."""
    seconds = [row.seconds for row in db.execute(statements.NEWEST, {"person": person, "count": ANSWERS_OF_PACE})]
    return statistics.median(seconds) if seconds else None


def record(
    db: Connection,
    row: RowMapping,
    person: str,
    token: str,
    kind: str,
    now: datetime,
    given: Given | None = None,
    *,
    shown_order: Sequence[int] | None = None,
    undoes: int | None = None,
    imported: bool = False,
) -> int:
    """Writes an event about a comparison and returns its id.

    PostgreSQL hands out ids before the commit, so a larger one may be seen earlier. A trigger therefore lets each
    INSERT share a lock, and who reads the newest id waits for it (`trainer_side.last_event`).
    """
    given = given or Given()
    values = {
        "token": token,
        "kind": kind,
        "comparison_id": row["id"],
        "annotator": person,
        "choice": given.choice,
        "ranks": given.ranks,
        "strength": given.strength,
        "shown_order": shown_order,
        "seconds": float(given.seconds),
        "why_selected": row["why_selected"],
        "policy_version": row["policy_version"],
        "reward_version": row["reward_version"],
        "undoes": undoes,
        "imported": imported,
        "created": now,
    }
    return db.execute(statements.RECORD, values).scalar_one()


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


def _question(row: Any, shown_order: Sequence[int], until: datetime) -> Question:
    return Question(
        id=row.id, comparison=comparison_of(row._mapping), shown_order=tuple(shown_order), leased_until=until
    )


def _lend(db: Connection, person: str, count: int, terms: Terms, *, patient: bool) -> list[Question]:
    """The next questions, now leased to this person.

    Whoever had a question before, and lost it, sees it with the same sides: a page that is still open then shows what
    is recorded.
    """
    query = statements.NEXT if patient else statements.NEXT_FREE
    values = {"person": person, "count": count, "now": terms.now}
    rows = db.execute(query, values).all()
    if not rows or rows[0].some_ran_out:
        free_expired(db, terms.now)
        rows = db.execute(query, values).all()
    if not rows:
        return []
    change_slots(db, [row.id for row in rows], -1)
    questions = []
    for row in rows:
        lease = {
            "comparison_id": row.id,
            "annotator": person,
            "state": "held",
            "shown_order": sides(len(row.answers), row.id, person, terms.seed),
            "leased_at": terms.now,
            "leased_until": terms.until,
        }
        order = db.execute(statements.LEND[db.dialect.name], lease).scalar_one()
        questions.append(_question(row, order, terms.until))
    return questions


def sides(answers: int, number: int, person: str, seed: int | None) -> list[int]:
    """A random order of the answers; with a seed the same for the same person and question, whoever asks first."""
    rng: random.Random = random.SystemRandom() if seed is None else random.Random(f"{seed} {number} {person}")
    return rng.sample(range(answers), answers)


def _repeated(db: Connection, token: str, person: str, kind: str, number: int | None) -> RowMapping | None:
    """The event that this token has written before; raises StoreError if it was another one."""
    check_name(token, "The token of an event")
    event = db.execute(statements.BY_TOKEN, {"sent_token": token}).mappings().one_or_none()
    if event is None:
        return None
    if (event["annotator"], event["kind"]) != (person, kind) or number not in (None, event["comparison_id"]):
        raise StoreError("This token was used for something else: make a new one for each answer.")
    return event


def lock_question(db: Connection, number: int) -> RowMapping:
    """The comparison, that nobody else changes before this transaction ends; raises Refused if there is none."""
    row = db.execute(statements.LOCK_QUESTION, {"number": number}).mappings().one_or_none()
    if row is None:
        raise Refused(f"There is no question {number}.", "unknown")
    return row


def _leased(db: Connection, number: int, person: str, token: str, kind: str) -> RowMapping | int:
    """The question with this person's lease on it, held again if it ran out and the question is still free.

    The event's id instead, if this token wrote it before.
    """
    check_name(person)
    check_name(token, "The token of an event")
    values = {"number": number, "person": person, "sent_token": token}
    row = db.execute(statements.LOCK_LEASED, values).mappings().one_or_none()
    if row is None or row["known"] or row["state"] != "held":
        known = _repeated(db, token, person, kind, number)
        if known is not None:
            return known["id"]
    if row is None:
        lock_question(db, number)
        raise Refused(f"Question {number} was not put to {person}.", "unknown")
    if row["state"] == "answered":
        raise Refused(f"{person} has answered question {number} already.", "gone")
    if row["state"] != "held":
        if row["open_slots"] < 1:
            raise Refused(f"Somebody else has question {number} by now: this {kind} came too late.", "taken")
        change_slots(db, [number], -1)
    return row


def change_slots(db: Connection, numbers: Sequence[int], by: int) -> None:
    """More or fewer people can be given these questions."""
    db.execute(statements.CHANGE_SLOTS, {"numbers": numbers, "by": by})
