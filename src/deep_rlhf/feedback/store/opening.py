"""Looks at a file or database without changing it, before a store is opened or made there."""

import os
import sqlite3
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from deep_rlhf.errors import StoreDamaged, StoreError
from deep_rlhf.feedback.store.schema import METADATA, REVISION

SQLITE_BEGINS = b"SQLite format 3\0"
NAMED = 5  # tables of another program that a message lists
TRIGGERS = {
    "sqlite": ("events_refuse_update", "events_refuse_delete"),
    "postgresql": ("events_refuse_change", "events_refuse_truncate", "events_share_lock"),
}
# Kind, name, and for a table its columns. Without what PostgreSQL's own extensions made.
CATALOG = {
    "sqlite": (
        "SELECT m.type, m.name, c.name FROM sqlite_master m LEFT JOIN pragma_table_info(m.name) c"
        " ON m.type IN ('table', 'view') WHERE m.name NOT LIKE 'sqlite!_%' ESCAPE '!'"
    ),
    "postgresql": (
        "SELECT CASE WHEN c.relkind = 'i' THEN 'index' ELSE 'table' END, c.relname, a.attname FROM pg_class c"
        " LEFT JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped"
        " WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f', 'i') AND c.relnamespace = current_schema()::regnamespace"
        " AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.objid = c.oid AND d.deptype = 'e')"
        " UNION ALL SELECT 'trigger', t.tgname, NULL FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid"
        " WHERE NOT t.tgisinternal AND c.relnamespace = current_schema()::regnamespace"
    ),
}
REVISIONS = "SELECT version_num FROM alembic_version"


@dataclass(frozen=True, slots=True)
class Contents:
    """What a database holds: tables with their columns, names of indexes and triggers, and the revision of a store."""

    tables: dict[str, set[str]]
    others: set[str]
    revisions: list[Any]


Query = Callable[[str], Iterable[Any]]


def contents(query: Query, dialect: str) -> Contents:
    """Reads what a database holds."""
    tables: dict[str, set[str]] = {}
    others = set()
    for kind, name, column in query(CATALOG[dialect]):
        if kind in ("table", "view"):
            tables.setdefault(name, set()).add(column)
        else:
            others.add(name)
    has_revision = "version_num" in tables.get("alembic_version", ())
    return Contents(tables, others, [row[0] for row in query(REVISIONS)] if has_revision else [])


def revision_of(found: Contents, name: str, dialect: str) -> str | None:
    """The revision of the store, None for an empty database.

    Raises StoreError for a database of another program, a store of a later version, and an incomplete store.
    """
    if not found.tables:
        return None
    own = [table for table in METADATA.tables if table in found.tables]
    if "alembic_version" not in found.tables or 2 * len(own) < len(METADATA.tables):
        listed = ", ".join(sorted(found.tables)[:NAMED]) + (", …" if len(found.tables) > NAMED else "")
        raise StoreError(
            f"{name} holds tables that are not a store's ({listed}): it was not changed;"
            " give a store or an empty database."
        )
    if len(found.revisions) != 1:
        raise StoreError(
            f"{name} is incomplete: its table alembic_version must have one row, not {len(found.revisions)}."
        )
    revision = str(found.revisions[0])
    if revision == REVISION:
        missing = missing_part(found, dialect)
        if missing is not None:
            raise StoreError(f"{name} is incomplete: {missing}. Restore it from a copy; it was not changed.")
    elif not _is_earlier(revision):
        raise StoreError(
            f"{name} was made by a later version of deep-rlhf (revision {revision}; this one reads {REVISION}):"
            " update this one."
        )
    return revision


def missing_part(found: Contents, dialect: str) -> str | None:
    """The first table, column, index or trigger that a store of this version lacks."""
    for table in METADATA.sorted_tables:
        if table.name not in found.tables:
            return f"the table {table.name} is missing"
        for column in table.columns:
            if column.name not in found.tables[table.name]:
                return f"the table {table.name} has no column {column.name}"
        for index in table.indexes:
            if index.name not in found.others:
                return f"the index {index.name} of the table {table.name} is missing"
    missing = [trigger for trigger in TRIGGERS[dialect] if trigger not in found.others]
    return f"the trigger {missing[0]} of the table events is missing" if missing else None


def _is_earlier(revision: str) -> bool:
    from alembic.util import CommandError

    from deep_rlhf.feedback.store.migrations import scripts

    try:
        return scripts().get_revision(revision) is not None
    except CommandError:
        return False


# ---- SQLite


def look(path: Path, name: str, *, must_exist: bool, writes: bool, timeout: float) -> bool:
    """Whether a file holds a store; False if one may be made there. Raises StoreError for anything else.

    The file is not changed: not its bytes, not its times, not its journal mode.
    """
    if not _is_file_with_content(path, name, must_exist=must_exist, writes=writes):
        return False
    connection = sqlite3.connect(read_only_address(path), uri=True, timeout=timeout)
    try:
        connection.text_factory = _decoded
        if revision_of(contents(connection.execute, "sqlite"), name, "sqlite") is None:
            if must_exist:
                raise StoreError(f"{name} is empty: no labels were ever stored there.")
            return False
        damage = damaged_page(connection.execute)
    finally:
        connection.close()
    if damage is not None:
        raise StoreDamaged(name, damage)
    return True


def read_only_address(path: Path) -> str:
    """The URI of a file that is opened without changing it.

    A database in WAL mode has its log beside it while a process has it open. Where there is none, SQLite would make
    one even for a reader, unless it is told that the file does not change.
    """
    is_open = os.path.exists(f"{path}-wal")
    return f"file:{quote(os.fsencode(os.path.abspath(path)))}?{'mode=ro' if is_open else 'immutable=1'}"


def damaged_page(query: Query) -> str | None:
    """What SQLite finds wrong with its file, as a clause; None if nothing is."""
    ((problem,),) = query("PRAGMA integrity_check(1)")
    return None if problem == "ok" else str(problem).splitlines()[-1]


def _is_file_with_content(path: Path, name: str, *, must_exist: bool, writes: bool) -> bool:
    try:
        found = path.stat()
    except FileNotFoundError:
        if must_exist:
            raise StoreError(f"{name} does not exist: is the path right?") from None
        _refuse_lost_file(path, name)
        return False
    if stat.S_ISDIR(found.st_mode):
        raise StoreError(f"{name} is a folder: give a file for the store.")
    if not stat.S_ISREG(found.st_mode):
        raise StoreError(f"{name} is not a regular file: give a file for the store.")
    with path.open("rb") as file:
        begins = file.read(len(SQLITE_BEGINS))
    if writes:
        for place, what in ((path, "file"), (path.resolve().parent, "folder")):
            if not os.access(place, os.W_OK):
                raise StoreError(f"{name} cannot be written: its {what} is read-only for this user.")
    if not begins:
        _refuse_lost_file(path, name)
        if must_exist:
            raise StoreError(f"{name} is empty: no labels were ever stored there.")
        return False
    if begins != SQLITE_BEGINS:
        raise StoreError(
            f"{name} is not a database of SQLite, or its beginning is damaged: give a store or a new file."
        )
    return True


def _refuse_lost_file(path: Path, name: str) -> None:
    """Raises StoreError if the log of a file that is gone is still there: SQLite would delete it."""
    log = Path(f"{path}-wal")
    if log.exists() and log.stat().st_size > 0:
        raise StoreError(f"{name} is gone, but its log '{log}' is not: put the file back, or move the log away.")


def _decoded(raw: bytes) -> str:
    return raw.decode(errors="replace")
