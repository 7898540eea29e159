"""The tables. `events` records what people did and only grows; `leases` and `open_slots` say who may do what now.

Two invariants hold after every transaction:
- open_slots = overlap − people whose lease on the comparison is held or answered;
- a lease is "answered" exactly if this person's newest label of the comparison was not undone.

The column names are older than the code's vocabulary: `answers` and `answer` hold responses of the policy, and an event
of kind "answer" is a label (KIND_LABEL).
"""

import json
import math
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, get_args

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

from deep_rlhf.feedback.records import MOST_RESPONSES, STRENGTHS, Choice, Reason

KIND_LABEL, LABELLED = "answer", "answered"  # events.kind of a label, leases.state of a labelled comparison
REVISION = "0001"  # of the newest file in migrations/versions
LARGEST = 2**31 - 1  # whole number in an INTEGER column of PostgreSQL
STATES = ("held", LABELLED, "skipped", "released")


BIG_ID = BigInteger().with_variant(Integer, "sqlite")  # SQLite numbers rows by itself only if they are INTEGER


class BadValue(ValueError):
    """A value that no version of this program writes into its column: the row was damaged, or written by hand."""


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_whole(value: Any, least: int = 0, most: int = LARGEST) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_figure(value: Any) -> bool:
    """A finite number, or None for one that was not."""
    return value is None or (isinstance(value, float) and math.isfinite(value)) or _is_whole(value, -LARGEST)


# What an Exact column holds: the words for a message, and the test.
FORMS: dict[str, Callable[[Any], bool]] = {
    "JSON": lambda value: True,
    "a text": _is_text,
    f"a list of 2 to {MOST_RESPONSES} texts": lambda value: (
        isinstance(value, list) and 2 <= len(value) <= MOST_RESPONSES and all(map(_is_text, value))
    ),
    "a list of whole numbers": lambda value: isinstance(value, list) and all(map(_is_whole, value)),
    "an object": lambda value: isinstance(value, dict),
    "an object of numbers": lambda value: isinstance(value, dict) and all(map(_is_figure, value.values())),
}
ONE_TEXT, TEXTS, NUMBERS, OBJECT, FIGURES = list(FORMS)[1:]


class Exact(TypeDecorator[Any]):
    """A JSON value of one of the FORMS, including text, as a JSON document in a text column.

    A model's text may contain characters that PostgreSQL rejects (NUL, half a surrogate pair). JSON preserves them, and
    stays readable in the database's own shell.
    """

    impl = Text
    cache_ok = True

    def __init__(self, form: str = "JSON") -> None:
        super().__init__()
        self.form = form

    def process_bind_param(self, value: Any, dialect: Dialect) -> str | None:
        """Python to database; None is NULL."""
        return None if value is None else to_json(value)

    def process_result_value(self, value: str | None, dialect: Dialect) -> Any:
        """Database to Python. Raises BadValue."""
        if value is None:
            return None
        try:
            read = json.loads(value)
        except (ValueError, TypeError, RecursionError):
            raise BadValue("is not JSON") from None
        if not FORMS[self.form](read):
            raise BadValue(f"is not {self.form}")
        return read


class Word(TypeDecorator[str]):
    """A text: one of the known ones, if there are any."""

    impl = Text
    cache_ok = True

    def __init__(self, *known: str) -> None:
        super().__init__()
        self.known = known

    def process_result_value(self, value: str | None, dialect: Dialect) -> str | None:
        """Database to Python. Raises BadValue."""
        if value is None or (isinstance(value, str) and (not self.known or value in self.known)):
            return value
        raise BadValue(f"is not one of {', '.join(self.known)}" if self.known else "is not a text")


class Whole(TypeDecorator[int]):
    """A whole number within bounds, which SQLite does not enforce."""

    impl = Integer
    cache_ok = True

    def __init__(self, least: int = 0, most: int = LARGEST) -> None:
        super().__init__()
        self.least, self.most = least, most

    def process_result_value(self, value: int | None, dialect: Dialect) -> int | None:
        """Database to Python. Raises BadValue."""
        if value is None or _is_whole(value, self.least, self.most):
            return value
        raise BadValue(f"is not a whole number from {self.least} to {self.most}")


class EventNumber(Whole):
    """The id of an event, or 0."""

    impl = BIG_ID  # type: ignore[assignment]
    cache_ok = True


