"""The SQL statements of asking and labelling, built once, because building one takes longer than running it.

FOR UPDATE locks rows in PostgreSQL. SQLite omits it, because it has one writer at a time anyway.
"""

from typing import Any

from sqlalchemy import and_, bindparam, exists, func, insert, literal_column, or_, select, update
from sqlalchemy.dialects import postgresql, sqlite

from deep_rlhf.feedback.store.schema import COMPARISONS, EVENTS, KIND_LABEL, LABELLED, LEASES, may_be_asked

C, L, E = COMPARISONS, LEASES, EVENTS
HELD = L.c.state == literal_column("'held'")  # a literal, so that the partial index is used
PERSON: Any = bindparam("person")
COMPARISON: Any = bindparam("comparison")
COMPARISONS_IN: Any = bindparam("comparisons", expanding=True)
UNTIL: Any = bindparam("until")

HELD_BY = (
    select(C, L.c.shown_order, L.c.leased_until)
    .join(L, L.c.comparison_id == C.c.id)
    .where(L.c.annotator == PERSON, HELD)
    .order_by(L.c.leased_at, C.c.priority.desc(), C.c.id)
    .limit(bindparam("count"))
    .with_for_update(of=L)
)
RENEW_ALL = update(L).where(L.c.annotator == PERSON, HELD).values(leased_until=UNTIL)

EXPIRED_IDS = select(L.c.comparison_id).where(HELD, L.c.leased_until < bindparam("now"))
EXPIRED_LEASES = (
    select(L.c.comparison_id, L.c.annotator)
    .join(C, C.c.id == L.c.comparison_id)
    .where(HELD, L.c.leased_until < bindparam("now"))
    .order_by(C.c.id)
    .with_for_update(of=[C, L], skip_locked=True)
)

TO_RELEASE = (
    select(C.c.id)
    .where(C.c.id.in_(select(L.c.comparison_id).where(L.c.annotator == PERSON, HELD)))
    .order_by(C.c.id)
    .with_for_update()
)
RELEASE = update(L).where(L.c.comparison_id == COMPARISON, HELD, L.c.annotator == PERSON).values(state="released")


def _next() -> Any:
    """The next questions by priority that this person neither labelled, skipped nor holds; and whether a lease expired.

    A repeat goes only to somebody who labelled the original.
    """
    mine, original = L.alias(), L.alias()
    had = exists().where(
        mine.c.comparison_id == C.c.id,
        mine.c.annotator == PERSON,
        mine.c.state.in_([literal_column(f"'{state}'") for state in ("held", LABELLED, "skipped")]),
    )
    labelled_original = exists().where(
        original.c.comparison_id == C.c.repeat_of,
        original.c.annotator == PERSON,
        original.c.state == literal_column(f"'{LABELLED}'"),
    )
    return (
        select(C, EXPIRED_IDS.exists().label("some_expired"))
        .where(may_be_asked(), ~had, or_(C.c.repeat_of.is_(None), labelled_original))
        .order_by(C.c.priority.desc(), C.c.id)
        .limit(bindparam("count"))
    )


NEXT_UNLOCKED = _next().with_for_update(of=C, skip_locked=True)  # skips questions that others have locked
NEXT = _next().with_for_update(of=C)

LEASE = {
    name: dialect.insert(L)
    .on_conflict_do_update(
        index_elements=["comparison_id", "annotator"],
        set_={name: dialect.insert(L).excluded[name] for name in ("state", "leased_at", "leased_until")},
    )
    .returning(L.c.shown_order)
    for name, dialect in (("sqlite", sqlite), ("postgresql", postgresql))
}

CHANGE_SLOTS = update(C).where(C.c.id.in_(COMPARISONS_IN)).values(open_slots=C.c.open_slots + bindparam("by"))
LOCK_QUESTION = select(C).where(C.c.id == COMPARISON).with_for_update()
LOCK_LEASE = select(L).where(L.c.comparison_id == COMPARISON, L.c.annotator == PERSON).with_for_update()
LOCK_LEASED_QUESTION = (  # with the event of this token, if there was one before the lock was requested
    select(
        C,
        L.c.state,
        L.c.shown_order,
        select(E.c.id).where(E.c.token == bindparam("sent_token")).scalar_subquery().label("known"),
    )
    .join(L, L.c.comparison_id == C.c.id)
    .where(C.c.id == COMPARISON, L.c.annotator == PERSON)
    .with_for_update(of=[C, L])
)
END_LEASE = (
    update(L).where(L.c.comparison_id == COMPARISON, L.c.annotator == PERSON).values(state=bindparam("new_state"))
)
RENEW_ONE = (
    update(L).where(L.c.comparison_id == COMPARISON, L.c.annotator == PERSON).values(state="held", leased_until=UNTIL)
)
COUNT_LABELLED = select(func.count()).select_from(L).where(L.c.annotator == PERSON, L.c.state == LABELLED)

_undo = E.alias()
_NOT_UNDONE = ~exists().where(_undo.c.undoes == E.c.id)
EFFECTIVE = and_(E.c.kind == KIND_LABEL, _NOT_UNDONE)  # the labels that count
BY_TOKEN = select(E).where(E.c.token == bindparam("sent_token"))
NEWEST = (
    select(E.c.id, E.c.comparison_id, E.c.seconds)
    .where(E.c.annotator == PERSON, E.c.imported.is_(False), EFFECTIVE)
    .order_by(E.c.id.desc())
    .limit(bindparam("count"))
)
LAST_ACTION = (
    select(E.c.id, E.c.comparison_id, E.c.kind)
    .where(E.c.annotator == PERSON, E.c.imported.is_(False), E.c.kind.in_((KIND_LABEL, "skip")), _NOT_UNDONE)
    .order_by(E.c.id.desc())
    .limit(1)
)
ADD_EVENT = insert(E).returning(E.c.id)
