"""A file or database that is no store of this version: refused in a sentence that says why, and left as it is."""

import os
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from facts import assert_names
from postgres import Server, name_of
from store_parts import pair

from deep_rlhf.cli import label
from deep_rlhf.cli import store as store_command
from deep_rlhf.errors import StoreError, StoreUnavailable, UserError
from deep_rlhf.feedback.store import Store

ALEMBIC = "CREATE TABLE alembic_version (version_num TEXT)"


def _sqlite(path: Path, *statements: str) -> None:
    connection = sqlite3.connect(path, isolation_level=None)
    for statement in statements:
        connection.execute(statement)
    connection.close()


def _state(folder: Path) -> dict[str, Any]:
    """Names, bytes and times of all files: what a look must not change."""
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(folder.glob("x.db*"))}


@pytest.fixture
def labels(tmp_path: Path) -> str:
    (tmp_path / "labels.jsonl").write_text('{"prompt": "p", "chosen": "x", "rejected": "y"}\n')
    return str(tmp_path / "labels.jsonl")


COMMANDS: dict[str, Callable[[str, str], Any]] = {
    "show": lambda store, labels: store_command.main(["show", store]),
    "export": lambda store, labels: store_command.main(["export", store, labels + "l.jsonl"]),
    "import": lambda store, labels: store_command.main(["import", store, labels]),
    "serve": lambda store, labels: label.main(["--port=0", f"--store={store}"]),
    "add_user": lambda store, labels: label.main([f"--store={store}", "--add_user=anna"]),
    "set_password": lambda store, labels: label.main([f"--store={store}", "--set_password=anna"]),
    "remove_user": lambda store, labels: label.main([f"--store={store}", "--remove_user=anna"]),
}
FOREIGN: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "an application": (("CREATE TABLE accounts (id INTEGER)",), ("not a store's", "accounts")),
    "an application in WAL": (("PRAGMA journal_mode=WAL", "CREATE TABLE accounts (id INTEGER)"), ("not a store's",)),
    "a view": (("CREATE VIEW users AS SELECT 1 AS name",), ("not a store's",)),
    "names like ours": (("CREATE TABLE events (id)", "CREATE TABLE users (id)", ALEMBIC), ("not a store's",)),
    "another project's migrations": (
        ("CREATE TABLE pages (id)", ALEMBIC, "INSERT INTO alembic_version VALUES ('0001')"),
        ("not a store's",),
    ),
}
CHANGED: dict[str, tuple[str, tuple[str, ...]]] = {
    "later": ("UPDATE alembic_version SET version_num = '9999'", ("later version", "9999")),
    "no revision": ("DELETE FROM alembic_version", ("alembic_version", "0")),
    "table": ("DROP TABLE logins", ("table logins", "missing")),
    "column": ("ALTER TABLE alarms DROP COLUMN message", ("table alarms", "column message")),
    "index": ("DROP INDEX ix_leases_held", ("index ix_leases_held", "missing")),
    "trigger": ("DROP TRIGGER events_refuse_delete", ("trigger events_refuse_delete",)),
    "no version": ("DROP TABLE alembic_version", ("not a store's",)),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_database_is_refused_and_not_touched(
    kind: str, command: str, labels: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEEP_RLHF_PASSWORD", "correct horse")
    statements, facts = FOREIGN[kind]
    _sqlite(tmp_path / "x.db", *statements)
    before = _state(tmp_path)
    with pytest.raises(StoreError) as error:
        COMMANDS[command](str(tmp_path / "x.db"), labels)
    assert_names(error.value, *facts)
    assert _state(tmp_path) == before


@pytest.mark.parametrize("command", ["show", "import"])
@pytest.mark.parametrize("change", CHANGED)
def test_a_store_of_another_version_or_incomplete_is_refused_and_not_touched(
    change: str, command: str, labels: str, blank_file: Path, tmp_path: Path
) -> None:
    shutil.copy(blank_file, tmp_path / "x.db")
    statement, facts = CHANGED[change]
    _sqlite(tmp_path / "x.db", statement)
    before = _state(tmp_path)
    with pytest.raises(StoreError) as error:
        COMMANDS[command](str(tmp_path / "x.db"), labels)
    assert_names(error.value, *facts)
    assert _state(tmp_path) == before


def test_a_database_that_another_program_has_open_is_not_touched(labels: str, tmp_path: Path) -> None:
    other = sqlite3.connect(tmp_path / "x.db", isolation_level=None)
    other.execute("PRAGMA journal_mode=WAL")
    other.execute("CREATE TABLE accounts (id INTEGER)")  # which is in the log only
    before = _state(tmp_path)
    for command in COMMANDS:
        with pytest.raises(UserError, match="not a store's"):
            COMMANDS[command](str(tmp_path / "x.db"), labels)
    assert {name: before[name] for name in before if name != "x.db-shm"} == {
        name: now for name, now in _state(tmp_path).items() if name != "x.db-shm"
    }
    other.close()


def test_a_store_that_is_shown_or_exported_is_not_changed(labels: str, tmp_path: Path) -> None:
    COMMANDS["import"](str(tmp_path / "x.db"), labels)
    before = _state(tmp_path)
    for command in ("show", "export"):
        COMMANDS[command](str(tmp_path / "x.db"), labels)
    assert _state(tmp_path) == before
    with Store(tmp_path / "x.db") as store:  # the newest label is in the log
        store.add_user("anna", "admin", "hash")
        with Store(tmp_path / "x.db", read_only=True) as reader:
            assert [user.name for user in reader.users()] == ["anna"]
            with pytest.raises(StoreError, match="read-only"):
                reader.remove_user("anna")


def _make_fifo(path: Path) -> None:
    os.mkfifo(path)


PLACES: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "a folder": (Path.mkdir, ("folder",)),
    "a pipe": (_make_fifo, ("not a regular file",)),
    "a text": (lambda path: path.write_text("Dear Anna,\n" * 50), ("not a database",)),
    "an empty file": (Path.touch, ("is empty",)),
    "nothing": (lambda path: None, ("does not exist",)),
    "a link to nothing": (lambda path: path.symlink_to("elsewhere.db"), ("does not exist",)),
    "a file in a file": (lambda path: path.parent.joinpath("y").write_text("x"), ("Not a directory",)),
    "a long name": (lambda path: None, ("too long",)),
    "no name": (lambda path: None, ("null",)),
}


@pytest.mark.parametrize("command", ["show", "export", "remove_user"])
@pytest.mark.parametrize("kind", PLACES)
def test_a_path_that_is_no_store_is_one_sentence(kind: str, command: str, labels: str, tmp_path: Path) -> None:
    make, facts = PLACES[kind]
    make(tmp_path / "x.db")
    name = {"a file in a file": "y/x.db", "a long name": "x" * 300, "no name": "x\0.db"}.get(kind, "x.db")
    before = _state(tmp_path) if kind in ("a text", "an empty file") else None
    with pytest.raises(UserError) as error:
        COMMANDS[command](str(tmp_path / name), labels)
    assert_names(error.value, *facts)
    assert "\n" not in str(error.value)
    assert before is None or _state(tmp_path) == before


def test_an_orphaned_log_is_kept(labels: str, tmp_path: Path) -> None:
    """SQLite would delete it beside a new file, and the labels in it."""
    for file in (None, b""):
        Path(f"{tmp_path}/x.db-wal").write_bytes(b"x" * 100)
        if file is not None:
            (tmp_path / "x.db").write_bytes(file)
        with pytest.raises(StoreError, match=r"x\.db-wal"):
            COMMANDS["import"](str(tmp_path / "x.db"), labels)
        assert Path(f"{tmp_path}/x.db-wal").read_bytes() == b"x" * 100


def test_a_foreign_database_of_postgresql_is_refused_and_not_touched(postgres: Server, labels: str) -> None:
    for statements, facts in FOREIGN.values():
        address = postgres.database()
        for statement in statements:
            if not statement.startswith("PRAGMA"):
                typed = statement.replace("(id)", "(id int)")
                postgres.execute(typed, database=name_of(address))
        for command in ("show", "import"):
            with pytest.raises(StoreError) as error:
                COMMANDS[command](address, labels)
            assert_names(error.value, *facts)


def test_a_store_of_postgresql_that_is_incomplete_or_later_is_refused(postgres: Server, labels: str) -> None:
    address = postgres.database()
    Store(address).close()
    for statement, facts in (
        ("DROP TRIGGER events_refuse_change ON events", ("trigger events_refuse_change",)),
        ("DROP INDEX ix_leases_held", ("index ix_leases_held",)),
        ("ALTER TABLE alarms DROP COLUMN message", ("table alarms", "column message")),
        ("DROP TABLE alarms", ("table alarms", "missing")),
        ("UPDATE alembic_version SET version_num = '9999'", ("later version", "9999")),
    ):
        # Only one missing part is named, so the tests go from the last that is looked for to the first.
        postgres.execute(statement, database=name_of(address))
        for command in ("show", "import"):
            with pytest.raises(StoreError) as error:
                COMMANDS[command](address, labels)
            assert_names(error.value, *facts)


def test_a_wrong_address_in_postgresql_names_the_cause(postgres: Server, labels: str) -> None:
    address = postgres.database()
    for wrong, cause in (
        (address.replace(name_of(address), "nowhere"), "does not exist"),
        (address.replace("postgres@", "nobody@"), "does not exist"),
        (address.replace(str(postgres.port), "1"), "refused"),
    ):
        with pytest.raises(StoreError, match=cause) as error:
            COMMANDS["show"](wrong, labels)
        assert "\n" not in str(error.value)


def test_rights_that_are_missing_in_postgresql_are_named(postgres: Server) -> None:
    address = postgres.database()
    postgres.execute("DROP ROLE IF EXISTS weak; CREATE ROLE weak LOGIN")
    weak = address.replace("postgres@", "weak@")
    with pytest.raises(StoreError, match="permission denied for schema public"):
        Store(weak)
    with Store(address) as store:
        store.add([pair()])
        postgres.execute("GRANT SELECT ON ALL TABLES IN SCHEMA public TO weak", database=name_of(address))
        with Store(weak) as reader:
            assert reader.waiting() == 1
            with pytest.raises(StoreError, match="permission denied for table comparisons"):
                reader.add([pair()])
        postgres.execute(f"ALTER DATABASE {name_of(address)} SET default_transaction_read_only = on")
        store._database.engine.dispose()
        assert store.waiting() == 1
        with pytest.raises(StoreUnavailable, match="is read-only"):
            store.add([pair()])


def test_a_store_stays_the_same_file_after_a_change_of_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with Store("labels.db") as store:
        store.add([pair("p")])
        os.chdir(tmp_path / "elsewhere")
        assert store.waiting() == 1
        store.add([pair("q")])
        assert store.waiting() == 2
    assert list((tmp_path / "elsewhere").iterdir()) == []
