"""Connects to SQLite or PostgreSQL: opens and migrates the database, runs and retries transactions.

SQLite: WAL, synchronous=FULL, and BEGIN IMMEDIATE for writers, so that a transaction waits for the write lock before it
reads and never fails half-way. PostgreSQL 15+: READ COMMITTED; the functions lock the rows they change.
"""

import hashlib
import os
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import URL, Connection, Engine, create_engine, event, inspect, make_url, select, table, text
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    IntegrityError,
    InterfaceError,
    NoSuchModuleError,
    OperationalError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.pool import ConnectionPoolEntry
from sqlalchemy.sql import column

from deep_rlhf.errors import StoreError, StoreUnavailable
from deep_rlhf.extras import optional_packages
from deep_rlhf.feedback.store.group_commit import GroupCommitWriter
from deep_rlhf.feedback.store.schema import REVISION

T = TypeVar("T")

BUSY_SECONDS = 30.0  # for which a process waits for another one's transaction
OLDEST_POSTGRESQL = 15
ATTEMPTS = 5  # for a transaction that conflicts with another one: a deadlock, or one token sent twice at once
LOCK = text("SELECT pg_advisory_xact_lock(:number)")
# Advisory locks, beside one per person. The migration repeats the number of EVENTS_LOCK.
MIGRATION_LOCK, EVENTS_LOCK, METRICS_LOCK = 7_310_001, 7_310_002, 7_310_003
DEADLOCK, SERIALIZATION = "40P01", "40001"


class _RetryTransaction(Exception):
    """The connection was lost before the commit, so the transaction can safely run again."""

    def __init__(self, error: DBAPIError) -> None:
        super().__init__(error)
        self.error = error


class Database:
    """A configured engine. Several threads may share one; each process opens its own."""

    def __init__(self, address: str | Path, *, must_exist: bool = False) -> None:
        self.url = parse_address(address)
        self.name = display_name(self.url)
        self.is_sqlite = self.url.get_backend_name() == "sqlite"
        try:
            with optional_packages("A store in PostgreSQL"):
                self.engine = create_engine(self.url, hide_parameters=True, **self._options())
        except (ImportError, TypeError, ValueError, ArgumentError) as error:
            raise StoreError(f"{self.name} cannot be opened: {self._reason(error)}.") from None
        if self.is_sqlite:
            event.listen(self.engine, "connect", _prepare_sqlite)
            event.listen(self.engine, "begin", _begin_sqlite)
        else:
            event.listen(self.engine, "connect", _prepare_postgresql)
        self._writing = self.engine.execution_options(writes=True)
        # SQLite has one writer at a time and makes the others sleep ever longer, so threads of this process queue here.
        self._group_commit = GroupCommitWriter(self._writing) if self.is_sqlite else None
        try:
            self._open(must_exist)
        except (DBAPIError, OSError) as error:
            self.engine.dispose()
            raise StoreError(f"{self.name} cannot be opened: {self._reason(error)}.") from None
        except BaseException:
            self.engine.dispose()
            raise

    def read(self, work: Callable[[Connection], T]) -> T:
        """Runs `work`, which only reads, in a transaction and returns its result.

        Raises StoreUnavailable if the database does not answer.
        """
        return self._with_retries(lambda: self._run(work, self.engine))

    def write(self, work: Callable[[Connection], T]) -> T:
        """Runs `work` in a transaction and returns its result after the commit.

        A transaction that conflicts with another one is run again. Raises StoreUnavailable if the database does
        not answer.
        """
        if self._group_commit is not None:
            writer = self._group_commit
            return self._with_retries(lambda: writer.write(work))
        return self._with_retries(lambda: self._run(work, self._writing))

    def close(self) -> None:
        """Closes every connection."""
        self.engine.dispose()

    def _run(self, work: Callable[[Connection], T], engine: Engine) -> T:
        committing = False
        try:
            with engine.begin() as connection:
                value = work(connection)
                committing = True
            return value
        except DBAPIError as error:
            if error.connection_invalidated and not committing:
                # The connection dates from before a restart of the server. Nothing was done yet; a new one may succeed.
                raise _RetryTransaction(error) from error
            raise

    def _with_retries(self, transaction: Callable[[], T]) -> T:
        """Runs a transaction, again if that may help. Raises StoreUnavailable if the database does not answer."""
        for attempt in range(ATTEMPTS):
            try:
                return transaction()
            except (_RetryTransaction, DBAPIError, PoolTimeoutError) as found:
                error = found.error if isinstance(found, _RetryTransaction) else found
                if attempt < ATTEMPTS - 1 and (found is not error or _is_retryable(error)):
                    continue
                if not isinstance(error, (OperationalError, InterfaceError, PoolTimeoutError)):
                    raise
                reason = f"{self.name} does not answer ({self._reason(error)})"
                raise StoreUnavailable(f"{reason}: the last change may be lost, send it again.") from None
        raise AssertionError

    def _options(self) -> dict[str, Any]:
        pool: dict[str, Any] = {"pool_size": 10, "max_overflow": 40, "pool_timeout": BUSY_SECONDS}
        if self.is_sqlite:
            return {**pool, "connect_args": {"timeout": BUSY_SECONDS, "check_same_thread": False}}
        return {**pool, "isolation_level": "READ COMMITTED"}

    # ---- opening

    def _open(self, must_exist: bool) -> None:
        if self.is_sqlite:
            path = Path(str(self.url.database))
            if must_exist and not path.exists():
                raise StoreError(f"{self.name} does not exist: is the path right?")
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                raise StoreError(f"{self.name} is a folder: give a file for the store.")
            # It holds password hashes, so only the owner may read a new file. Its write-ahead log gets the same mode.
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
            self._switch_to_wal()
        else:
            self._check_version()
        with self.engine.connect() as connection:
            found = self._revision(connection)
        if found is None and must_exist:
            raise StoreError(f"{self.name} is empty: no labels were ever stored there.")
        if found != REVISION:
            self._migrate()

    def _migrate(self) -> None:
        with self._writing.begin() as connection:
            if not self.is_sqlite:
                lock(connection, MIGRATION_LOCK)
            found = self._revision(connection)  # maybe of another process, which held the lock before
            if found == REVISION:
                return
            from deep_rlhf.feedback.store.migrations import upgrade

            upgrade(connection, self.name)

    def _revision(self, connection: Connection) -> str | None:
        """The revision of the store, None for an empty database; raises StoreError if it holds other tables."""
        names = inspect(connection).get_table_names()
        if "alembic_version" not in names:
            if set(names) & {"comparisons", "events", "users"}:
                raise StoreError(f"{self.name} holds tables that are not a store's: give an empty database.")
            return None
        version = table("alembic_version", column("version_num"))
        return connection.scalar(select(version.c.version_num))

    def _switch_to_wal(self) -> None:
        """Switches the file to the write-ahead log. SQLite does not wait for other processes here, so this does."""
        deadline = time.monotonic() + BUSY_SECONDS
        while True:
            try:
                connection = sqlite3.connect(str(self.url.database), timeout=BUSY_SECONDS, isolation_level=None)
                try:
                    mode = connection.execute("PRAGMA journal_mode=WAL").fetchone()[0]
                finally:
                    connection.close()
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise StoreError(f"{self.name} cannot be opened: {self._reason(error)}.") from None
                time.sleep(0.01)
            except sqlite3.DatabaseError as error:
                raise StoreError(f"{self.name} cannot be opened: {self._reason(error)}.") from None
            else:
                if mode != "wal":
                    raise StoreError(
                        f"{self.name} cannot be opened: its file system has no write-ahead log for SQLite."
                    )
                return

    def _check_version(self) -> None:
        with self.engine.connect() as connection:
            version = int((connection.dialect.server_version_info or (0,))[0])
        if version < OLDEST_POSTGRESQL:
            raise StoreError(f"{self.name} is PostgreSQL {version}: {OLDEST_POSTGRESQL} or newer is needed.")

    def _reason(self, error: BaseException) -> str:
        """The first line of the error, without the password."""
        lines = str(getattr(error, "orig", None) or error).strip().splitlines() or [type(error).__name__]
        reason = lines[0].rstrip(".")
        secrets = [self.url.password, *(value for name, value in self.url.query.items() if "pass" in name.lower())]
        for secret in secrets:
            reason = reason.replace(str(secret), "***") if secret else reason
        return reason


