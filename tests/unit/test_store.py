"""The store, on SQLite and on a PostgreSQL server that the tests start: every method, and what must never happen."""

import shutil
import sqlite3
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from postgres import Server, name_of, postgres  # noqa: F401
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError, OperationalError

from deep_rlhf.feedback.records import Alarm, AnnotatorFigures, Comparison, Version
from deep_rlhf.feedback.store import Refused, Store, StoreError, Unavailable, asking
from deep_rlhf.feedback.store.asking import Given
from deep_rlhf.feedback.store.migrations import head
from deep_rlhf.feedback.store.statements import HELD_BY, NEXT_FREE, RAN_OUT
from deep_rlhf.feedback.store.tables import REVISION, Base
from deep_rlhf.types import UserError

START = datetime(2026, 1, 1, 12, tzinfo=UTC)


class Clock:
    """A time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> datetime:
        return self.now

    def passes(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(scope="module")
def blank_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with nothing in it, to be copied: to migrate one for each test would take longer than the test."""
    path = tmp_path_factory.mktemp("blank") / "labels.db"
    Store(path).close()
    return path


@pytest.fixture(params=["sqlite", "postgresql"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where this test's store is."""
    if request.param == "sqlite":
        return str(shutil.copy(request.getfixturevalue("blank_file"), tmp_path / "labels.db"))
    return str(request.getfixturevalue("postgres").store())


@pytest.fixture
def open_store(address: str, clock: Clock) -> Iterator[Callable[..., Store]]:
    """open_store(**options): the store of this test, once more each time."""
    opened: list[Store] = []

    def open_it(**options: Any) -> Store:
        opened.append(Store(address, **{"lease_seconds": 60, "seed": 1, "clock": clock, **options}))
        return opened[-1]

    yield open_it
    for store in opened:
        store.close()


@pytest.fixture
def store(open_store: Callable[..., Store]) -> Store:
    return open_store()


def pair(prompt: str = "Hi?", **options: Any) -> Comparison:
    return Comparison(prompt=prompt, answers=("yes", "no"), **options)


def pairs(count: int, **options: Any) -> list[Comparison]:
    return [pair(f"prompt {i}", **options) for i in range(count)]


def asked(store: Store, person: str, count: int = 1) -> list[int]:
    return [question.id for question in store.ask(person, count=count)]


def refused(status: str) -> Any:
    return pytest.raises(Refused, check=lambda error: error.status == status)


# ---- questions


def test_questions_come_by_priority_and_then_by_age(store: Store) -> None:
    ids = store.add([pair("a"), pair("b", priority=2.0), pair("c", priority=2.0), pair("d", priority=-1.0)])
    assert ids == sorted(ids)
    assert len(set(ids)) == 4
    assert store.waiting() == 4
    a, b, c, d = ids
    assert asked(store, "anna", 3) == [b, c, a]
    assert store.waiting() == 1
    assert asked(store, "bert", 3) == [d]
    assert asked(store, "carl") == []
    assert asked(store, "carl", 0) == []


def test_a_question_says_all_that_was_added(store: Store) -> None:
    original = store.add([pair()])[0]
    comparison = Comparison(
        prompt="Wörter \x00 \ud800 ✓",  # PostgreSQL has no place for the second and third in its own text
        answers=("one", "", "\udfff"),
        why_selected="repeat",
        policy_version=3,
        reward_version=2,
        writers=(0, 1, 3),
        predicted=0.25,
        priority=1.5,
        overlap=2,
        repeat_of=original,
    )
    assert asked(store, "anna") == [original]
    store.answer(original, "anna", token="t", choice="tie")
    number = store.add([comparison])[0]
    (question,) = store.ask("anna")
    assert (question.id, question.comparison) == (number, comparison)
    assert question.leased_until == START + timedelta(seconds=60)
    assert sorted(question.shown_order) == [0, 1, 2]


def test_a_question_that_cannot_be_is_not_taken(store: Store) -> None:
    with pytest.raises(StoreError, match="repeats number 77"):
        store.add([pair(), pair(repeat_of=77)])
    with pytest.raises(StoreError, match="finite priority"):
        store.add([pair(), pair(priority=float("nan"))])
    with pytest.raises(StoreError, match="at least one person"):
        store.add([pair(overlap=0)])
    assert store.waiting() == 0
    assert store.add([]) == []


def test_the_same_questions_are_asked_again_until_they_are_answered(store: Store) -> None:
    first, second, third = store.add(pairs(3))
    assert asked(store, "anna", 2) == [first, second]
    assert asked(store, "anna") == [first]
    store.answer(first, "anna", token="1", choice="a")
    assert asked(store, "anna", 2) == [second, third]


def test_overlap_puts_a_question_to_different_people(store: Store) -> None:
    (number,) = store.add([pair(overlap=2)])
    assert [asked(store, person) for person in ("anna", "bert", "carl", "anna")] == [[number], [number], [], [number]]
    store.answer(number, "anna", token="a", choice="a")
    store.answer(number, "bert", token="b", choice="b")
    assert [asked(store, person) for person in ("anna", "bert", "carl")] == [[], [], []]
    assert [(label.annotator, label.choice) for label in store.labels()] == [("anna", "a"), ("bert", "b")]


def test_a_repeat_goes_only_to_whom_answered_the_original(store: Store) -> None:
    (original,) = store.add([pair()])
    (repeat,) = store.add([pair(why_selected="repeat", repeat_of=original, priority=9.0)])
    assert asked(store, "anna", 2) == [original]
    store.answer(original, "anna", token="1", choice="a")
    assert asked(store, "bert") == []
    assert asked(store, "anna") == [repeat]


def test_sides_are_random_for_each_person_and_repeatable_with_a_seed(open_store: Callable[..., Store]) -> None:
    store = open_store(seed=3)
    ids = store.add(pairs(40, overlap=3))
    orders = {
        (person, question.id): question.shown_order
        for person in ("anna", "bert")
        for question in store.ask(person, count=40)
    }
    left = {person: [orders[person, number][0] for number in ids] for person in ("anna", "bert")}
    assert 8 < sum(left["anna"]) < 32
    assert left["anna"] != left["bert"]
    other = open_store(seed=3)
    other.release("anna")
    assert {q.id: q.shown_order for q in other.ask("anna", count=40)} == {i: orders["anna", i] for i in ids}


def test_questions_of_older_policies_are_withdrawn_if_nobody_has_begun(store: Store, clock: Clock) -> None:
    held, answered, free, ran_out = store.add(pairs(4, policy_version=1, why_selected="variance", overlap=2))
    (newer,) = store.add([pair(policy_version=2)])
    (gold,) = store.add([pair(policy_version=0, why_selected="gold", expected="a")])
    assert asked(store, "carl", 4)[3] == ran_out
    for number in (held, answered, free):
        store.skip(number, "carl", token=f"skip {number}")
    clock.passes(61)
    asked(store, "anna", 2)
    store.answer(answered, "anna", token="1", choice="a")
    assert store.withdraw(older_than_policy=2) == 2
    assert store.waiting() == 4  # held and answered have one place left each
    assert store.withdraw(older_than_policy=2) == 0
    assert asked(store, "bert", 9) == [held, answered, newer, gold]
    store.answer(ran_out, "carl", token="2", choice="b")  # a page that was still open: the answer is as good as any
    assert [label.comparison_id for label in store.labels()] == [answered, ran_out]


def test_blind_pairs_about_older_policies_are_withdrawn_too_but_nothing_that_measures_people(store: Store) -> None:
    (original,) = store.add([pair(policy_version=3)])
    store.add([pair(policy_version=1, why_selected=reason) for reason in ("win_rate", "initial")])
    (gold,) = store.add([pair(why_selected="gold", expected="a")])
    store.add([pair(why_selected="repeat", repeat_of=original)])
    assert store.withdraw(older_than_policy=3) == 2
    assert asked(store, "anna", 9) == [original, gold]


def test_unseen_is_what_anybody_could_be_asked(store: Store, clock: Clock) -> None:
    ids = store.add([*pairs(4), pair(overlap=2)])
    store.add([pair(why_selected="repeat", repeat_of=ids[0])])
    assert (store.waiting(), store.unseen()) == (6, 5)
    asked(store, "anna", 5)
    store.skip(ids[0], "anna", token="skip")
    store.answer(ids[4], "anna", token="first of two", choice="a")
    assert (store.waiting(), store.unseen()) == (3, 0)  # the skipped, the second of two, the repeat
    clock.passes(301)
    assert store.unseen() == 3  # whose leases ran out


# ---- answers


def test_an_answer_is_recorded_as_it_was_given(store: Store, clock: Clock) -> None:
    store.add([pair(policy_version=4, reward_version=2, why_selected="information")])
    (question,) = store.ask("anna")
    clock.passes(5)
    event = store.answer(question.id, "anna", token="1", choice="b", strength=3, seconds=4.5)
    (label,) = store.labels()
    assert label.event_id == event == store.last_event()
    assert (label.comparison_id, label.comparison) == (question.id, question.comparison)
    assert (label.annotator, label.choice, label.ranks, label.strength) == ("anna", "b", None, 3)
    assert (label.shown_order, label.seconds, label.created) == (question.shown_order, 4.5, clock.now)
    with store._database.engine.connect() as connection:
        kept = connection.execute(text("SELECT why_selected, policy_version, reward_version FROM events")).one()
    assert tuple(kept) == ("information", 4, 2)


def test_the_same_token_again_is_the_same_answer(store: Store) -> None:
    first, second = store.add(pairs(2))
    asked(store, "anna", 2)
    event = store.answer(first, "anna", token="1", choice="a")
    assert store.answer(first, "anna", token="1", choice="a") == event
    assert store.undo("anna", token="u") == first
    assert store.answer(first, "anna", token="1", choice="a") == event  # late news of what was taken back since
    assert store.labels() == []
    with pytest.raises(StoreError, match="used for something else"):
        store.answer(second, "anna", token="1", choice="a")
    asked(store, "bert")
    with pytest.raises(StoreError, match="used for something else"):
        store.skip(second, "anna", token="1")
    assert store.last_event() == event + 1


def test_who_may_not_answer_is_refused(store: Store) -> None:
    first, second = store.add(pairs(2))
    asked(store, "anna")
    with refused("unknown"):
        store.answer(99, "anna", token="1", choice="a")
    with refused("unknown"):
        store.answer(first, "bert", token="1", choice="a")
    with refused("unknown"):
        store.skip(second, "anna", token="1")
    store.answer(first, "anna", token="1", choice="a")
    with refused("gone"):
        store.answer(first, "anna", token="2", choice="b")
    with refused("gone"):
        store.skip(first, "anna", token="3")
    assert [(label.annotator, label.choice) for label in store.labels()] == [("anna", "a")]


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"choice": "left"},
        {"ranks": [1, 2]},
        {"choice": "a", "ranks": [1, 2]},
        {"choice": "a", "strength": 5},
        {"choice": "a", "seconds": -1.0},
        {"choice": "a", "seconds": float("nan")},
        {"choice": "a", "token": ""},
        {"choice": "a", "token": "\x00"},
        {"choice": "a", "token": "x" * 201},
    ],
)
def test_an_answer_that_is_none_changes_nothing(tmp_path: Path, given: dict[str, Any]) -> None:
    with Store(tmp_path / "labels.db") as store:
        (number,) = store.add([pair()])
        asked(store, "anna")
        with pytest.raises(StoreError):
            store.answer(number, "anna", **{"token": "1", **given})
        assert store.last_event() == 0
        store.answer(number, "anna", token="1", choice="tie")


