"""A store that is damaged while its page is served: every page, fragment and form says so, and what is whole works."""

import random
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from facts import assert_names
from page_client import Client

from deep_rlhf.errors import StoreDamaged
from deep_rlhf.feedback.records import Alarm, Version
from deep_rlhf.feedback.store import Store
from deep_rlhf.feedback.store.schema import METADATA
from deep_rlhf.web.progress.events import Hub

PAGES = ("/", "/questions", "/progress", "/model", "/model/labels")
FRAGMENTS = tuple(f"/model/{name}" for name in ("status", "figures", "history", "versions"))
VALUES = (
    "'nonsense'",
    "'{\"a\":'",
    "'[1, \"x\"]'",
    "'[0, 7]'",
    "'{}'",
    "'null'",
    "'1e999'",
    "x'ff00'",
    "CAST(x'ff61' AS TEXT)",
    "-1",
    "1e300",
    "9223372036854775807",
    "'infinity'",
    "'2026-13-45 00:00:00'",
    f"'{'[' * 3000}'",
    f"'{'9' * 5000}'",
    f'\'{{"step": 7, "reward": -1.7e308, "sqrt_kl": 1.7e308, "rate": 1{"0" * 400}}}\'',
    '\'{"state": "training", "at": "0001-01-01T00:00:00+14:00"}\'',
    '\'[{"name": "anna"}, 5, {"name": "b", "answers": 1, "error_rate": 0.5, "error_rate_interval": [0]}]\'',
)


@pytest.fixture
def used(store: Store, add: Callable[..., list[int]], client: Client) -> Client:
    """A page on a store with rows in every table, and somebody who has a question."""
    add(6)
    store.add_label(store.ask("me")[0].id, "me", token="t", choice="a")
    store.add_version(Version(kind="policy", number=0, step=0, labels=0, last_event=0))
    store.add_version(Version(kind="reward", number=1, step=2, labels=1, last_event=1, figures={"accuracy": 0.5}))
    store.add_metrics([{"step": i, "reward": 0.5, "sqrt_kl": 1.0} for i in range(3)])
    store.add_samples(0, [("prompt", "response")])
    store.add_alarm(Alarm(name="kl", step=1, action="warn", message="m", figure=2.0, limit=1.0))
    for name in ("status", "win_rate", "choosing", "outlook", "alpha", "heartbeat", "stop", "store: annotators"):
        store.put(name, {})
    client.enter()
    client.submit("/skip", question=2, token="skip")
    return client


def _set(path: Path, table: str, column: str, value: str) -> bool:
    """Writes a value into all rows of a table; False if SQLite refuses that."""
    connection = sqlite3.connect(path)
    try:
        triggers = connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'").fetchall()
        for name, _ in triggers:
            connection.execute(f"DROP TRIGGER {name}")
        connection.execute(f'UPDATE OR REPLACE {table} SET "{column}" = {value}')
        for _, sql in triggers:
            connection.execute(sql)
        connection.commit()
    except sqlite3.IntegrityError:
        return False
    finally:
        connection.close()
    return True


def _check(client: Client, store: Store) -> None:
    answers = [client.get(path) for path in PAGES + FRAGMENTS]
    for path, fields in (("/answer", {"choice": "a"}), ("/skip", {}), ("/undo", {}), ("/stop", {"sure": "1"})):
        answers.append(client.submit(path, question="3", token=f"again {path}", **fields))
    for answer in answers:
        assert answer.status_code in (200, 303, 401, 403, 409, 422, 503), answer.text
        if answer.status_code == 503:
            assert_names(answer.text.replace("&#39;", "'"), "is damaged")
            assert "labels.db" not in answer.text
    try:
        Hub(store)._read_state()
    except StoreDamaged as error:
        assert_names(error, "is damaged")


@pytest.mark.parametrize("cases", [15, pytest.param(200, marks=pytest.mark.slow)])
def test_every_page_survives_bad_rows(cases: int, used: Client, store: Store, tmp_path: Path) -> None:
    path = tmp_path / "labels.db"
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    good = path.read_bytes()
    rng = random.Random(14)
    columns = [(table.name, column.name) for table in METADATA.tables.values() for column in table.columns]
    for _ in range(cases):
        if _set(path, *rng.choice(columns), rng.choice(VALUES)):
            _check(used, store)
        store._database.engine.dispose()
        for log in tmp_path.glob("labels.db-*"):
            log.unlink()
        path.write_bytes(good)


def test_a_bad_row_of_the_model_tab_leaves_labelling_alone(used: Client, store: Store, tmp_path: Path) -> None:
    _set(tmp_path / "labels.db", "alarms", "action", "'shout'")
    answer = used.get("/model/status")
    assert answer.status_code == 503
    assert_names(answer.text, "The store is damaged", "table alarms, row 1", "column action", "roll_back")
    assert used.get("/model/figures").status_code == 200
    assert used.submit("/answer", question=3, token="x", choice="a").status_code in (200, 409)
    assert used.get("/").status_code == 200


def test_a_file_that_is_gone_is_said_on_the_page(used: Client, tmp_path: Path) -> None:
    (tmp_path / "labels.db").rename(tmp_path / "elsewhere.db")
    answer = used.submit("/answer", question=3, token="x", choice="a")
    assert answer.status_code == 503
    assert_names(answer.json()["error"], "The store is gone", "moved")
