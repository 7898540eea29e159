"""Explains why a query failed: finds the row, the table or the missing part of a damaged store."""

import sqlite3
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from functools import partial
from itertools import compress
from typing import Any

from sqlalchemy import BigInteger, Boolean, Column, Connection, Table, cast, select
from sqlalchemy.exc import DBAPIError, InvalidRequestError
from sqlalchemy.types import Text, TypeDecorator

from deep_rlhf.feedback.store.mapping import DamagedRow
from deep_rlhf.feedback.store.opening import contents, damaged_page, missing_part
from deep_rlhf.feedback.store.schema import COMPARISONS, EVENTS, LEASES, METADATA, BadValue, Moment

# What reading a damaged row raises, apart from BadValue: in the driver, in SQLAlchemy, or in what is made of the row.
READING_ERRORS = (DamagedRow, InvalidRequestError, ValueError, TypeError, LookupError, ArithmeticError)


LABELS = (COMPARISONS, LEASES, EVENTS)  # what labels are made of

# SQLite's and PostgreSQL's codes of faults that pass, by the words for what is the matter.
PASSING: dict[int | str, str] = {
    sqlite3.SQLITE_BUSY: "is locked by another process",
    sqlite3.SQLITE_LOCKED: "is locked by another process",
    sqlite3.SQLITE_FULL: "cannot be written, because its disk is full",
    sqlite3.SQLITE_READONLY: "cannot be written, because its file or folder is read-only",
    sqlite3.SQLITE_IOERR: "cannot be read or written by the system",
    sqlite3.SQLITE_CANTOPEN: "cannot be opened by the system",
    "53100": "cannot be written, because the server's disk is full",
    "25006": "cannot be written, because it is read-only",
}
DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, "XX001", "XX002")
FORBIDDEN = "42501"
LARGEST_ROW = 2**62
LONGEST_KEY = 60  # characters of a key that a message shows
NOT_TEXT = "its file holds bytes that are not text"


def code_of(error: BaseException) -> int | str | None:
    """SQLite's primary result code or PostgreSQL's SQLSTATE of a database error, None if it has neither."""
    original = getattr(error, "orig", None)
    code: int | None = getattr(original, "sqlite_errorcode", None)
    return code & 0xFF if code is not None else getattr(original, "sqlstate", None)


def find_damage(connection: Connection) -> str | None:
    """The first thing that is wrong with a store, as a clause; None if everything in it can be read."""
    dialect = connection.dialect.name
    try:
        missing = missing_part(contents(connection.exec_driver_sql, dialect), dialect)
        damage = missing or damaged_row(connection, METADATA.sorted_tables)
        return damage or (damaged_page(connection.exec_driver_sql) if dialect == "sqlite" else None)
    except UnicodeDecodeError:
        return NOT_TEXT
    except DBAPIError as error:
        if code_of(error) in DAMAGED:
            return str(error.orig)
        raise


def damaged_row(connection: Connection, tables: Iterable[Table] = LABELS) -> str | None:
    """The first row of these tables that cannot be read or refers to nothing, as a clause."""
    for table in tables:
        found = _unreadable_row(connection, table) or _dangling_row(connection, table)
        if found is not None:
            return found
    return None


def _unreadable_row(connection: Connection, table: Table) -> str | None:
    checks = [_check(column, connection) for column in table.columns]
    is_key = [column.primary_key for column in table.columns]
    rows = _raw_rows(connection, table)
    row: tuple[Any, ...] | None = ()
    while True:
        before = row
        try:
            row = next(rows, None)
        except sqlite3.Error as error:
            place = f"the row after {_shown(compress(before, is_key))}" if before else "the first row"
            return f"table {table.name}, {place}: {error}"
        if row is None:
            return None
        for column, check, value in zip(table.columns, checks, row, strict=True):
            problem = check(value)
            if problem is not None:
                return f"table {table.name}, row {_shown(compress(row, is_key))}: column {column.name} {problem}"


def _raw_rows(connection: Connection, table: Table) -> Iterator[tuple[Any, ...]]:
    """The rows as the driver reads them, before any conversion."""
    columns: list[Any] = list(table.columns)
    if connection.dialect.name == "postgresql":  # whose driver cannot read every time that the database can hold
        columns = [cast(column, Text) if isinstance(column.type, Moment) else column for column in columns]
    driver: Any = connection.connection.dbapi_connection
    text_factory = getattr(driver, "text_factory", None)
    if text_factory is not None:
        driver.text_factory = _escaped
    try:
        yield from driver.execute(str(select(*columns).compile(dialect=connection.dialect)))
    finally:
        if text_factory is not None:
            driver.text_factory = text_factory


def _escaped(raw: bytes) -> str:
    return raw.decode(errors="surrogateescape")


def _check(column: Column[Any], connection: Connection) -> Callable[[Any], str | None]:
    """A function that says what is wrong with a raw value of a column, None if nothing is."""
    dialect, kind = connection.dialect, column.type
    convert: Callable[[Any], Any] | None = None
    if isinstance(kind, Moment):
        convert = datetime.fromisoformat
        if dialect.name == "sqlite":
            convert = kind.dialect_impl(dialect).result_processor(dialect, None)
    elif isinstance(kind, TypeDecorator):
        convert = partial(kind.process_result_value, dialect=dialect)
    elif isinstance(kind, Boolean):
        convert = _boolean
    elif isinstance(kind, BigInteger):
        convert = _row_number

    def problem(value: Any) -> str | None:
        if value is None:
            return None if column.nullable else "is empty (NULL)"
        try:
            if isinstance(value, str):
                value.encode()
            if convert is not None:
                convert(value)
        except BadValue as error:
            return str(error)
        except UnicodeEncodeError:
            return "is not UTF-8"
        except (ValueError, TypeError, OverflowError):
            return "is not a time"
        return None

    return problem


def _row_number(value: Any) -> None:
    """Behind the largest number SQLite has none for a new row, and says that its disk is full."""
    if not (isinstance(value, int) and value < LARGEST_ROW):
        raise BadValue("is not the number of a row")


def _boolean(value: Any) -> None:
    if value not in (0, 1):
        raise BadValue("is neither true nor false")


def _dangling_row(connection: Connection, table: Table) -> str | None:
    """The first row that refers to a row which does not exist, as a clause."""
    for column in table.columns:
        for key in column.foreign_keys:
            parent = key.column.table.alias()
            target = parent.c[key.column.name]
            query = select(*table.primary_key).outerjoin(parent, target == column)
            row = connection.execute(query.where(column.is_not(None), target.is_(None)).limit(1)).first()
            if row is not None:
                return f"table {table.name}, row {_shown(row)}: column {column.name} names a row that does not exist"
    return None


def _shown(key: Iterable[Any]) -> str:
    """The primary key of a row, in a message."""
    return ", ".join(str(value)[:LONGEST_KEY] for value in key)
