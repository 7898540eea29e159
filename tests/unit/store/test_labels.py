"""What a label is, who may give it, and how it is taken back."""

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from store_parts import Clock, asked, pair, pairs, refused

from deep_rlhf.errors import LabelRefused, StoreError
from deep_rlhf.feedback.records import Comparison
from deep_rlhf.feedback.store import Store

# ---- labels


def test_a_label_is_recorded_as_it_was_given(store: Store, clock: Clock) -> None:
    store.add([pair(policy_version=4, reward_version=2, why_selected="information")])
    (question,) = store.ask("anna")
    clock.passes(5)
    event = store.add_label(question.id, "anna", token="1", choice="b", strength=3, seconds=4.5)
    (label,) = store.labels()
    assert label.event_id == event == store.last_event()
    assert (label.comparison_id, label.comparison) == (question.id, question.comparison)
    assert (label.annotator, label.choice, label.ranks, label.strength) == ("anna", "b", None, 3)
    assert (label.shown_order, label.seconds, label.created) == (question.shown_order, 4.5, clock.now)
    with store._database.engine.connect() as connection:
        kept = connection.execute(text("SELECT why_selected, policy_version, reward_version FROM events")).one()
    assert tuple(kept) == ("information", 4, 2)


def test_the_same_token_again_is_the_same_label(store: Store) -> None:
    first, second = store.add(pairs(2))
    asked(store, "anna", 2)
    event = store.add_label(first, "anna", token="1", choice="a")
    assert store.add_label(first, "anna", token="1", choice="a") == event
    assert store.undo("anna", token="u") == first
    assert store.add_label(first, "anna", token="1", choice="a") == event  # late news of what was taken back since
    assert store.labels() == []
    with pytest.raises(StoreError, match="used for something else"):
        store.add_label(second, "anna", token="1", choice="a")
    asked(store, "bert")
    with pytest.raises(StoreError, match="used for something else"):
        store.skip(second, "anna", token="1")
    assert store.last_event() == event + 1


def test_a_person_who_may_not_label_is_refused(store: Store) -> None:
    first, second = store.add(pairs(2))
    asked(store, "anna")
    with refused("unknown"):
        store.add_label(99, "anna", token="1", choice="a")
    with refused("unknown"):
        store.add_label(first, "bert", token="1", choice="a")
    with refused("unknown"):
        store.skip(second, "anna", token="1")
    store.add_label(first, "anna", token="1", choice="a")
    with refused("gone"):
        store.add_label(first, "anna", token="2", choice="b")
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
def test_an_invalid_label_changes_nothing(tmp_path: Path, given: dict[str, Any]) -> None:
    with Store(tmp_path / "labels.db") as store:
        (number,) = store.add([pair()])
        asked(store, "anna")
        with pytest.raises(StoreError):
            store.add_label(number, "anna", **{"token": "1", **given})
        assert store.last_event() == 0
        store.add_label(number, "anna", token="1", choice="tie")


def test_a_ranking_has_a_rank_for_each_response(store: Store) -> None:
    (number,) = store.add([Comparison(prompt="?", responses=("a", "b", "c"))])
    asked(store, "anna")
    for wrong in ({"choice": "a"}, {"ranks": [1, 2]}, {"ranks": [0, 1, 2]}, {"ranks": [2, 2, 3]}, {"ranks": [1, 2, 4]}):
        with pytest.raises(StoreError):
            store.add_label(number, "anna", token="1", **wrong)  # type: ignore[arg-type]
    store.add_label(number, "anna", token="1", ranks=[2, 1, 2])
    assert store.labels()[0].ranks == (2, 1, 2)
    store.undo("anna", token="u")
    store.add_label(number, "anna", token="2", choice="cant_tell")
    assert store.labels()[0].choice == "cant_tell"


def test_an_invalid_name_is_refused(store: Store) -> None:
    store.add([pair()])
    for name in ("", "a\x00b", "a\nb", "x" * 201):
        with pytest.raises(StoreError, match="printable"):
            store.ask(name)
    assert asked(store, "Änne Müller")


# ---- undo


def test_undo_takes_back_a_skip_while_nobody_else_has_the_question(store: Store) -> None:
    first, second = store.add(pairs(2))
    asked(store, "anna", 2)
    store.add_label(first, "anna", token="1", choice="a")
    store.skip(second, "anna", token="2")
    assert store.undo("anna", token="u1") == second
    assert asked(store, "bert") == []  # it is anna's again
    assert asked(store, "anna", 2) == [second]
    store.skip(second, "anna", token="3")
    assert asked(store, "bert") == [second]
    with pytest.raises(LabelRefused, match="it stays skipped"):
        store.undo("anna", token="u2")
    store.release("bert")
    assert [store.undo("anna", token=token) for token in ("u3", "u4", "u5")] == [second, first, None]
    assert store.labels() == []


def test_undo_takes_back_the_newest_label_by_a_new_event(store: Store) -> None:
    ids = store.add(pairs(4))
    asked(store, "anna", 3)
    asked(store, "bert")
    for number in ids[:2]:
        store.add_label(number, "anna", token=f"{number}", choice="a")
    store.add_label(ids[3], "bert", token="bert", choice="b")
    last = store.last_event()
    assert store.undo("anna", token="u1") == ids[1]
    assert store.undo("anna", token="u1") == ids[1]  # the same undo sent twice
    assert store.undo("anna", token="u2") == ids[0]
    assert store.undo("anna", token="u3") is None
    assert [label.annotator for label in store.labels()] == ["bert"]
    assert asked(store, "anna", 3) == ids[:3]  # the two are anna's again, before the one that waits on their page
    again = store.add_label(ids[0], "anna", token="again", choice="b")
    assert [label.event_id for label in store.labels(after=last)] == [again]
    assert store.labelled("anna") == 1


def test_an_undone_question_is_not_put_to_others(store: Store, clock: Clock) -> None:
    (number,) = store.add([pair()])
    asked(store, "anna")
    store.add_label(number, "anna", token="1", choice="a")
    store.undo("anna", token="u")
    assert (asked(store, "bert"), store.waiting()) == ([], 0)
    clock.passes(61)
    assert asked(store, "bert") == [number]
