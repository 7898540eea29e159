"""Labels, versions, figures and accounts."""

from datetime import timedelta

import pytest
from store_parts import START, Clock, asked, pair, pairs

from deep_rlhf.errors import StoreError
from deep_rlhf.feedback.records import Alarm, Comparison, Version
from deep_rlhf.feedback.store import Store

# ---- what the trainer reads


def test_labels_come_in_order_and_from_an_event_on(store: Store) -> None:
    ids = store.add(pairs(3))
    asked(store, "anna", 3)
    events = [store.add_label(number, "anna", token=f"{number}", choice="a") for number in reversed(ids)]
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
            Comparison(prompt="?", responses=("a", "b", "c")),
            pair(why_selected="gold", expected="a"),
            pair(why_selected="win_rate", writers=(0, 3)),
            pair(why_selected="repeat", repeat_of=first),
        ]
    )
    for number, question in enumerate(store.ask("anna", count=7)):
        ranks = [1, 2, 3] if len(question.comparison.responses) == 3 else None
        choice = None if ranks else "cant_tell" if question.comparison.why_selected == "variance" else "a"
        store.add_label(question.id, "anna", token=f"{number}", choice=choice, ranks=ranks)
    (repeat,) = asked(store, "anna")
    store.add_label(repeat, "anna", token="r", choice="a")
    assert store.label_count() == 4
    assert (len(store.labels()), store.labelled("anna"), store.labelled("bert")) == (8, 8, 0)


def test_the_pace_is_the_median_time_of_the_labels(store: Store) -> None:
    assert store.pace("anna") is None
    ids = store.add(pairs(4))
    asked(store, "anna", 4)
    for number, seconds in zip(ids, (2.0, 3.0, 10.0, 500.0), strict=True):
        store.add_label(number, "anna", token=f"{number}", choice="a", seconds=seconds)
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