def test_a_ranking_has_a_rank_for_each_answer(store: Store) -> None:
    (number,) = store.add([Comparison(prompt="?", answers=("a", "b", "c"))])
    asked(store, "anna")
    for wrong in ({"choice": "a"}, {"ranks": [1, 2]}, {"ranks": [0, 1, 2]}, {"ranks": [2, 2, 3]}, {"ranks": [1, 2, 4]}):
        with pytest.raises(StoreError):
            store.answer(number, "anna", token="1", **wrong)  # type: ignore[arg-type]
    store.answer(number, "anna", token="1", ranks=[2, 1, 2])
    assert store.labels()[0].ranks == (2, 1, 2)
    store.undo("anna", token="u")
    store.answer(number, "anna", token="2", choice="cant_tell")
    assert store.labels()[0].choice == "cant_tell"


def test_a_name_must_be_one(store: Store) -> None:
    store.add([pair()])
    for name in ("", "a\x00b", "a\nb", "x" * 201):
        with pytest.raises(StoreError, match="printable"):
            store.ask(name)
    assert asked(store, "Änne Müller")


# ---- leases


def test_a_lease_that_ran_out_goes_to_somebody_else(store: Store, clock: Clock) -> None:
    (number,) = store.add([pair()])
    asked(store, "anna")
    clock.passes(59)
    assert (asked(store, "bert"), store.waiting()) == ([], 0)
    clock.passes(2)
    assert store.waiting() == 1
    assert asked(store, "bert") == [number]
    with refused("taken"):
        store.answer(number, "anna", token="1", choice="a")
    store.answer(number, "bert", token="2", choice="b")
    with refused("taken"):
        store.answer(number, "anna", token="1", choice="a")
    assert [label.annotator for label in store.labels()] == ["bert"]


