"""The connection to SQLite or PostgreSQL: how it is opened, migrated, and how one transaction runs.

SQLite: WAL, synchronous=FULL, and BEGIN IMMEDIATE for whatever writes, so that a transaction waits for the write lock
before it reads and never fails half-way. PostgreSQL 15+: READ COMMITTED; the functions lock the rows they change.
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

from deep_rlhf.errors import UserError
from deep_rlhf.feedback.store.errors import StoreError, Unavailable
from deep_rlhf.feedback.store.group_commit import TogetherWriter
from deep_rlhf.feedback.store.schema import REVISION

T = TypeVar("T")

BUSY_SECONDS = 30.0  # how long a process waits for another one's transaction
OLDEST_POSTGRESQL = 15
ATTEMPTS = 5  # for a transaction that met another one: a deadlock, or one and the same token sent twice at once
LOCK = text("SELECT pg_advisory_xact_lock(:number)")
# The numbers of the locks that are not of a person; that of the events stands also in the migration.
MIGRATION_LOCK, EVENTS_LOCK, METRICS_LOCK = 7_310_001, 7_310_002, 7_310_003
DEADLOCK, SERIALIZATION = "40P01", "40001"


class _Again(Exception):
    """A transaction that was lost before its commit, by no fault of its own."""

    def __init__(self, error: DBAPIError) -> None:
        super().__init__(error)
        self.error = error


class Database:
    """An engine with the project's rules. Safe to use from several threads; each process opens its own."""

    def __init__(self, address: str | Path, *, must_exist: bool = False) -> None:
        self.url = parse_address(address)
        self.name = shown(self.url)
        self.is_sqlite = self.url.get_backend_name() == "sqlite"
        try:
            self.engine = create_engine(self.url, hide_parameters=True, **self._options())
        except (ImportError, TypeError, ValueError, ArgumentError) as error:
            raise StoreError(f"{self.name} cannot be opened: {self._reason(error)}.") from None
        if self.is_sqlite:
            event.listen(self.engine, "connect", _prepare_sqlite)
            event.listen(self.engine, "begin", _begin_sqlite)
        else:
            event.listen(self.engine, "connect", _prepare_postgresql)
        self._writing = self.engine.execution_options(writes=True)
        # SQLite has one writer at a time, and lets the others sleep ever longer: threads of one process queue here.
        self._together = TogetherWriter(self._writing) if self.is_sqlite else None
        try:
            self._open(must_exist)
        except (DBAPIError, OSError) as error:
            self.engine.dispose()
            raise StoreError(f"{self.name} cannot be opened: {self._reason(error)}.") from None
        except BaseException:
            self.engine.dispose()
            raise

    def read(self, work: Callable[[Connection], T]) -> T:
        """What `work` returns; it only reads. Raises Unavailable if the database does not answer."""
        return self._repeated(lambda: self._run(work, self.engine))

    def write(self, work: Callable[[Connection], T]) -> T:
        """What `work` returns, after its changes were committed; runs it again if another transaction was in the way.

        Raises Unavailable if the database does not answer.
        """
        if self._together is not None:
            together = self._together
            return self._repeated(lambda: together.write(work))
        return self._repeated(lambda: self._run(work, self._writing))

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
                # A connection from before the server restarted: nothing was done yet, and a new one may do it.
                raise _Again(error) from error
            raise

    def _repeated(self, transaction: Callable[[], T]) -> T:
        """Runs a transaction again if that may help; a database that does not answer becomes one sentence."""
        for attempt in range(ATTEMPTS):
            try:
                return transaction()
            except (_Again, DBAPIError, PoolTimeoutError) as found:
                error = found.error if isinstance(found, _Again) else found
                if attempt < ATTEMPTS - 1 and (found is not error or _is_worth_repeating(error)):
                    continue
                if not isinstance(error, (OperationalError, InterfaceError, PoolTimeoutError)):
                    raise
                reason = f"{self.name} does not answer ({self._reason(error)})"
                raise Unavailable(f"{reason}: what was sent last may be lost, send it again.") from None
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
            # Password hashes lie in it: of a new file only its owner may read them. The log beside it follows suit.
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
            self._switch_to_wal()
        else:
            self._check_version()
        with self.engine.connect() as connection:
            found = self._revision(connection)
        if found is None and must_exist:
            raise StoreError(f"{self.name} is empty: no labels were ever kept there.")
        if found != REVISION:
            self._migrate()

    def _migrate(self) -> None:
        with self._writing.begin() as connection:
            if not self.is_sqlite:
                lock(connection, MIGRATION_LOCK)
            found = self._revision(connection)  # of whoever held the lock before
            if found == REVISION:
                return
            from deep_rlhf.feedback.store.migrations import upgrade

            upgrade(connection, self.name)

    def _revision(self, connection: Connection) -> str | None:
        """The migration that the store has; raises StoreError for a database of something else."""
        names = inspect(connection).get_table_names()
        if "alembic_version" not in names:
            if set(names) & {"comparisons", "events", "users"}:
                raise StoreError(f"{self.name} holds tables that are not a store's: give an empty database.")
            return None
        version = table("alembic_version", column("version_num"))
        return connection.scalar(select(version.c.version_num))

    def _switch_to_wal(self) -> None:
        """Once for a file. SQLite does not wait for others here, so this does."""
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
        """The first line of what went wrong, without the password."""
        lines = str(getattr(error, "orig", None) or error).strip().splitlines() or [type(error).__name__]
        reason = lines[0].rstrip(".")
        secrets = [self.url.password, *(value for name, value in self.url.query.items() if "pass" in name.lower())]
        for secret in secrets:
            reason = reason.replace(str(secret), "***") if secret else reason
        return reason


