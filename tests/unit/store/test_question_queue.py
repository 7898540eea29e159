"""Which questions people are asked, and for how long they are lent."""

from collections.abc import Callable
from datetime import timedelta

import pytest
from store_parts import START, Clock, asked, pair, pairs, refused

from deep_rlhf.errors import StoreError
from deep_rlhf.feedback.records import Comparison
from deep_rlhf.feedback.store import Store

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
        responses=("one", "", "\udfff"),
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
    store.add_label(original, "anna", token="t", choice="tie")
    number = store.add([comparison])[0]
    (question,) = store.ask("anna")
    assert (question.id, question.comparison) == (number, comparison)
    assert question.leased_until == START + timedelta(seconds=60)
    assert sorted(question.shown_order) == [0, 1, 2]


def test_an_invalid_question_is_refused(store: Store) -> None:
    with pytest.raises(StoreError, match="77"):
        store.add([pair(), pair(repeat_of=77)])
    with pytest.raises(StoreError, match=r"finite priority.* nan"):
        store.add([pair(), pair(priority=float("nan"))])
    with pytest.raises(StoreError, match=r"overlap.* 0"):
        store.add([pair(overlap=0)])
    assert store.waiting() == 0
    assert store.add([]) == []


def test_the_same_questions_are_asked_again_until_they_are_answered(store: Store) -> None:
    first, second, third = store.add(pairs(3))
    assert asked(store, "anna", 2) == [first, second]
    assert asked(store, "anna") == [first]
    store.add_label(first, "anna", token="1", choice="a")
    assert asked(store, "anna", 2) == [second, third]


def test_overlap_puts_a_question_to_different_people(store: Store) -> None:
    (number,) = store.add([pair(overlap=2)])
    assert [asked(store, person) for person in ("anna", "bert", "carl", "anna")] == [[number], [number], [], [number]]
    store.add_label(number, "anna", token="a", choice="a")
    store.add_label(number, "bert", token="b", choice="b")
    assert [asked(store, person) for person in ("anna", "bert", "carl")] == [[], [], []]
    assert [(label.annotator, label.choice) for label in store.labels()] == [("anna", "a"), ("bert", "b")]


def test_a_repeat_goes_only_to_the_person_who_labelled_the_original(store: Store) -> None:
    (original,) = store.add([pair()])
    (repeat,) = store.add([pair(why_selected="repeat", repeat_of=original, priority=9.0)])
    assert asked(store, "anna", 2) == [original]
    store.add_label(original, "anna", token="1", choice="a")
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
    store.add_label(answered, "anna", token="1", choice="a")
    assert store.withdraw(older_than_policy=2) == 2
    assert store.waiting() == 4  # held and answered have one place left each
    assert store.withdraw(older_than_policy=2) == 0
    assert asked(store, "bert", 9) == [held, answered, newer, gold]
    store.add_label(ran_out, "carl", token="2", choice="b")  # a page that was still open: the label is as good as any
    assert [label.comparison_id for label in store.labels()] == [answered, ran_out]


def test_blind_pairs_and_repeats_about_older_policies_are_withdrawn_too_but_never_gold(store: Store) -> None:
    (original,) = store.add([pair(policy_version=3)])
    store.add([pair(policy_version=1, why_selected=reason) for reason in ("win_rate", "initial")])
    (gold,) = store.add([pair(why_selected="gold", expected="a")])
    store.add([pair(why_selected="repeat", repeat_of=original)])
    assert store.withdraw(older_than_policy=3) == 3
    assert asked(store, "anna", 9) == [original, gold]


def test_unseen_counts_the_questions_that_anybody_could_be_asked(store: Store, clock: Clock) -> None:
    ids = store.add([*pairs(4), pair(overlap=2)])
    store.add([pair(why_selected="repeat", repeat_of=ids[0])])
    assert (store.waiting(), store.unseen()) == (6, 5)
    asked(store, "anna", 5)
    store.skip(ids[0], "anna", token="skip")
    store.add_label(ids[4], "anna", token="first of two", choice="a")
    assert (store.waiting(), store.unseen()) == (3, 0)  # the skipped, the second of two, the repeat
    clock.passes(301)
    assert store.unseen() == 3  # whose leases ran out


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
        store.add_label(number, "anna", token="1", choice="a")
    store.add_label(number, "bert", token="2", choice="b")
    with refused("taken"):
        store.add_label(number, "anna", token="1", choice="a")
    assert [label.annotator for label in store.labels()] == ["bert"]


def test_a_late_label_counts_if_nobody_took_the_question(store: Store, clock: Clock) -> None:
    first, second = store.add(pairs(2))
    (question,) = store.ask("anna")
    clock.passes(61)
    store.add_label(first, "anna", token="1", choice="a")  # nobody has looked for expired leases yet
    assert asked(store, "anna") == [second]
    clock.passes(61)
    assert asked(store, "bert") == [second]
    store.release("bert")
    store.add_label(second, "anna", token="2", choice="b")  # bert has given it back
    assert asked(store, "bert") == []
    assert store.labels()[0].shown_order == question.shown_order


def test_asking_again_renews_the_lease(store: Store, clock: Clock) -> None:
    (number,) = store.add([pair()])
    asked(store, "anna")
    clock.passes(40)
    assert store.ask("anna")[0].leased_until == clock.now + timedelta(seconds=60)
    clock.passes(50)
    assert asked(store, "bert") == []
    clock.passes(30)  # over, but nobody else has asked: it is still anna's
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
    store.add_label(first, "anna", token="2", choice="a")  # anna reconsidered, and nobody else has it
    assert asked(store, "bert") == []