def test_a_late_answer_counts_if_nobody_took_the_question(store: Store, clock: Clock) -> None:
    first, second = store.add(pairs(2))
    (question,) = store.ask("anna")
    clock.passes(61)
    store.answer(first, "anna", token="1", choice="a")  # nobody has looked for expired leases yet
    assert asked(store, "anna") == [second]
    clock.passes(61)
    assert asked(store, "bert") == [second]
    store.release("bert")
    store.answer(second, "anna", token="2", choice="b")  # bert has given it back
    assert asked(store, "bert") == []
    assert store.labels()[0].shown_order == question.shown_order


def test_who_asks_keeps_what_he_holds(store: Store, clock: Clock) -> None:
    (number,) = store.add([pair()])
    asked(store, "anna")
    clock.passes(40)
    assert store.ask("anna")[0].leased_until == clock.now + timedelta(seconds=60)
    clock.passes(50)
    assert asked(store, "bert") == []
    clock.passes(30)  # over, but nobody else has asked: it is still his
    assert asked(store, "anna") == [number]
    assert asked(store, "bert") == []


def test_a_lease_given_back_is_free_and_keeps_its_sides(store: Store) -> None:
    ids = store.add(pairs(8))
    before = {question.id: question.shown_order for question in store.ask("anna", count=8)}
    store.release("anna")
    store.release("anna")
    assert store.waiting() == 8
    assert asked(store, "bert", 4) == ids[:4]
    store.release("bert")
    assert {question.id: question.shown_order for question in store.ask("anna", count=8)} == before


