"""Damaged files, rows and disks: every command says in a sentence what is the matter, and loses nothing."""

import os
import random
import resource
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from facts import assert_names
from postgres import Server, name_of
from store_parts import pair

from deep_rlhf.cli import store as store_command
from deep_rlhf.errors import StoreDamaged, StoreUnavailable, UserError
from deep_rlhf.feedback.records import Alarm, Comparison, Version
from deep_rlhf.feedback.store import Store, engine

SEED = 14


def fill(store: Store) -> None:
    """A row or more in every table but the accounts'."""
    store.add([pair() for _ in range(6)])
    for i in range(4):
        store.add_label(store.ask("anna")[0].id, "anna", token=f"t{i}", choice="a" if i % 2 else "b", seconds=1.0)
    store.skip(store.ask("anna")[0].id, "anna", token="skip")
    store.undo("anna", token="undo")
    store.add_version(Version(kind="reward", number=1, step=2, labels=2, last_event=2, figures={"accuracy": 0.5}))
    store.add_metrics([{"step": i, "reward": 0.5, "sqrt_kl": 1.0} for i in range(3)])
    store.add_samples(0, [("prompt", "response")])
    store.add_alarm(Alarm(name="kl", step=1, action="warn", message="m", figure=2.0, limit=1.0))
    store.put("status", {"state": "training"})


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("good") / "labels.db"
    with Store(path) as store:
        fill(store)
    return path.read_bytes()


def _damaged(good: bytes, rng: random.Random) -> bytes:
    data = bytearray(good)
    kind = rng.choice(("flip", "flips", "zeros", "cut"))
    if kind == "cut":
        return bytes(data[: rng.randrange(1, len(data))])
    if kind == "zeros":
        at = rng.randrange(len(data))
        length = len(data[at : at + rng.choice((8, 100, 4096))])
        data[at : at + length] = bytes(length)
    for _ in range({"flip": 1, "flips": 30, "zeros": 0}[kind]):
        data[rng.randrange(len(data))] ^= rng.randrange(1, 256)
    return bytes(data)


def _check_refusal(use: Callable[[], object]) -> None:
    """The use either works or is refused in a sentence with a true cause."""
    refusal = ""
    try:
        use()
    except UserError as error:
        refusal = str(error)
    assert "\n" not in refusal
    assert "does not answer" not in refusal


def _read_and_write(store: Store) -> None:
    for use in (
        lambda: store.ask("bert", count=3),
        store.labels,
        store.metrics,
        store.samples,
        store.alarms,
        store.unseen,
        store.users,
        lambda: store.versions("reward"),
        lambda: store.get("status"),
        lambda: store.undo("anna", token="again"),
        lambda: store.add([pair()]),
        lambda: store.release("bert"),
        lambda: store.withdraw(older_than_policy=0),
    ):
        _check_refusal(use)


def _open_and_use(path: Path) -> None:
    with Store(path) as store:
        _read_and_write(store)


@pytest.mark.parametrize("cases", [25, pytest.param(400, marks=pytest.mark.slow)])
def test_a_damaged_file_is_one_sentence(cases: int, good: bytes, tmp_path: Path) -> None:
    rng = random.Random(SEED)
    for _ in range(cases):
        for file in tmp_path.glob("x.db*"):
            file.unlink()
        (tmp_path / "x.db").write_bytes(_damaged(good, rng))
        path = tmp_path / "x.db"
        for arguments in (["show", str(path)], ["export", str(path), str(tmp_path / "out.jsonl"), "--all"]):
            before = path.read_bytes()
            _check_refusal(partial(store_command.main, arguments))
            assert path.read_bytes() == before
        _check_refusal(partial(_open_and_use, path))


@pytest.mark.parametrize("cases", [15, pytest.param(200, marks=pytest.mark.slow)])
def test_a_file_that_is_damaged_while_it_is_open_is_one_sentence(cases: int, good: bytes, tmp_path: Path) -> None:
    rng = random.Random(SEED)
    for _ in range(cases):
        for file in tmp_path.glob("x.db*"):
            file.unlink()
        path = tmp_path / "x.db"
        path.write_bytes(good)
        with Store(path) as store:
            store._database.engine.dispose()
            damaged = _damaged(good, rng)
            with path.open("r+b") as file:
                file.write(damaged)
                file.truncate(len(damaged))
            _read_and_write(store)