def parse_address(address: str | Path) -> URL:
    """A path, or an SQLAlchemy URL of SQLite or PostgreSQL. Raises UserError, without what the address holds."""
    words = str(address)
    if isinstance(address, Path) or "://" not in words:
        if not words.strip():
            raise UserError("The store needs a file, or a URL of PostgreSQL.")
        return URL.create("sqlite", database=str(Path(words).expanduser()))
    try:
        url = make_url(words)
        backend = url.get_backend_name()
    except (ArgumentError, NoSuchModuleError, ValueError):
        raise UserError(
            "The store's URL cannot be read: give postgresql+psycopg://user@host/database or a file."
        ) from None
    if backend == "sqlite":
        if url.database in (None, "", ":memory:"):
            raise UserError("A store in memory would lose labels: give a file, as in sqlite:///labels.db.")
        return url.set(drivername="sqlite")
    if url.drivername in ("postgresql", "postgres", "postgresql+psycopg"):
        return url.set(drivername="postgresql+psycopg")
    raise UserError(f"A store is SQLite or PostgreSQL (postgresql+psycopg://…), not {url.drivername}.")


def shown(url: URL) -> str:
    """How the store is called in messages: no user, no password, no options."""
    if url.get_backend_name() == "sqlite":
        return f"The store '{url.database}'"
    return f"The store '{url.database or ''}' on {url.host or 'this machine'}"


def lock(connection: Connection, number: int) -> None:
    """Waits until no other transaction holds the lock of this number; the end of the transaction gives it back.

    In SQLite whatever writes is alone already.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(LOCK, {"number": number})


def number_of(name: str) -> int:
    """The number of a lock by its name: 64 bits, as PostgreSQL takes them."""
    digest = hashlib.sha256(f"deep-rlhf {name}".encode(errors="replace")).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


def _prepare_sqlite(connection: Any, record: ConnectionPoolEntry) -> None:
    connection.isolation_level = None  # the driver begins nothing: _begin_sqlite does
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("PRAGMA foreign_keys=ON")


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get("writes")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _prepare_postgresql(connection: Any, record: ConnectionPoolEntry) -> None:
    """A commit means that the label is on disk, also where the server's default is to answer before."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'"
        )
    connection.commit()


def _is_worth_repeating(error: BaseException) -> bool:
    if isinstance(error, IntegrityError):
        return True
    return getattr(getattr(error, "orig", None), "sqlstate", None) in (DEADLOCK, SERIALIZATION)
