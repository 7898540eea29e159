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

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url, text
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

from deep_rlhf.errors import StoreDamaged, StoreError, StoreUnavailable
from deep_rlhf.extras import optional_packages
from deep_rlhf.feedback.store.damage import (
    DAMAGED,
    FORBIDDEN,
    NOT_TEXT,
    PASSING,
    READING_ERRORS,
    code_of,
    damaged_row,
    find_damage,
)
from deep_rlhf.feedback.store.group_commit import GroupCommitWriter
from deep_rlhf.feedback.store.mapping import DamagedRow
from deep_rlhf.feedback.store.opening import contents, look, read_only_address, revision_of
from deep_rlhf.feedback.store.schema import REVISION

T = TypeVar("T")

BUSY_SECONDS = 30.0  # for which a process waits for another one's transaction
OLDEST_POSTGRESQL = 15
ATTEMPTS = 5  # for a transaction that conflicts with another one: a deadlock, or one token sent twice at once
LOCK = text("SELECT pg_advisory_xact_lock(:number)")
# Advisory locks, beside one per person. The migration repeats the number of EVENTS_LOCK.
MIGRATION_LOCK, EVENTS_LOCK, METRICS_LOCK = 7_310_001, 7_310_002, 7_310_003
QUICK, REMEMBERED = 1.0, 10.0  # if looking for damage takes longer than 1 s, it is believed for 10 times as long
DEADLOCK, SERIALIZATION = "40P01", "40001"


class _RetryTransaction(Exception):
    """The connection was lost before the commit, so the transaction can safely run again."""

    def __init__(self, error: DBAPIError) -> None:
        super().__init__(error)
        self.error = error


