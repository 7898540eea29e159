"""The tables. `events` records what people did and only grows; `leases` and `open_slots` say who may do what now.

Two invariants hold after every transaction:
- open_slots = overlap − people whose lease on the comparison is held or answered;
- a lease is "answered" exactly if this person's newest label of the comparison was not undone.

The column names are older than the code's vocabulary: `answers` and `answer` hold responses of the policy, and an event
of kind "answer" is a label (KIND_LABEL).
"""

import json
import math
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    ColumnElement,
    DateTime,
    Dialect,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    false,
    literal_column,
    text,
)
from sqlalchemy.types import TypeDecorator

KIND_LABEL, LABELLED = "answer", "answered"  # events.kind of a label, leases.state of a labelled comparison
REVISION = "0001"  # of the newest file in migrations/versions


class Exact(TypeDecorator[Any]):
    """Any JSON value, including text, as a JSON document in a text column.

    A model's text may contain characters that PostgreSQL rejects (NUL, half a surrogate pair). JSON preserves them, and
    stays readable in the database's own shell.
    """

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> str | None:
        """Python to database; None is NULL."""
        return None if value is None else to_json(value)

    def process_result_value(self, value: str | None, dialect: Dialect) -> Any:
        """Database to Python."""
        return None if value is None else json.loads(value)


class Moment(TypeDecorator[datetime]):
    """A time with its zone. Everything is stored in UTC, because SQLite stores no zone."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Python to database."""
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Database to Python."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Real(TypeDecorator[float]):
    """A float that may be NaN, stored as NULL, because SQLite turns NaN into NULL anyway."""

    impl = Double
    cache_ok = True

    def process_bind_param(self, value: float | None, dialect: Dialect) -> float | None:
        """Python to database."""
        return None if value is None or math.isnan(value) else float(value)

    def process_result_value(self, value: float | None, dialect: Dialect) -> float | None:
        """Database to Python."""
        return math.nan if value is None else value


def to_json(value: Any) -> str:
    """JSON, unescaped where UTF-8 can encode it. A number that is not finite becomes null, since JSON has no NaN."""
    written = json.dumps(_finite(value), ensure_ascii=False)
    try:
        written.encode()
    except UnicodeEncodeError:
        return json.dumps(_finite(value))
    return written


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


BIG_ID = BigInteger().with_variant(Integer, "sqlite")  # SQLite numbers rows by itself only if they are INTEGER
METADATA = MetaData()


def _required(name: str, kind: Any, *constraints: Any, **options: Any) -> Column[Any]:
    return Column(name, kind, *constraints, nullable=False, **options)


# A question, as records.Comparison, with its place in the queue.
COMPARISONS = Table(
    "comparisons",
    METADATA,
    Column("id", BIG_ID, primary_key=True),
    _required("key", Text, unique=True),  # the same in every store that the question is copied to
    _required("prompt", Exact),
    _required("answers", Exact),  # the responses
    _required("why_selected", Text),
    _required("policy_version", Integer),
    _required("reward_version", Integer),
    _required("writers", Exact),
    Column("predicted", Double),
    _required("priority", Double),
    _required("overlap", Integer),
    Column("expected", Text),
    Column("repeat_of", BIG_ID, ForeignKey("comparisons.id")),
    _required("created", Moment),
    _required("open_slots", Integer),  # further people who can be given it
    _required("withdrawn", Boolean, server_default=false()),
    sqlite_autoincrement=True,
)


def may_be_asked() -> ColumnElement[bool]:
    """The condition that a comparison can be given to somebody.

    It uses literals, not parameters: a database uses a partial index only if the condition visibly implies the index's.
    """
    return (COMPARISONS.c.open_slots > literal_column("0")) & COMPARISONS.c.withdrawn.is_(False)


# Finds the next questions by priority without reading those that are done.
Index(
    "ix_comparisons_queue",
    COMPARISONS.c.priority.desc(),
    COMPARISONS.c.id,
    sqlite_where=may_be_asked(),
    postgresql_where=may_be_asked(),
)

# One person and one comparison that was given to them: in which order, and what became of it.
LEASES = Table(
    "leases",
    METADATA,
    Column("comparison_id", BIG_ID, ForeignKey("comparisons.id"), primary_key=True),
    Column("annotator", Text, primary_key=True),
    _required("state", Text),  # held, answered, skipped, released (given back or expired)
    _required("shown_order", Exact),
    _required("leased_at", Moment),
    _required("leased_until", Moment),
    Index("ix_leases_annotator", "annotator", "state"),
    Index(
        "ix_leases_held",
        "leased_until",
        sqlite_where=text("state = 'held'"),
        postgresql_where=text("state = 'held'"),
    ),
)

# What a person did: a label, a skip, or an undo of either. Triggers refuse to change or delete a row.
EVENTS = Table(
    "events",
    METADATA,
    Column("id", BIG_ID, primary_key=True),  # in the order in which events became visible
    _required("token", Text, unique=True),  # the sender's: an event sent twice is recorded once
    _required("kind", Text),  # answer (a label), skip, undo
    _required("comparison_id", BIG_ID, ForeignKey("comparisons.id"), index=True),
    _required("annotator", Text),
    Column("choice", Text),
    Column("ranks", Exact),
    Column("strength", Integer),
    Column("shown_order", Exact),
    _required("seconds", Double),
    # Copied from the comparison, so that each event records why it was asked and which versions were involved.
    _required("why_selected", Text),
    _required("policy_version", Integer),
    _required("reward_version", Integer),
    Column("undoes", BIG_ID, ForeignKey("events.id"), unique=True),
    _required("imported", Boolean, server_default=false()),  # from a file, so undo skips it
    _required("created", Moment),
    Index("ix_events_annotator", "annotator", "id"),
    sqlite_autoincrement=True,
)

# A version of the policy or of the reward model, as records.Version.
VERSIONS = Table(
    "versions",
    METADATA,
    Column("kind", Text, primary_key=True),
    Column("number", Integer, primary_key=True),
    _required("step", Integer),
    _required("labels", Integer),
    _required("last_event", BIG_ID),
    _required("figures", Exact),
    _required("created", Moment),
)

# The metrics of one update.
METRICS = Table(
    "metrics", METADATA, Column("id", BIG_ID, primary_key=True), _required("row", Exact), sqlite_autoincrement=True
)

# A fixed prompt with the response of one policy version.
SAMPLES = Table(
    "samples",
    METADATA,
    Column("policy_version", Integer, primary_key=True),
    Column("position", Integer, primary_key=True),
    _required("prompt", Exact),
    _required("answer", Exact),
)

# An alarm, as records.Alarm.
ALARMS = Table(
    "alarms",
    METADATA,
    Column("id", BIG_ID, primary_key=True),
    _required("name", Text),
    _required("step", Integer),
    _required("action", Text),
    _required("message", Text),
    Column("figure", Real),
    Column("limit", Real),
    _required("created", Moment),
)

# A small JSON value by key: see feedback.state.
STATE = Table("state", METADATA, Column("name", Text, primary_key=True), Column("value", Exact))

# An account.
USERS = Table(
    "users",
    METADATA,
    Column("name", Text, primary_key=True),
    _required("role", Text),
    _required("password_hash", Text),
    _required("created", Moment),
)

# A browser that is logged in. Only the browser has the token; the store has its hash.
LOGINS = Table(
    "logins",
    METADATA,
    Column("token_hash", Text, primary_key=True),
    _required("name", Text, ForeignKey("users.name", ondelete="CASCADE")),
    _required("expires", Moment, index=True),
)