BAD_LABELS = [  # table, column, value, and the facts of the message
    ("comparisons", "prompt", "'{\"a'", ("row 6", "column prompt", "not JSON")),
    ("comparisons", "prompt", "'5'", ("row 6", "column prompt", "not a text")),
    ("comparisons", "answers", "'[\"x\"]'", ("row 6", "column answers")),
    ("comparisons", "why_selected", "'fun'", ("row 6", "column why_selected", "random")),
    ("comparisons", "policy_version", "-1", ("row 6", "column policy_version")),
    ("comparisons", "repeat_of", "77", ("row 6", "column repeat_of", "does not exist")),
    ("leases", "state", "'kept'", ("row 5, anna", "column state", "held")),
    ("leases", "shown_order", "'[0, \"x\"]'", ("row 5, anna", "column shown_order")),
    ("events", "kind", "'nod'", ("row 6", "column kind", "answer")),
    ("events", "comparison_id", "77", ("row 6", "column comparison_id", "does not exist")),
    ("events", "created", "'2026-13-01 00:00:00'", ("row 6", "column created", "not a time")),
    ("events", "created", "'infinity'", ("row 6", "column created", "not a time")),
    ("events", "choice", "'c'", ("row 6", "column choice")),
]
BAD_LABELS_IN_SQLITE = [
    ("comparisons", "predicted", "'x'", ("row 6", "column predicted", "not a number")),
    ("comparisons", "withdrawn", "'x'", ("row 6", "column withdrawn")),
    ("events", "created", "5", ("row 6", "column created", "not a time")),
    ("events", "token", "x'ff00'", ("row 6", "column token", "not a text")),
    ("events", "annotator", "CAST(x'ff61' AS TEXT)", ("row 6", "column annotator", "not UTF-8")),
    ("events", "policy_version", "9223372036854775807", ("row 6", "column policy_version")),
]


def _set(path: Path, table: str, column: str, value: str) -> None:
    """Writes a value into the last row of a table, as somebody with the database's shell could."""
    with sqlite3.connect(path) as connection:
        triggers = connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'").fetchall()
        for name, _ in triggers:
            connection.execute(f"DROP TRIGGER {name}")
        last = f"rowid = (SELECT max(rowid) FROM {table})"
        assert connection.execute(f"UPDATE {table} SET {column} = {value} WHERE {last}").rowcount == 1
        for _, sql in triggers:
            connection.execute(sql)
    connection.close()


