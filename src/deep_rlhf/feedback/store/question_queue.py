"""The annotators' side of the store: leases questions, records labels and skips, undoes and releases.

Every function runs inside one transaction. In PostgreSQL locks are always taken in the order person, comparison, its
leases, events. Only `ask` locks comparisons while it may hold leases; it then skips those that are locked.
"""

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, RowMapping

from deep_rlhf.errors import LabelRefused, StoreError
from deep_rlhf.feedback.records import MU, STRENGTHS, Question
from deep_rlhf.feedback.store import statements
from deep_rlhf.feedback.store.engine import lock, lock_number
from deep_rlhf.feedback.store.mapping import comparison_of
from deep_rlhf.feedback.store.schema import KIND_LABEL, LABELLED

LONGEST_NAME = 200  # characters of an annotator's name or of a token
PACE_LABELS = 100  # newest labels that count for the pace, which changes with practice


@dataclass(frozen=True, slots=True)
class LeaseTerms:
    """Lease parameters: current time, duration, and the seed of the shown order (None: unpredictable)."""

    now: datetime
    duration: timedelta
    seed: int | None

    @property
    def until(self) -> datetime:
        """When a lease that begins now ends."""
        return self.now + self.duration


@dataclass(frozen=True, slots=True)
class LabelInput:
    """A label as it is submitted."""

    choice: str | None = None
    ranks: tuple[int, ...] | None = None
    strength: int | None = None
    seconds: float = 0.0


def ask(db: Connection, person: str, count: int, terms: LeaseTerms, *, wait_for_locks: bool = False) -> list[Question]:
    """Leases questions to a person: first those that they hold already, then the next ones by priority.

    With `wait_for_locks` questions that another transaction has locked are waited for, not skipped.
    """
    check_name(person)
    if count < 1:
        return []
    lock(db, lock_number(f"person {person}"))
    held = db.execute(statements.HELD_BY, {"person": person, "count": count}).all()
    until = min((row.leased_until for row in held), default=terms.until)
    if until < terms.now + terms.duration / 2:  # renewed only when half over, to save a write per question
        until = terms.until
        db.execute(statements.RENEW_ALL, {"person": person, "until": until})
    questions = [_question(row, row.shown_order, until) for row in held]
    if len(questions) < count and not (questions and wait_for_locks):
        questions += _lease_next(db, person, count - len(questions), terms, wait_for_locks=wait_for_locks)
    return questions


def add_label(db: Connection, number: int, person: str, token: str, given: LabelInput, terms: LeaseTerms) -> int:
    """Records a label of a comparison and returns its event id; the same token again returns the same id.

    Raises LabelRefused if somebody else has the question now, or this person labelled it before or never got it, and
    StoreError if the label does not fit the question.
    """
    row = _leased(db, number, person, token, KIND_LABEL)
    if isinstance(row, int):
        return row
    check_label(given, len(row["answers"]))
    db.execute(statements.END_LEASE, {"comparison": number, "person": person, "new_state": LABELLED})
    return add_event(db, row, person, token, KIND_LABEL, terms.now, given, shown_order=row["shown_order"])


def skip(db: Connection, number: int, person: str, token: str, terms: LeaseTerms) -> int:
    """Releases a question that this person does not want to be asked again; returns the event id.

    Raises as `add_label`.
    """
    row = _leased(db, number, person, token, "skip")
    if isinstance(row, int):
        return row
    db.execute(statements.END_LEASE, {"comparison": number, "person": person, "new_state": "skipped"})
    change_slots(db, [number], 1)
    return add_event(db, row, person, token, "skip", terms.now, shown_order=row["shown_order"])


def undo(db: Connection, person: str, token: str, terms: LeaseTerms) -> int | None:
    """Undoes this person's last label or skip, and leases its question to them again.

    Returns the comparison's id, None if there is nothing to undo; imported labels are never undone. Raises LabelRefused
    if somebody else has the skipped question now.
    """
    check_name(person)
    lock(db, lock_number(f"person {person}"))
    known = _earlier_event(db, token, person, "undo", None)
    if known is not None:
        return known["comparison_id"]
    last = db.execute(statements.LAST_ACTION, {"person": person}).one_or_none()
    if last is None:
        return None
    row = lock_question(db, last.comparison_id)
    if last.kind == "skip":  # the skip released its slot
        if row["open_slots"] < 1:
            raise LabelRefused(f"Somebody else has question {row['id']} now: it stays skipped.", "taken")
        change_slots(db, [row["id"]], -1)
    db.execute(statements.RENEW_ONE, {"comparison": row["id"], "person": person, "until": terms.until})
    add_event(db, row, person, token, "undo", terms.now, undoes=last.id)
    return row["id"]


def release(db: Connection, person: str) -> None:
    """Releases every question that this person holds."""
    lock(db, lock_number(f"person {person}"))
    for number in db.execute(statements.TO_RELEASE, {"person": person}).scalars().all():
        ended = db.execute(statements.RELEASE, {"comparison": number, "person": person})
        change_slots(db, [number], ended.rowcount)


def release_expired(db: Connection, now: datetime) -> None:
    """Ends the leases that have expired."""
    for number, person in db.execute(statements.EXPIRED_LEASES, {"now": now}).all():
        db.execute(statements.END_LEASE, {"comparison": number, "person": person, "new_state": "released"})
        change_slots(db, [number], 1)


def labelled(db: Connection, person: str) -> int:
    """How many labels of this person were not undone."""
    return db.execute(statements.COUNT_LABELLED, {"person": person}).scalar_one()


def pace(db: Connection, person: str) -> float | None:
    """Median seconds per label of this person's newest labels, None before the first."""
    seconds = [row.seconds for row in db.execute(statements.NEWEST, {"person": person, "count": PACE_LABELS})]
    return statistics.median(seconds) if seconds else None