class Database:
    """A configured engine. Several threads may share one; each process opens its own."""

    def __init__(self, address: str | Path, *, must_exist: bool = False, read_only: bool = False) -> None:
        """Opens a database; `read_only` changes nothing in it, and needs one that exists."""
        self.url = parse_address(address)
        self._must_exist, self._read_only = must_exist or read_only, read_only
        self.name = display_name(self.url)
        self.is_sqlite = self.url.get_backend_name() == "sqlite"
        if self.is_sqlite:  # later connections open the same file after an os.chdir
            self.url = self.url.set(database=os.path.abspath(str(self.url.database)))
        self._file: tuple[int, int] | None = None  # which file the path led to when it was opened
        self._found: tuple[float, str | None] = (0.0, None)  # what damage was found, and until when that is believed
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
            self._open()
        except (DBAPIError, sqlite3.Error, OSError, ValueError, PoolTimeoutError) as error:
            self.engine.dispose()
            raise self._opening_error(error) from None
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
        """Runs a transaction, again if that may help.

        Raises StoreUnavailable if the database does not answer, and StoreDamaged for what cannot be read.
        """
        for attempt in range(ATTEMPTS):
            try:
                self._check_file()
                return transaction()
            except (_RetryTransaction, DBAPIError, PoolTimeoutError) as found:
                error = found.error if isinstance(found, _RetryTransaction) else found
                if attempt < ATTEMPTS - 1 and (found is not error or _is_retryable(error)):
                    continue
                raise self._fault(error) from error
            except READING_ERRORS as error:
                raise self._fault(error) from error
        raise AssertionError

    def _check_file(self) -> None:
        """Raises StoreUnavailable if the file was moved or deleted: SQLite would go on writing to it, unseen."""
        if self._file is not None and self._file != _identity(self.url):
            raise self._unavailable("is gone: its file was moved, deleted or replaced while it was open")

    def _fault(self, error: Exception) -> Exception:
        """The exception that says what is the matter; `error` itself if it is a mistake of this program."""
        code = code_of(error)
        if code in PASSING and not (code == sqlite3.SQLITE_FULL and self._damage()):
            waited = f" for more than {BUSY_SECONDS:.0f} seconds" if code == sqlite3.SQLITE_BUSY else ""
            return self._unavailable(PASSING[code] + waited, self._reason(error))
        if code == FORBIDDEN:
            return StoreError(f"{self.name} cannot be used: {self._reason(error)}.")
        if isinstance(error, PoolTimeoutError) or _is_away(error):
            reason = f"{self.name} does not answer ({self._reason(error)})"
            return StoreUnavailable(f"{reason}: the last change may be lost, send it again.")
        damage = str(error) if isinstance(error, DamagedRow) else self._damage()
        if damage is None and code in DAMAGED:
            damage = self._reason(error)
        if damage is not None:
            return StoreDamaged(self.name, damage)
        if isinstance(error, (OperationalError, InterfaceError)) and code is None:
            reason = f"{self.name} does not answer ({self._reason(error)})"
            return StoreUnavailable(f"{reason}: the last change may be lost, send it again.")
        return error

    def _unavailable(self, what: str, reason: str = "") -> StoreUnavailable:
        hint = "The last change was not saved: send it again when this is mended."
        return StoreUnavailable(f"{self.name} {what}{f' ({reason})' if reason else ''}. {hint}", f"The store {what}.")

    def _damage(self) -> str | None:
        """What is damaged, None if nothing is. Not looked for all the time, though a page asks again every second."""
        start = time.monotonic()
        if start > self._found[0]:
            found = self._look_for_damage()
            took = time.monotonic() - start
            if took < QUICK:
                return found
            self._found = start + REMEMBERED * took, found
        return self._found[1]

    def _look_for_damage(self) -> str | None:
        try:
            with self.engine.connect() as connection:
                return find_damage(connection)
        except DBAPIError as error:  # SQLite reads the catalog of every file that is whole
            is_damage = code_of(error) in DAMAGED or (self.is_sqlite and code_of(error) not in PASSING)
            return self._reason(error) if is_damage else None
        except UnicodeDecodeError:
            return NOT_TEXT

    def _options(self) -> dict[str, Any]:
        pool: dict[str, Any] = {"pool_size": 10, "max_overflow": 40, "pool_timeout": BUSY_SECONDS}
        if not self.is_sqlite:
            return {**pool, "isolation_level": "READ COMMITTED"}
        options: dict[str, Any] = {"timeout": BUSY_SECONDS, "check_same_thread": False}
        if not self._read_only:
            return {**pool, "connect_args": options}
        path = Path(str(self.url.database))
        return {**pool, "creator": lambda: sqlite3.connect(read_only_address(path), uri=True, **options)}

    # ---- opening

    def _open(self) -> None:
        exists = True
        if self.is_sqlite:
            path = Path(str(self.url.database))
            exists = look(
                path, self.name, must_exist=self._must_exist, writes=not self._read_only, timeout=BUSY_SECONDS
            )
            if not exists:
                path.parent.mkdir(parents=True, exist_ok=True)
                # It holds password hashes, so only the owner may read a new file. Its log gets the same mode.
                os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
            if not self._read_only:
                self._switch_to_wal()
        else:
            self._check_version()
        with self.engine.connect() as connection:
            found = self._revision(connection)
            if found is None and self._must_exist:
                raise StoreError(f"{self.name} is empty: no labels were ever stored there.")
            damage = damaged_row(connection) if found == REVISION else None
        if damage is not None:
            raise StoreDamaged(self.name, damage)
        if found != REVISION:
            self._migrate()
        self._file = _identity(self.url) if self.is_sqlite else None

    def _migrate(self) -> None:
        if self._read_only:
            raise StoreError(f"{self.name} was made by an earlier version: open it once with `deep-rlhf label`.")
        with self._writing.begin() as connection:
            if not self.is_sqlite:
                lock(connection, MIGRATION_LOCK)
            found = self._revision(connection)  # maybe of another process, which held the lock before
            if found == REVISION:
                return
            from deep_rlhf.feedback.store.migrations import upgrade

            upgrade(connection, self.name)

    def _revision(self, connection: Connection) -> str | None:
        """The revision of the store, None for an empty database; raises StoreError if it is none of ours."""
        dialect = connection.dialect.name
        return revision_of(contents(connection.exec_driver_sql, dialect), self.name, dialect)

    def _opening_error(self, error: Exception) -> StoreError:
        """The sentence for a database that cannot be opened."""
        code = code_of(error) or getattr(error, "sqlite_errorcode", None)
        if code in DAMAGED or isinstance(error, UnicodeDecodeError):
            return StoreDamaged(self.name, self._reason(error) if code in DAMAGED else NOT_TEXT)
        if code in PASSING:
            return StoreUnavailable(f"{self.name} {PASSING[code]} ({self._reason(error)}).")
        return StoreError(f"{self.name} cannot be opened: {self._reason(error)}.")

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
                    raise
                time.sleep(0.01)
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
        words = getattr(error, "strerror", None) or str(getattr(error, "orig", None) or error)
        lines = words.strip().splitlines() or [type(error).__name__]
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


def _is_away(error: BaseException) -> bool:
    """Whether PostgreSQL closed or refused the connection, which then has no SQLSTATE or one of these classes."""
    state = getattr(getattr(error, "orig", None), "sqlstate", None)
    if state is not None:
        return str(state)[:2] in ("08", "28", "3D", "53", "55", "57")
    return isinstance(error, DBAPIError) and error.connection_invalidated


def _identity(url: URL) -> tuple[int, int] | None:
    """The device and number of a file, None if there is none."""
    try:
        found = os.stat(str(url.database))
    except OSError:
        return None
    return found.st_dev, found.st_ino
