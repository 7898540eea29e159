"""Many threads and processes on one store."""

import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from postgres import Server
from sqlalchemy import event, text
from sqlalchemy.exc import OperationalError
from store_parts import Clock, asked, pair, pairs

from deep_rlhf.errors import StoreError, StoreUnavailable
from deep_rlhf.feedback.store import Store, question_queue
from deep_rlhf.feedback.store.question_queue import LabelInput


def test_what_another_process_wrote_is_seen_at_once(open_store: Callable[..., Store]) -> None:
    one, two = open_store(), open_store()
    (number,) = one.add([pair()])
    assert asked(two, "anna") == [number]
    two.add_label(number, "anna", token="1", choice="a")
    assert len(one.labels()) == 1
    two.put("stop", True)
    assert one.get("stop") is True


def test_many_people_at_once_get_each_question_once(open_store: Callable[..., Store]) -> None:
    """Two stores as two processes would have, five people on each; the trainer follows what comes."""
    stores = [open_store(), open_store()]
    ids = stores[0].add(pairs(60))
    given: dict[str, list[int]] = {f"p{i}": [] for i in range(10)}
    failures: list[BaseException] = []
    finished = threading.Event()
    followed: list[int] = []

    def label(person: str, store: Store) -> None:
        try:
            while questions := store.ask(person, count=2):
                number = questions[0].id
                events = {store.add_label(number, person, token=f"{person} {number}", choice="a") for _ in range(2)}
                assert len(events) == 1
                given[person].append(number)
        except BaseException as error:
            failures.append(error)

    def follow(store: Store) -> None:
        seen, over = 0, False
        while not over:
            over = finished.is_set()
            until = store.last_event()
            followed.extend(label.event_id for label in store.labels(after=seen, until=until))
            seen = until

    people = [threading.Thread(target=label, args=(person, stores[i % 2])) for i, person in enumerate(given)]
    trainer = threading.Thread(target=follow, args=(stores[0],))
    for thread in [*people, trainer]:
        thread.start()
    for thread in people:
        thread.join()
    finished.set()
    trainer.join()
    assert failures == []
    assert sorted(number for numbers in given.values() for number in numbers) == ids
    labels = stores[1].labels()
    assert sorted(label.comparison_id for label in labels) == ids
    assert followed == [label.event_id for label in labels]
    assert stores[0].waiting() == 0


def test_a_reader_waits_for_a_smaller_id_that_is_on_its_way(postgres: Server, clock: Clock) -> None:
    """PostgreSQL gives out ids before the commit: the second may be there before the first."""
    waits = text("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted")
    read: list[list[int]] = []
    with Store(postgres.store(), clock=clock) as store:
        first, second = store.add(pairs(2))
        asked(store, "anna")
        asked(store, "bert")
        reader = threading.Thread(target=lambda: read.append([label.comparison_id for label in store.labels()]))
        with store._database._writing.begin() as connection:
            question_queue.add_label(connection, first, "anna", "1", LabelInput(choice="a"), store._terms())
            store.add_label(second, "bert", token="2", choice="b")
            reader.start()
            with store._database.engine.connect() as other:
                while reader.is_alive() and not other.scalar(waits):
                    other.rollback()
            assert read == []
        reader.join()
    assert read == [[first, second]]


def test_one_label_sent_by_several_threads_is_one_event(store: Store) -> None:
    (number,) = store.add([pair()])
    asked(store, "anna")
    barrier = threading.Barrier(6)
    events: list[int] = []
    undone: list[int | None] = []

    def send() -> None:
        barrier.wait()
        events.append(store.add_label(number, "anna", token="1", choice="a"))
        barrier.wait()
        undone.append(store.undo("anna", token="u"))

    threads = [threading.Thread(target=send) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(events) == 6
    assert len(set(events)) == 1
    assert undone == [number] * 6
    assert store.last_event() == events[0] + 1


def test_a_writer_that_fails_does_not_affect_the_others(tmp_path: Path) -> None:
    """In SQLite those who wait share a transaction."""
    with Store(tmp_path / "labels.db") as store:
        ids = store.add(pairs(12))
        asked(store, "anna", 12)
        writer = store._database._group_commit
        assert writer is not None
        refusals: list[int] = []

        def send(number: int) -> None:
            try:
                store.add_label(number, "anna", token=f"{number}", choice="a" if number % 2 else "left")  # type: ignore[arg-type]
            except StoreError:
                refusals.append(number)

        threads = [threading.Thread(target=send, args=(number,)) for number in ids]
        with writer._change:
            writer._is_writing = True  # all of them wait
        for thread in threads:
            thread.start()
        while len(writer._waiting) < 12 and any(thread.is_alive() for thread in threads):
            pass
        with writer._change:
            writer._is_writing = False
            writer._change.notify_all()
        for thread in threads:
            thread.join()
        assert sorted(refusals) == [number for number in ids if number % 2 == 0]
        assert sorted(label.comparison_id for label in store.labels()) == [number for number in ids if number % 2]


def test_nothing_is_acknowledged_if_the_commit_fails(store: Store) -> None:
    (number,) = store.add([pair()])
    asked(store, "anna")

    def fail(connection: Any) -> None:
        raise OperationalError("COMMIT", {}, sqlite3.OperationalError("disk I/O error"))

    event.listen(store._database.engine, "commit", fail)
    with pytest.raises(StoreUnavailable, match="disk I/O error"):
        store.add_label(number, "anna", token="1", choice="a")
    event.remove(store._database.engine, "commit", fail)
    assert store.last_event() == 0
    assert store.add_label(number, "anna", token="1", choice="b") == store.last_event()