def test_a_skipped_question_goes_to_others_only(store: Store) -> None:
    first, second = store.add(pairs(2))
    asked(store, "anna")
    event = store.skip(first, "anna", token="1")
    assert store.skip(first, "anna", token="1") == event
    assert asked(store, "anna", 2) == [second]
    assert asked(store, "bert", 2) == [first]
    assert store.labels() == []
    store.release("bert")
    store.answer(first, "anna", token="2", choice="a")  # he thought better of it, and nobody else has it
    assert asked(store, "bert") == []


# ---- undo


def test_undo_takes_back_a_skip_while_nobody_else_has_the_question(store: Store) -> None:
    first, second = store.add(pairs(2))
    asked(store, "anna", 2)
    store.answer(first, "anna", token="1", choice="a")
    store.skip(second, "anna", token="2")
    assert store.undo("anna", token="u1") == second
    assert asked(store, "bert") == []  # it is his again
    assert asked(store, "anna", 2) == [second]
    store.skip(second, "anna", token="3")
    assert asked(store, "bert") == [second]
    with pytest.raises(Refused, match="it stays skipped"):
        store.undo("anna", token="u2")
    store.release("bert")
    assert [store.undo("anna", token=token) for token in ("u3", "u4", "u5")] == [second, first, None]
    assert store.labels() == []


def test_undo_takes_back_the_newest_answer_by_a_new_event(store: Store) -> None:
    ids = store.add(pairs(4))
    asked(store, "anna", 3)
    asked(store, "bert")
    for number in ids[:2]:
        store.answer(number, "anna", token=f"{number}", choice="a")
    store.answer(ids[3], "bert", token="bert", choice="b")
    last = store.last_event()
    assert store.undo("anna", token="u1") == ids[1]
    assert store.undo("anna", token="u1") == ids[1]  # the same undo sent twice
    assert store.undo("anna", token="u2") == ids[0]
    assert store.undo("anna", token="u3") is None
    assert [label.annotator for label in store.labels()] == ["bert"]
    assert asked(store, "anna", 3) == ids[:3]  # the two are his again, before the one that waits on his page
    again = store.answer(ids[0], "anna", token="again", choice="b")
    assert [label.event_id for label in store.labels(after=last)] == [again]
    assert store.answered("anna") == 1


