"""The tables. What people did is in `events`, which only grows; `leases` and `open_slots` say who may do what now.

Two rules hold after every transaction:
- open_slots = overlap − people whose lease on the comparison is held or answered;
- a lease is "answered" exactly if this person's newest answer to the comparison was not undone.
"""

import json
import math
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    BigInteger,
    DateTime,
    Dialect,
    Double,
    ForeignKey,
    Index,
    Integer,
    Text,
    false,
    literal_column,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeDecorator

REVISION = "0001"  # of the newest file in migrations/versions


class Exact(TypeDecorator[Any]):
    """Any JSON value, text included, as a JSON document in a text column.

    Text that a model wrote may hold what PostgreSQL has no place for (the NUL character, half a surrogate pair). As
    JSON it is kept as it is, and stays readable in the database's own shell.
    """

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> str | None:
        """To the database; None is NULL."""
        return None if value is None else to_json(value)

    def process_result_value(self, value: str | None, dialect: Dialect) -> Any:
        """From the database."""
        return None if value is None else json.loads(value)


class Moment(TypeDecorator[datetime]):
    """A time with its zone: SQLite keeps none, so everything is UTC."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """To the database."""
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """From the database."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Real(TypeDecorator[float]):
    """A number that may be "not a number": NULL, since SQLite makes that of it anyway."""

    impl = Double
    cache_ok = True

    def process_bind_param(self, value: float | None, dialect: Dialect) -> float | None:
        """To the database."""
        return None if value is None or math.isnan(value) else float(value)

    def process_result_value(self, value: float | None, dialect: Dialect) -> float | None:
        """From the database."""
        return math.nan if value is None else value


def to_json(value: Any) -> str:
    """JSON as readable as can be written in UTF-8. A number that is not finite is null: JSON has no other word."""
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


BigId = BigInteger().with_variant(Integer, "sqlite")  # SQLite numbers rows by themselves only as INTEGER


class Base(DeclarativeBase):
    """All tables."""


class ComparisonRow(Base):
    """A question, as records.Comparison, with its place in the queue."""

    __tablename__ = "comparisons"

    id: Mapped[int] = mapped_column(BigId, primary_key=True)
    key: Mapped[str] = mapped_column(Text, unique=True)  # the same in every store that it is copied to
    prompt: Mapped[str] = mapped_column(Exact)
    answers: Mapped[list[str]] = mapped_column(Exact)
    why_selected: Mapped[str] = mapped_column(Text)
    policy_version: Mapped[int]
    reward_version: Mapped[int]
    writers: Mapped[list[int]] = mapped_column(Exact)
    predicted: Mapped[float | None] = mapped_column(Double)
    priority: Mapped[float] = mapped_column(Double)
    overlap: Mapped[int]
    expected: Mapped[str | None] = mapped_column(Text)
    repeat_of: Mapped[int | None] = mapped_column(BigId, ForeignKey("comparisons.id"))
    created: Mapped[datetime] = mapped_column(Moment)
    open_slots: Mapped[int]  # people it can still be given to
    withdrawn: Mapped[bool] = mapped_column(server_default=false())

    __table_args__ = ({"sqlite_autoincrement": True},)


def may_be_asked() -> Any:
    """The condition on a comparison that can be given to somebody.

    Literals, no parameters: a database uses a partial index only where it sees that the condition implies its own.
    """
    return (ComparisonRow.open_slots > literal_column("0")) & ComparisonRow.withdrawn.is_(False)


# The next questions by priority without a look at those that are answered.
Index(
    "ix_comparisons_queue",
    ComparisonRow.priority.desc(),
    ComparisonRow.id,
    sqlite_where=may_be_asked(),
    postgresql_where=may_be_asked(),
)


class LeaseRow(Base):
    """One person and one comparison: that it was put to him, how, and what became of it."""

    __tablename__ = "leases"

    comparison_id: Mapped[int] = mapped_column(BigId, ForeignKey("comparisons.id"), primary_key=True)
    annotator: Mapped[str] = mapped_column(Text, primary_key=True)
    state: Mapped[str] = mapped_column(Text)  # held, answered, skipped, released (given back, or it ran out)
    shown_order: Mapped[list[int]] = mapped_column(Exact)
    leased_at: Mapped[datetime] = mapped_column(Moment)
    leased_until: Mapped[datetime] = mapped_column(Moment)

    __table_args__ = (
        Index("ix_leases_annotator", "annotator", "state"),
        Index(
            "ix_leases_held",
            "leased_until",
            sqlite_where=text("state = 'held'"),
            postgresql_where=text("state = 'held'"),
        ),
    )