def add_event(
    db: Connection,
    row: RowMapping,
    person: str,
    token: str,
    kind: str,
    now: datetime,
    given: LabelInput | None = None,
    *,
    shown_order: Sequence[int] | None = None,
    undoes: int | None = None,
    imported: bool = False,
) -> int:
    """Adds an event about a comparison and returns its id.

    PostgreSQL assigns ids before the commit, so a larger id may become visible first. A trigger therefore makes each
    INSERT hold a shared lock, and reading the newest id waits for it (`trainer_api.last_event`).
    """
    given = given or LabelInput()
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
    return db.execute(statements.ADD_EVENT, values).scalar_one()


def check_name(name: str, what: str = "The name of an annotator") -> None:
    """Raises StoreError for a name or token that is empty, too long, or not printable."""
    if not name or len(name) > LONGEST_NAME or not name.isprintable():
        raise StoreError(f"{what} must have 1 to {LONGEST_NAME} printable characters.")


def check_label(given: LabelInput, responses: int) -> None:
    """Raises StoreError for a label that does not fit a question with this number of responses."""
    if not math.isfinite(given.seconds) or given.seconds < 0:
        raise StoreError(f"The seconds of a label must be finite and at least 0, not {given.seconds}.")
    if given.strength is not None and given.strength not in STRENGTHS:
        raise StoreError(
            f"The strength of a label must be one of {', '.join(map(str, STRENGTHS))}, not {given.strength}."
        )
    if given.choice == "cant_tell" and given.ranks is None:
        return
    if responses == 2:
        if given.choice not in MU or given.ranks is not None:
            raise StoreError(f"The label of a pair must be one of {', '.join(MU)}.")
    elif given.choice is not None or given.ranks is None or len(given.ranks) != responses:
        raise StoreError(
            f"The label of this question must be a rank for each of its {responses} responses, or cant_tell."
        )
    elif not all(isinstance(rank, int) and 1 <= rank <= responses for rank in given.ranks) or 1 not in given.ranks:
        raise StoreError(f"Ranks must be whole numbers from 1, the best, to {responses}, and one of them 1.")


# ---- parts of the above


def _question(row: Any, shown_order: Sequence[int], until: datetime) -> Question:
    return Question(
        id=row.id, comparison=comparison_of(row._mapping), shown_order=tuple(shown_order), leased_until=until
    )


def _lease_next(db: Connection, person: str, count: int, terms: LeaseTerms, *, wait_for_locks: bool) -> list[Question]:
    """Leases the next questions to this person.

    Whoever had a question before sees it in the same order again, so that a page that is still open agrees with what is
    recorded.
    """
    query = statements.NEXT if wait_for_locks else statements.NEXT_UNLOCKED
    values = {"person": person, "count": count, "now": terms.now}
    rows = db.execute(query, values).all()
    if not rows or rows[0].some_expired:
        release_expired(db, terms.now)
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
            "shown_order": shown_order(len(row.answers), row.id, person, terms.seed),
            "leased_at": terms.now,
            "leased_until": terms.until,
        }
        order = db.execute(statements.LEASE[db.dialect.name], lease).scalar_one()
        questions.append(_question(row, order, terms.until))
    return questions


def shown_order(responses: int, number: int, person: str, seed: int | None) -> list[int]:
    """A random order of the responses. With a seed it depends only on the seed, the question and the person."""
    rng: random.Random = random.SystemRandom() if seed is None else random.Random(f"{seed} {number} {person}")
    return rng.sample(range(responses), responses)


def _earlier_event(db: Connection, token: str, person: str, kind: str, number: int | None) -> RowMapping | None:
    """The event that was recorded with this token before; raises StoreError if it is a different one."""
    check_name(token, "The token of an event")
    event = db.execute(statements.BY_TOKEN, {"sent_token": token}).mappings().one_or_none()
    if event is None:
        return None
    if (event["annotator"], event["kind"]) != (person, kind) or number not in (None, event["comparison_id"]):
        raise StoreError("This token was used for something else: make a new one for each label.")
    return event


def lock_question(db: Connection, number: int) -> RowMapping:
    """Locks a comparison for this transaction and returns it; raises LabelRefused if there is none."""
    row = db.execute(statements.LOCK_QUESTION, {"comparison": number}).mappings().one_or_none()
    if row is None:
        raise LabelRefused(f"There is no question {number}.", "unknown")
    return row


def _leased(db: Connection, number: int, person: str, token: str, kind: str) -> RowMapping | int:
    """Locks a question with this person's lease on it; an expired lease is renewed if the question is still free.

    Returns the event's id instead, if this token was recorded before.
    """
    check_name(person)
    check_name(token, "The token of an event")
    values = {"comparison": number, "person": person, "sent_token": token}
    row = db.execute(statements.LOCK_LEASED_QUESTION, values).mappings().one_or_none()
    if row is None or row["known"] or row["state"] != "held":
        known = _earlier_event(db, token, person, kind, number)
        if known is not None:
            return known["id"]
    if row is None:
        lock_question(db, number)
        raise LabelRefused(f"Question {number} was not given to {person}.", "unknown")
    if row["state"] == LABELLED:
        raise LabelRefused(f"{person} has labelled question {number} already.", "gone")
    if row["state"] != "held":
        if row["open_slots"] < 1:
            action = "label" if kind == KIND_LABEL else kind
            raise LabelRefused(f"Somebody else has question {number} now: this {action} came too late.", "taken")
        change_slots(db, [number], -1)
    return row


def change_slots(db: Connection, numbers: Sequence[int], by: int) -> None:
    """Changes how many further people can be given these questions."""
    db.execute(statements.CHANGE_SLOTS, {"comparisons": numbers, "by": by})