def test_an_undone_question_is_not_put_to_others(store: Store, clock: Clock) -> None:
    (number,) = store.add([pair()])
    asked(store, "anna")
    store.answer(number, "anna", token="1", choice="a")
    store.undo("anna", token="u")
    assert (asked(store, "bert"), store.waiting()) == ([], 0)
    clock.passes(61)
    assert asked(store, "bert") == [number]


# ---- what the trainer reads


def test_labels_come_in_order_and_from_an_event_on(store: Store) -> None:
    ids = store.add(pairs(3))
    asked(store, "anna", 3)
    events = [store.answer(number, "anna", token=f"{number}", choice="a") for number in reversed(ids)]
    assert events == sorted(events)
    assert [label.comparison_id for label in store.labels()] == ids[::-1]
    assert [label.event_id for label in store.labels(after=events[0])] == events[1:]
    assert [label.event_id for label in store.labels(after=events[0], until=events[1])] == [events[1]]


def test_only_labels_for_training_are_counted(store: Store) -> None:
    (first,) = store.add([pair(why_selected="initial")])
    store.add(
        [
            pair(why_selected="random"),
            pair(why_selected="variance"),
            pair(why_selected="information"),
            Comparison(prompt="?", answers=("a", "b", "c")),
            pair(why_selected="gold", expected="a"),
            pair(why_selected="win_rate", writers=(0, 3)),
            pair(why_selected="repeat", repeat_of=first),
        ]
    )
    for number, question in enumerate(store.ask("anna", count=7)):
        ranks = [1, 2, 3] if len(question.comparison.answers) == 3 else None
        choice = None if ranks else "cant_tell" if question.comparison.why_selected == "variance" else "a"
        store.answer(question.id, "anna", token=f"{number}", choice=choice, ranks=ranks)
    (repeat,) = asked(store, "anna")
    store.answer(repeat, "anna", token="r", choice="a")
    assert store.label_count() == 4
    assert (len(store.labels()), store.answered("anna"), store.answered("bert")) == (8, 8, 0)


def test_pace_is_the_median_of_what_counts(store: Store) -> None:
    assert store.pace("anna") is None
    ids = store.add(pairs(4))
    asked(store, "anna", 4)
    for number, seconds in zip(ids, (2.0, 3.0, 10.0, 500.0), strict=True):
        store.answer(number, "anna", token=f"{number}", choice="a", seconds=seconds)
    assert store.pace("anna") == 6.5
    store.undo("anna", token="u")
    assert store.pace("anna") == 3.0


def test_versions_samples_metrics_alarms_and_state(store: Store, clock: Clock) -> None:
    version = Version(kind="policy", number=1, step=10, labels=50, last_event=7, figures={"kl": 1.5})
    store.add_version(version)
    store.add_version(Version(kind="policy", number=0, step=0, labels=0, last_event=0, created=START))
    store.add_version(Version(kind="reward", number=0, step=0, labels=0, last_event=0))
    assert [v.number for v in store.versions("policy")] == [0, 1]
    assert store.versions("policy")[1].figures == {"kl": 1.5}
    assert store.versions("policy")[1].created == START
    store.add_version(Version(kind="policy", number=1, step=11, labels=60, last_event=9))  # after a crash: once more
    assert [(v.number, v.step) for v in store.versions("policy")] == [(0, 0), (1, 11)]

    store.add_metrics([{"step": 1, "kl": 0.5}, {"step": 2, "kl": float("nan"), "note": "ä"}])
    store.add_metrics([])
    first, second = store.metrics()
    assert (first["step"], second["kl"], second["note"]) == (1, None, "ä")
    assert store.metrics(after=first["id"]) == [second]

    store.add_samples(0, [("p", "old"), ("q", "x")])
    store.add_samples(0, [("p", "a\x00"), ("q", "b")])
    store.add_samples(2, [("p", "c")])
    assert store.samples() == {0: [("p", "a\x00"), ("q", "b")], 2: [("p", "c")]}

    alarm = Alarm(name="kl", step=3, action="stop", message="KL is 30.", figure=30.0, limit=20.0, created=START)
    store.add_alarm(alarm)
    store.add_alarm(Alarm(name="kl", step=4, action="warn", message="?", figure=float("nan"), limit=1.0))
    assert store.alarms()[0] == alarm
    assert store.alarms()[1].figure != store.alarms()[1].figure

    figures = AnnotatorFigures(name="anna", answers=3, error_rate=0.1, error_rate_interval=(0.0, 0.3), agreement=0.7)
    store.set_annotators([AnnotatorFigures(name="x", answers=1, error_rate=0.5, error_rate_interval=(0.0, 1.0))])
    store.set_annotators([figures])
    assert store.annotators() == [figures]

    assert (store.get("stop"), store.get("alpha", 0.5)) == (None, 0.5)
    store.put("stop", {"by": "anna", "at": clock.now.isoformat()})
    assert store.get("stop")["by"] == "anna"
    store.put("stop", None)
    assert store.get("stop", "default") is None


