"""kill -9 of whoever writes, and of the database: what was acknowledged is there, and nothing is there twice."""

import multiprocessing
import random
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import killed_people
import processes
import pytest
from postgres import Server, server
from sqlalchemy import text

from deep_rlhf.errors import StoreUnavailable
from deep_rlhf.feedback.records import Comparison
from deep_rlhf.feedback.store import Store
from deep_rlhf.feedback.store.schema import REVISION

SECONDS = 60.0  # after which something hangs

pytestmark = pytest.mark.processes


class Process:
    """A process that works on a store and tells what it does."""

    def __init__(self, work: killed_people.Work, address: str, person: str) -> None:
        self.person = person
        self.told, end = multiprocessing.Pipe(duplex=False)
        self._process = processes.fork_server().Process(target=work, args=(address, person, end), daemon=True)
        self._process.start()
        end.close()

    def next(self) -> tuple[str, int, int] | None:
        """What it tells next, None after its end."""
        assert self.told.poll(SECONDS), f"{self.person} tells nothing"
        with suppress(EOFError, ConnectionResetError):
            what: tuple[str, int, int] = self.told.recv()
            return what
        return None

    def kill(self) -> list[tuple[str, int, int]]:
        """kill -9; returns what it had told before."""
        self._process.kill()
        return self.join()

    def join(self) -> list[tuple[str, int, int]]:
        """Waits for its end; returns what it tells until then."""
        told = list(iter(self.next, None))
        self._process.join(SECONDS)
        return told


@pytest.fixture(params=["sqlite", "postgresql"])
def fresh(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where no store is yet."""
    if request.param == "sqlite":
        return str(tmp_path / "labels.db")
    return str(request.getfixturevalue("postgres").database())


def test_an_acknowledged_label_survives_the_death_of_whoever_sent_it(fresh: str) -> None:
    rng = random.Random(5)
    with Store(fresh) as store:
        ids = store.add([Comparison(prompt=str(i), responses=("x", "y")) for i in range(50)])
    acknowledged: list[tuple[int, int]] = []

    def hear(told: list[tuple[str, int, int]]) -> None:
        acknowledged.extend((number, event) for what, number, event in told if what == "acknowledged")

    people = {name: Process(killed_people.label, fresh, name) for name in ("anna", "bert", "carl")}
    for _ in range(5):  # lives that end too early: in the middle of a label, or just after it
        name = rng.choice(sorted(people))
        for _ in range(rng.randrange(1, 10)):
            hear([told] if (told := people[name].next()) else [])
        hear(people[name].kill())
        people[name] = Process(killed_people.label, fresh, name)
    for process in people.values():
        told = process.join()
        assert told[-1][0] == "finished"
        hear(told)

    with Store(fresh) as store:
        labels = {label.event_id: label.comparison_id for label in store.labels()}
        assert store.waiting() == 0
        with store._database.engine.connect() as connection:
            assert connection.execute(text("SELECT count(*) FROM events")).scalar() == len(ids)
    assert sorted(labels.values()) == ids
    assert len(acknowledged) > 35
    assert {event: number for number, event in acknowledged}.items() <= labels.items()


def test_processes_that_open_a_new_store_at_once_make_it_once(fresh: str) -> None:
    processes = [Process(killed_people.open_new, fresh, f"p{i}") for i in range(3)]
    assert [process.join()[-1][0] for process in processes] == ["finished"] * 3
    with Store(fresh, must_exist=True) as store:
        assert store.waiting() == 3


def test_a_migration_that_is_killed_is_done_by_the_next(fresh: str) -> None:
    """Half-made tables are never seen: they are made in one transaction."""
    for i in range(2):
        process = Process(killed_people.open_new, fresh, f"p{i}")
        assert process.next() == ("begins", 0, 0)
        process.kill()
    with Store(fresh) as store, store._database.engine.connect() as connection:
        assert connection.execute(text("SELECT version_num FROM alembic_version")).scalars().all() == [REVISION]


@pytest.fixture
def own_server() -> Iterator[Server]:
    """A server that this test may kill, with the settings that people have."""
    with server(settings=("max_connections=50",)) as running:
        yield running


def test_an_acknowledged_label_survives_the_death_of_postgresql(own_server: Server) -> None:
    """People send again, with the same token, what was not acknowledged."""
    rng = random.Random(6)
    acknowledged: list[tuple[int, int]] = []
    failures: list[BaseException] = []
    refused = 0
    is_up, progress = threading.Event(), threading.Condition()

    def keep_trying(work: Any) -> Any:
        nonlocal refused
        while True:
            assert is_up.wait(SECONDS)
            try:
                return work()
            except StoreUnavailable:
                refused += 1

    def label(store: Store, person: str) -> None:
        try:
            while questions := keep_trying(lambda: store.ask(person)):
                number = questions[0].id
                event = keep_trying(
                    lambda number=number: store.add_label(number, person, token=f"{person} {number}", choice="a")
                )
                with progress:
                    acknowledged.append((number, event))
                    progress.notify()
        except BaseException as error:
            failures.append(error)

    with Store(own_server.database()) as store:
        ids = store.add([Comparison(prompt=str(i), responses=("x", "y")) for i in range(120)])
        is_up.set()
        people = [threading.Thread(target=label, args=(store, f"p{i}")) for i in range(4)]
        for person in people:
            person.start()
        for kill in range(3):
            with progress:
                wanted = 30 * kill + rng.randrange(1, 25)
                assert progress.wait_for(lambda wanted=wanted: len(acknowledged) >= wanted, SECONDS)
            is_up.clear()
            own_server.kill()
            own_server.start()
            is_up.set()
        for person in people:
            person.join(SECONDS)
        labels = {label.event_id: label.comparison_id for label in store.labels()}
    assert failures == []
    assert refused > 0
    assert sorted(labels.values()) == ids
    assert {event: number for number, event in acknowledged} == labels