class Number(TypeDecorator[float]):
    """A float, which SQLite does not enforce. NaN is stored as NULL, because SQLite turns NaN into NULL anyway."""

    impl = Double
    cache_ok = True

    def __init__(self, null: float | None = None) -> None:
        """`null` is what NULL is read as."""
        super().__init__()
        self.null = null

    def process_bind_param(self, value: float | None, dialect: Dialect) -> float | None:
        """Python to database."""
        return None if value is None or math.isnan(value) else float(value)

    def process_result_value(self, value: float | None, dialect: Dialect) -> float | None:
        """Database to Python. Raises BadValue."""
        if value is None:
            return self.null
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        raise BadValue("is not a number")


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


METADATA = MetaData()


def _required(name: str, kind: Any, *constraints: Any, **options: Any) -> Column[Any]:
    return Column(name, kind, *constraints, nullable=False, **options)


# A question, as records.Comparison, with its place in the queue.
COMPARISONS = Table(
    "comparisons",
    METADATA,
    Column("id", BIG_ID, primary_key=True),
    _required("key", Word(), unique=True),  # the same in every store that the question is copied to
    _required("prompt", Exact(ONE_TEXT)),
    _required("answers", Exact(TEXTS)),  # the responses
    _required("why_selected", Word(*get_args(Reason))),
    _required("policy_version", Whole),
    _required("reward_version", Whole),
    _required("writers", Exact(NUMBERS)),
    Column("predicted", Number),
    _required("priority", Number),
    _required("overlap", Whole),
    Column("expected", Word(*get_args(Choice))),
    Column("repeat_of", BIG_ID, ForeignKey("comparisons.id")),
    _required("created", Moment),
    _required("open_slots", Whole(-LARGEST)),  # further people who can be given it
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
    Column("annotator", Word(), primary_key=True),
    _required("state", Word(*STATES)),  # held, answered, skipped, released (given back or expired)
    _required("shown_order", Exact(NUMBERS)),
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
    _required("token", Word(), unique=True),  # the sender's: an event sent twice is recorded once
    _required("kind", Word(KIND_LABEL, "skip", "undo")),  # answer (a label), skip, undo
    _required("comparison_id", BIG_ID, ForeignKey("comparisons.id"), index=True),
    _required("annotator", Word()),
    Column("choice", Word(*get_args(Choice))),
    Column("ranks", Exact(NUMBERS)),
    Column("strength", Whole(min(STRENGTHS), max(STRENGTHS))),
    Column("shown_order", Exact(NUMBERS)),
    _required("seconds", Number),
    # Copied from the comparison, so that each event records why it was asked and which versions were involved.
    _required("why_selected", Word(*get_args(Reason))),
    _required("policy_version", Whole),
    _required("reward_version", Whole),
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
    Column("kind", Word("policy", "reward"), primary_key=True),
    Column("number", Whole, primary_key=True),
    _required("step", Whole),
    _required("labels", Whole),
    _required("last_event", EventNumber),
    _required("figures", Exact(FIGURES)),
    _required("created", Moment),
)

# The metrics of one update.
METRICS = Table(
    "metrics",
    METADATA,
    Column("id", BIG_ID, primary_key=True),
    _required("row", Exact(OBJECT)),
    sqlite_autoincrement=True,
)

# A fixed prompt with the response of one policy version.
SAMPLES = Table(
    "samples",
    METADATA,
    Column("policy_version", Whole, primary_key=True),
    Column("position", Whole, primary_key=True),
    _required("prompt", Exact(ONE_TEXT)),
    _required("answer", Exact(ONE_TEXT)),
)

# An alarm, as records.Alarm.
ALARMS = Table(
    "alarms",
    METADATA,
    Column("id", BIG_ID, primary_key=True),
    _required("name", Word()),
    _required("step", Whole),
    _required("action", Word("warn", "stop", "roll_back")),
    _required("message", Word()),
    Column("figure", Number(math.nan)),
    Column("limit", Number(math.nan)),
    _required("created", Moment),
)

# A small JSON value by key: see feedback.state.
STATE = Table("state", METADATA, Column("name", Word(), primary_key=True), Column("value", Exact))

# An account.
USERS = Table(
    "users",
    METADATA,
    Column("name", Word(), primary_key=True),
    _required("role", Word("admin", "annotator")),
    _required("password_hash", Word()),
    _required("created", Moment),
)

# A browser that is logged in. Only the browser has the token; the store has its hash.
LOGINS = Table(
    "logins",
    METADATA,
    Column("token_hash", Word(), primary_key=True),
    _required("name", Word(), ForeignKey("users.name", ondelete="CASCADE")),
    _required("expires", Moment, index=True),
)