# ---- accounts


def test_accounts_and_logins(store: Store, clock: Clock) -> None:
    store.add_user("bert", "annotator", "hash 1")
    store.add_user("anna", "admin", "hash 2")
    assert [(user.name, user.role, user.created) for user in store.users()] == [
        ("anna", "admin", START),
        ("bert", "annotator", START),
    ]
    anna = store.user("anna")
    assert anna is not None
    assert anna.password_hash == "hash 2"
    assert "hash 2" not in repr(anna)
    assert store.user("carl") is None
    assert store.user("a\x00") is None
    for name, role in (("anna", "admin"), ("carl", "king"), ("", "admin")):
        with pytest.raises(StoreError):
            store.add_user(name, role, "x")  # type: ignore[arg-type]
    store.add_login("token 1", "anna", START + timedelta(seconds=10))
    store.add_login("token 2", "anna", START + timedelta(seconds=20))
    with pytest.raises(StoreError, match="no user 'carl'"):
        store.add_login("token 3", "carl", START + timedelta(seconds=20))
    assert store.login("token 1") == anna
    assert store.login("token") is None
    clock.passes(10)
    assert store.login("token 1") is None
    assert store.login("token 2") == anna
    store.remove_login("token 2")
    assert store.login("token 2") is None


# ---- several at once


def test_what_another_process_wrote_is_seen_at_once(open_store: Callable[..., Store]) -> None:
    one, two = open_store(), open_store()
    (number,) = one.add([pair()])
    assert asked(two, "anna") == [number]
    two.answer(number, "anna", token="1", choice="a")
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
                events = {store.answer(number, person, token=f"{person} {number}", choice="a") for _ in range(2)}
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


def test_a_reader_waits_for_a_smaller_id_that_is_on_its_way(postgres: Server, clock: Clock) -> None:  # noqa: F811
    """PostgreSQL gives out ids before the commit: the second may be there before the first."""
    waits = text("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted")
    read: list[list[int]] = []
    with Store(postgres.store(), clock=clock) as store:
        first, second = store.add(pairs(2))
        asked(store, "anna")
        asked(store, "bert")
        reader = threading.Thread(target=lambda: read.append([label.comparison_id for label in store.labels()]))
        with store._database._writing.begin() as connection:
            asking.answer(connection, first, "anna", "1", Given(choice="a"), store._terms())
            store.answer(second, "bert", token="2", choice="b")
            reader.start()
            with store._database.engine.connect() as other:
                while reader.is_alive() and not other.scalar(waits):
                    other.rollback()
            assert read == []
        reader.join()
    assert read == [[first, second]]


def test_one_answer_sent_by_several_threads_is_one_event(store: Store) -> None:
    (number,) = store.add([pair()])
    asked(store, "anna")
    barrier = threading.Barrier(6)
    events: list[int] = []
    undone: list[int | None] = []

    def send() -> None:
        barrier.wait()
        events.append(store.answer(number, "anna", token="1", choice="a"))
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


