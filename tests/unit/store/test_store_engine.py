"""SQLite and PostgreSQL themselves: what they promise, refuse and say."""

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from postgres import Server, name_of
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from store_parts import START, asked, pair

from deep_rlhf.errors import StoreError, StoreUnavailable, UserError
from deep_rlhf.feedback.store import Store
from deep_rlhf.feedback.store.migrations import head
from deep_rlhf.feedback.store.schema import METADATA, REVISION
from deep_rlhf.feedback.store.statements import EXPIRED_IDS, HELD_BY, NEXT_UNLOCKED


def test_events_can_be_neither_changed_nor_deleted(store: Store) -> None:
    (number,) = store.add([pair()])
    asked(store, "anna")
    store.add_label(number, "anna", token="1", choice="a")
    for statement in ("UPDATE events SET choice = 'b'", "DELETE FROM events"):
        with (
            store._database.engine.connect() as connection,
            pytest.raises(DBAPIError, match="never changed or deleted"),
        ):
            connection.execute(text(statement))
    assert store.labels()[0].choice == "a"


def test_migrations_make_the_tables_that_the_program_has(store: Store) -> None:
    assert head() == REVISION
    with store._database.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, METADATA) == []


def test_a_store_is_opened_again_with_what_it_holds(open_store: Callable[..., Store]) -> None:
    store = open_store()
    (number,) = store.add([pair()])
    asked(store, "anna")
    store.close()
    assert asked(open_store(), "anna") == [number]


def test_a_database_that_is_no_store_of_this_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "labels.db"
    for change, message in (
        ("UPDATE alembic_version SET version_num = '9999'", "later version"),
        ("DROP TABLE alembic_version", "not a store's"),
    ):
        path.unlink(missing_ok=True)
        with Store(path) as store, store._database.engine.begin() as connection:
            connection.execute(text(change))
        with pytest.raises(StoreError, match=message):
            Store(path)


def test_queries_of_the_page_use_their_indexes(tmp_path: Path) -> None:
    with Store(tmp_path / "labels.db") as store:
        values = {"person": "anna", "count": 2, "now": START}
        for statement, indexes in (
            (NEXT_UNLOCKED, {"ix_comparisons_queue", "ix_leases_held"}),
            (HELD_BY, {"ix_leases_annotator"}),
            (EXPIRED_IDS, {"ix_leases_held"}),
        ):
            with store._database.engine.connect() as connection:
                sql = str(statement.compile(connection.engine))
                plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {sql}", _bound(statement, connection, values))
                steps = " ".join(row[3] for row in plan)
            assert all(index in steps for index in indexes), steps
            assert "SCAN leases" not in steps


def _bound(statement: Any, connection: Any, values: dict[str, Any]) -> tuple[Any, ...]:
    compiled = statement.compile(connection.engine)
    parameters = compiled.construct_params(values)
    return tuple(str(parameters[name]) for name in compiled.positiontup)


def test_sqlite_syncs_each_commit_to_a_write_ahead_log(tmp_path: Path) -> None:
    with Store(tmp_path / "a folder" / "labels.db") as store, store._database.engine.connect() as connection:
        pragmas = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        }
    assert pragmas == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 30_000}


def test_a_new_file_belongs_to_its_owner_alone(tmp_path: Path) -> None:
    with Store(tmp_path / "labels.db") as store:
        store.add_user("anna", "admin", "hash")
        assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {
            "labels.db": 0o600,
            "labels.db-wal": 0o600,
            "labels.db-shm": 0o600,
        }


def test_a_store_that_must_exist_is_not_made(tmp_path: Path, postgres: Server) -> None:
    with pytest.raises(StoreError, match="does not exist"):
        Store(tmp_path / "folder" / "labels.db", must_exist=True)
    assert not list(tmp_path.iterdir())
    with pytest.raises(StoreError, match="is empty"):
        Store(postgres.database(), must_exist=True)
    Store(tmp_path / "labels.db").close()
    Store(tmp_path / "labels.db", must_exist=True).close()


def test_postgresql_syncs_each_commit_whatever_its_default(postgres: Server) -> None:
    address = postgres.database()
    postgres.execute(f"ALTER DATABASE {name_of(address)} SET synchronous_commit = off")
    with Store(address.replace("+psycopg", "")) as store, store._database.engine.connect() as connection:
        assert connection.execute(text("SHOW synchronous_commit")).scalar() == "on"


def test_a_lost_connection_is_replaced(postgres: Server) -> None:
    """A server that was restarted in between is no reason to fail: nothing was under way."""
    address = postgres.store()
    cut = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name_of(address)}'"
    with Store(address) as store:
        (number,) = store.add([pair()])
        postgres.execute(cut)
        assert asked(store, "anna") == [number]
        postgres.execute(cut)
        assert store.waiting() == 0


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", "needs a file"),
        ("sqlite://", "in memory"),
        ("sqlite:///:memory:", "in memory"),
        ("mysql://me:secret@host/x", "SQLite or PostgreSQL"),
        ("nonsense://me:secret@host/x", "SQLite or PostgreSQL|cannot be read"),
        ("postgresql://me:secret@host:port/x", "cannot be read"),
        ("postgresql+psycopg://me:secret@127.0.0.1:1/x", "cannot be opened"),
        ("postgresql+psycopg://me@127.0.0.1:1/x?password=secret", "cannot be opened"),
        ("postgresql+psycopg://me@127.0.0.1:1/x?secret=secret", "cannot be opened"),
    ],
)
def test_a_wrong_address_is_one_sentence_without_the_password(url: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        Store(url)
    assert "secret" not in str(error.value).replace('option "secret"', "")
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_store_is_one_sentence(tmp_path: Path) -> None:
    other = tmp_path / "letter.txt"
    other.write_text("Dear Anna, this is no database at all.\n" * 40)
    with pytest.raises(StoreError, match=r"letter\.txt.*not a database"):
        Store(other)
    with pytest.raises(StoreError, match=r"folder"):
        Store(tmp_path)
    foreign = tmp_path / "foreign.db"
    with sqlite3.connect(foreign) as connection:
        connection.execute("CREATE TABLE events (id INTEGER)")
    with pytest.raises(StoreError, match="not a store's"):
        Store(f"sqlite:///{foreign}")


def test_a_database_that_is_gone_is_one_sentence(postgres: Server) -> None:
    address = postgres.database()
    with Store(address) as store:
        store.add([pair()])
        postgres.execute(f"DROP DATABASE {name_of(address)} WITH (FORCE)")
        with pytest.raises(StoreUnavailable, match="does not answer"):
            store.ask("anna")
        with pytest.raises(StoreUnavailable, match="does not answer"):
            store.labels()