@pytest.mark.parametrize(("table", "column", "value", "facts"), BAD_LABELS + BAD_LABELS_IN_SQLITE)
def test_a_bad_row_of_questions_or_labels_is_named(
    table: str, column: str, value: str, facts: tuple[str, ...], good: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "x.db"
    path.write_bytes(good)
    _set(path, table, column, value)
    for use in (
        lambda: store_command.main(["show", str(path)]),
        lambda: store_command.main(["export", str(path), str(tmp_path / "labels.jsonl")]),
        lambda: Store(path),
    ):
        with pytest.raises(StoreDamaged) as error:
            use()
        assert_names(error.value, f"table {table}", *facts)
    assert not (tmp_path / "labels.jsonl").exists()


def test_a_bad_row_of_questions_or_labels_is_named_in_postgresql(postgres: Server) -> None:
    address = postgres.store()

    def change(statements: str) -> None:
        """Changes rows, also those that triggers and foreign keys protect."""
        postgres.execute(f"SET session_replication_role = replica; {statements}", database=name_of(address))

    with Store(address) as store:
        fill(store)
        for table, column, value, facts in BAD_LABELS:
            if value == "'2026-13-01 00:00:00'":  # which PostgreSQL itself refuses
                continue
            key = "comparison_id = 5" if table == "leases" else "id = 6"
            before = store.labels()
            change(
                f"CREATE TABLE copy AS SELECT * FROM {table} WHERE {key};"
                f"UPDATE {table} SET {column} = {value} WHERE {key}"
            )
            with pytest.raises(StoreDamaged) as error:
                Store(address)
            assert_names(error.value, f"table {table}", *facts)
            change(f"DELETE FROM {table} WHERE {key}; INSERT INTO {table} SELECT * FROM copy; DROP TABLE copy")
            assert store.labels() == before


BAD_OTHERS: list[tuple[str, str, str, Callable[[Store], object]]] = [
    ("versions", "figures", "'[]'", lambda store: store.versions("reward")),
    ("versions", "last_event", "'x'", lambda store: store.versions("reward")),
    ("metrics", "row", "'[1]'", lambda store: store.metrics()),
    ("samples", "answer", "'5'", lambda store: store.samples()),
    ("alarms", "action", "'shout'", lambda store: store.alarms()),
    ("alarms", "created", "'once'", lambda store: store.alarms()),
    ("state", "value", "'{'", lambda store: store.get("status")),
    ("users", "role", "'boss'", lambda store: store.user("anna")),
]


@pytest.mark.parametrize(("table", "column", "value", "read"), BAD_OTHERS)
def test_another_bad_row_is_named_when_it_is_read_and_labelling_goes_on(
    table: str, column: str, value: str, read: Callable[[Store], object], good: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "x.db"
    path.write_bytes(good)
    with Store(path) as store:
        store.add_user("anna", "admin", "hash")
    _set(path, table, column, value)
    with Store(path) as store:
        with pytest.raises(StoreDamaged) as error:
            read(store)
        assert_names(error.value, f"table {table}", f"column {column}")
        assert_names(error.value.shown, f"table {table}", f"column {column}")
        assert str(tmp_path) not in error.value.shown
        (question,) = store.ask("bert")
        store.add_label(question.id, "bert", token="bert", choice="a")


def test_the_largest_row_number_is_not_called_a_full_disk(good: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    path.write_bytes(good)
    _set(path, "metrics", "id", str(2**63 - 1))
    with Store(path) as store, pytest.raises(StoreDamaged) as error:
        store.add_metrics([{"step": 9}])
    assert_names(error.value, "table metrics", f"row {2**63 - 1}", "column id")


def test_parts_of_a_label_that_do_not_fit_are_named(good: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    for column, value in (("choice", "NULL"), ("ranks", "'[1, 2]'"), ("shown_order", "'[0, 0]'"), ("seconds", "-1")):
        path.write_bytes(good)
        with Store(path) as store:
            store.add_label(store.ask("bert")[0].id, "bert", token="bert", choice="a")
        _set(path, "events", column, value)
        with pytest.raises(StoreDamaged) as error:
            store_command.main(["export", str(path), str(tmp_path / "labels.jsonl")])
        assert_names(error.value, "table events", "row 7")


def test_a_table_that_is_dropped_while_the_store_is_open_is_named(store: Store) -> None:
    with store._database.engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE metrics")
    with pytest.raises(StoreDamaged, match="table metrics is missing"):
        store.add_metrics([{"step": 1}])
    assert store.waiting() == 0
    with store._database.engine.begin() as connection:  # PostgreSQL's test store is used again
        connection.exec_driver_sql('CREATE TABLE metrics (id SERIAL8 PRIMARY KEY, "row" TEXT NOT NULL)')


# ---- disks and locks


@contextmanager
def _full_disk(path: Path) -> Iterator[None]:
    """Files can grow no more."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (Path(f"{path}-wal").stat().st_size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_label_that_does_not_fit_on_the_disk_is_refused_and_can_be_sent_again(tmp_path: Path) -> None:
    with Store(tmp_path / "x.db") as store:
        store.add([Comparison(prompt="p", responses=("x", "y")) for _ in range(3)])
        (question,) = store.ask("anna")
        with _full_disk(tmp_path / "x.db"), pytest.raises(StoreUnavailable) as error:
            store.add_label(question.id, "anna", token="t", choice="a")
        assert_names(error.value, "cannot be read or written", "disk I/O error")
        assert store.labels() == []
        store.add_label(question.id, "anna", token="t", choice="a")
    with Store(tmp_path / "x.db") as store:
        assert [label.choice for label in store.labels()] == ["a"]


def test_a_full_database_is_called_full(tmp_path: Path) -> None:
    with Store(tmp_path / "x.db") as store:
        with store._database.engine.connect() as connection:
            pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
        store._database.engine.dispose()

        def limit(connection: sqlite3.Connection, record: object) -> None:
            connection.execute(f"PRAGMA max_page_count = {pages}")

        from sqlalchemy import event

        event.listen(store._database.engine, "connect", limit)
        with pytest.raises(StoreUnavailable) as error:
            store.add([Comparison(prompt="p" * 100_000, responses=("x", "y"))])
        assert_names(error.value, "disk is full", "not saved")
        assert_names(error.value.shown, "disk is full")
        assert store.waiting() == 0


def test_a_store_that_another_process_has_locked_is_waited_for_and_then_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.db"
    monkeypatch.setattr(engine, "BUSY_SECONDS", 0.2)
    with Store(path) as store:
        (number,) = store.add([pair()])
        store.ask("anna")
        other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreUnavailable, match="locked by another process"):
            store.add_label(number, "anna", token="t", choice="a")
        assert store.labels() == []  # readers do not wait
        monkeypatch.setattr(engine, "BUSY_SECONDS", 60.0)
    with Store(path) as store:
        end = threading.Timer(0.1, other.rollback)
        end.start()
        store.add_label(number, "anna", token="t", choice="a")
        end.join()
        other.close()
        assert len(store.labels()) == 1


def test_a_file_that_is_moved_away_takes_no_more_labels(tmp_path: Path) -> None:
    """SQLite would write them to the file that nobody finds any more."""
    path = tmp_path / "x.db"
    with Store(path) as store:
        (number,) = store.add([pair()])
        store.ask("anna")
        path.rename(tmp_path / "y.db")
        for replaced in (False, True):
            if replaced:
                Store(tmp_path / "z.db").close()
                (tmp_path / "z.db").rename(path)
            with pytest.raises(StoreUnavailable, match="moved"):
                store.add_label(number, "anna", token="t", choice="a")
        os.replace(tmp_path / "y.db", path)
        store.add_label(number, "anna", token="t", choice="a")
        assert len(store.labels()) == 1