def parse_address(address: str | Path) -> URL:
    """Parses a path, or an SQLAlchemy URL of SQLite or PostgreSQL.

    Raises StoreError, without the address, which may hold a password.
    """
    words = str(address)
    if isinstance(address, Path) or "://" not in words:
        if not words.strip():
            raise StoreError("The store needs a file, or a URL of PostgreSQL.")
        return URL.create("sqlite", database=str(Path(words).expanduser()))
    try:
        url = make_url(words)
        backend = url.get_backend_name()
    except (ArgumentError, NoSuchModuleError, ValueError):
        raise StoreError(
            "The store's URL cannot be read: give postgresql+psycopg://user@host/database or a file."
        ) from None
    if backend == "sqlite":
        if url.database in (None, "", ":memory:"):
            raise StoreError("A store in memory would lose labels: give a file, as in sqlite:///labels.db.")
        return url.set(drivername="sqlite")
    if url.drivername in ("postgresql", "postgres", "postgresql+psycopg"):
        return url.set(drivername="postgresql+psycopg")
    raise StoreError(f"A store is SQLite or PostgreSQL (postgresql+psycopg://…), not {url.drivername}.")


def display_name(url: URL) -> str:
    """The store's name in messages: without user, password and options."""
    if url.get_backend_name() == "sqlite":
        return f"The store '{url.database}'"
    return f"The store '{url.database or ''}' on {url.host or 'this machine'}"


def lock(connection: Connection, number: int) -> None:
    """Takes an advisory lock until the end of the transaction; waits while another transaction holds it.

    Does nothing in SQLite, which has one writer at a time.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(LOCK, {"number": number})


def lock_number(name: str) -> int:
    """The number of a lock by its name: 64 bits, as PostgreSQL expects."""
    digest = hashlib.sha256(f"deep-rlhf {name}".encode(errors="replace")).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


def _prepare_sqlite(connection: Any, record: ConnectionPoolEntry) -> None:
    connection.isolation_level = None  # _begin_sqlite begins transactions, not the driver
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("PRAGMA foreign_keys=ON")


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get("writes")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _prepare_postgresql(connection: Any, record: ConnectionPoolEntry) -> None:
    """Makes a commit wait until the label is on disk, even if the server's default is not to wait."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'"
        )
    connection.commit()


def _is_retryable(error: BaseException) -> bool:
    if isinstance(error, IntegrityError):
        return True
    return getattr(getattr(error, "orig", None), "sqlstate", None) in (DEADLOCK, SERIALIZATION)