class EventRow(Base):
    """What a person did: an answer, a skip, or an undo of either. Triggers refuse to change or delete a row."""

    __tablename__ = "events"

    id: Mapped[int] = mapped_column(BigId, primary_key=True)  # in the order in which the events became visible
    token: Mapped[str] = mapped_column(Text, unique=True)  # the sender's: the same event sent twice is one
    kind: Mapped[str] = mapped_column(Text)  # answer, skip, undo
    comparison_id: Mapped[int] = mapped_column(BigId, ForeignKey("comparisons.id"), index=True)
    annotator: Mapped[str] = mapped_column(Text)
    choice: Mapped[str | None] = mapped_column(Text)
    ranks: Mapped[list[int] | None] = mapped_column(Exact)
    strength: Mapped[int | None]
    shown_order: Mapped[list[int] | None] = mapped_column(Exact)
    seconds: Mapped[float] = mapped_column(Double)
    # As in the comparison, so that an event says by itself why it was asked and what wrote and chose the question.
    why_selected: Mapped[str] = mapped_column(Text)
    policy_version: Mapped[int]
    reward_version: Mapped[int]
    undoes: Mapped[int | None] = mapped_column(BigId, ForeignKey("events.id"), unique=True)
    imported: Mapped[bool] = mapped_column(server_default=false())  # from a file: U does not take it back
    created: Mapped[datetime] = mapped_column(Moment)

    __table_args__ = (Index("ix_events_annotator", "annotator", "id"), {"sqlite_autoincrement": True})


class VersionRow(Base):
    """A state of the policy or of the reward model, as records.Version."""

    __tablename__ = "versions"

    kind: Mapped[str] = mapped_column(Text, primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    step: Mapped[int]
    labels: Mapped[int]
    last_event: Mapped[int] = mapped_column(BigId)
    figures: Mapped[dict[str, float]] = mapped_column(Exact)
    created: Mapped[datetime] = mapped_column(Moment)


class MetricsRow(Base):
    """One row of a run's metrics."""

    __tablename__ = "metrics"

    id: Mapped[int] = mapped_column(BigId, primary_key=True)
    row: Mapped[dict[str, Any]] = mapped_column(Exact)

    __table_args__ = ({"sqlite_autoincrement": True},)


class SampleRow(Base):
    """A fixed prompt answered by one version of the policy."""

    __tablename__ = "samples"

    policy_version: Mapped[int] = mapped_column(primary_key=True)
    position: Mapped[int] = mapped_column(primary_key=True)
    prompt: Mapped[str] = mapped_column(Exact)
    answer: Mapped[str] = mapped_column(Exact)


class AlarmRow(Base):
    """An alarm, as records.Alarm."""

    __tablename__ = "alarms"

    id: Mapped[int] = mapped_column(BigId, primary_key=True)
    name: Mapped[str] = mapped_column(Text)
    step: Mapped[int]
    action: Mapped[str] = mapped_column(Text)
    message: Mapped[str] = mapped_column(Text)
    figure: Mapped[float] = mapped_column(Real, nullable=True)
    limit: Mapped[float] = mapped_column(Real, nullable=True)
    created: Mapped[datetime] = mapped_column(Moment)


class StateRow(Base):
    """A small value by name: settings, the red button, what the trainer does now."""

    __tablename__ = "state"

    name: Mapped[str] = mapped_column(Text, primary_key=True)
    value: Mapped[Any] = mapped_column(Exact, nullable=True)


class UserRow(Base):
    """An account."""

    __tablename__ = "users"

    name: Mapped[str] = mapped_column(Text, primary_key=True)
    role: Mapped[str] = mapped_column(Text)
    password_hash: Mapped[str] = mapped_column(Text)
    created: Mapped[datetime] = mapped_column(Moment)


class LoginRow(Base):
    """A browser that is logged in; the token itself is known to the browser alone."""

    __tablename__ = "logins"

    token_hash: Mapped[str] = mapped_column(Text, primary_key=True)
    name: Mapped[str] = mapped_column(Text, ForeignKey("users.name", ondelete="CASCADE"))
    expires: Mapped[datetime] = mapped_column(Moment, index=True)