def test_one_writer_that_fails_takes_nobody_with_him(tmp_path: Path) -> None:
    """In SQLite those who wait share a transaction."""
    with Store(tmp_path / "labels.db") as store:
        ids = store.add(pairs(12))
        asked(store, "anna", 12)
        together = store._database._together
        assert together is not None
        refusals: list[int] = []

        def send(number: int) -> None:
            try:
                store.answer(number, "anna", token=f"{number}", choice="a" if number % 2 else "left")  # type: ignore[arg-type]
            except StoreError:
                refusals.append(number)

        threads = [threading.Thread(target=send, args=(number,)) for number in ids]
        with together._change:
            together._somebody_writes = True  # all of them wait
        for thread in threads:
            thread.start()
        while len(together._waiting) < 12 and any(thread.is_alive() for thread in threads):
            pass
        with together._change:
            together._somebody_writes = False
            together._change.notify_all()
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
    with pytest.raises(Unavailable, match="disk I/O error"):
        store.answer(number, "anna", token="1", choice="a")
    event.remove(store._database.engine, "commit", fail)
    assert store.last_event() == 0
    assert store.answer(number, "anna", token="1", choice="b") == store.last_event()


# ---- the database


def test_nothing_that_people_did_can_be_changed_or_deleted(store: Store) -> None:
    (number,) = store.add([pair()])
    asked(store, "anna")
    store.answer(number, "anna", token="1", choice="a")
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
        assert compare_metadata(context, Base.metadata) == []


def test_a_store_is_opened_again_with_what_it_holds(open_store: Callable[..., Store]) -> None:
    store = open_store()
    (number,) = store.add([pair()])
    asked(store, "anna")
    store.close()
    assert asked(open_store(), "anna") == [number]


def test_what_is_no_store_of_this_version_is_refused(tmp_path: Path) -> None:
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
            (NEXT_FREE, {"ix_comparisons_queue", "ix_leases_held"}),
            (HELD_BY, {"ix_leases_annotator"}),
            (RAN_OUT, {"ix_leases_held"}),
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


def test_a_new_file_is_its_owners(tmp_path: Path) -> None:
    with Store(tmp_path / "labels.db") as store:
        store.add_user("anna", "admin", "hash")
        assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {
            "labels.db": 0o600,
            "labels.db-wal": 0o600,
            "labels.db-shm": 0o600,
        }


def test_a_store_that_must_exist_is_not_made(tmp_path: Path, postgres: Server) -> None:  # noqa: F811
    with pytest.raises(StoreError, match="does not exist"):
        Store(tmp_path / "folder" / "labels.db", must_exist=True)
    assert not list(tmp_path.iterdir())
    with pytest.raises(StoreError, match="is empty"):
        Store(postgres.database(), must_exist=True)
    Store(tmp_path / "labels.db").close()
    Store(tmp_path / "labels.db", must_exist=True).close()


def test_postgresql_syncs_each_commit_whatever_its_default(postgres: Server) -> None:  # noqa: F811
    address = postgres.database()
    postgres.execute(f"ALTER DATABASE {name_of(address)} SET synchronous_commit = off")
    with Store(address.replace("+psycopg", "")) as store, store._database.engine.connect() as connection:
        assert connection.execute(text("SHOW synchronous_commit")).scalar() == "on"


def test_a_lost_connection_is_replaced(postgres: Server) -> None:  # noqa: F811
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
    with pytest.raises(StoreError, match=r"cannot be opened: file is not a database"):
        Store(other)
    with pytest.raises(StoreError, match=r"folder"):
        Store(tmp_path)
    foreign = tmp_path / "foreign.db"
    with sqlite3.connect(foreign) as connection:
        connection.execute("CREATE TABLE events (id INTEGER)")
    with pytest.raises(StoreError, match="not a store's"):
        Store(f"sqlite:///{foreign}")


def test_a_database_that_is_gone_is_one_sentence(postgres: Server) -> None:  # noqa: F811
    address = postgres.database()
    with Store(address) as store:
        store.add([pair()])
        postgres.execute(f"DROP DATABASE {name_of(address)} WITH (FORCE)")
        with pytest.raises(Unavailable, match="does not answer"):
            store.ask("anna")
        with pytest.raises(Unavailable, match="does not answer"):
            store.labels()
