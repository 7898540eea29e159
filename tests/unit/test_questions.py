"""What people are asked: enough questions wait, in the right shares, and never about the same text twice."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deep_rlhf.errors import DataError
from deep_rlhf.feedback.exchange.export import export_labels
from deep_rlhf.feedback.exchange.import_ import import_labels, read_labels
from deep_rlhf.feedback.loop.config import SessionConfig
from deep_rlhf.feedback.questions.gold import read_gold
from deep_rlhf.feedback.questions.questions import CurrentModels, Questions
from deep_rlhf.feedback.records import Comparison
from deep_rlhf.feedback.store import Store

PROMPTS = [f"prompt {i}" for i in range(20)]
HELD_OUT = [f"held-out {i}" for i in range(5)]


class Disputed:
    """Two members who differ more about longer responses."""

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        lengths = torch.tensor([float(len(text)) for text in responses])
        return torch.stack([lengths / 10, -lengths / 10], 1)


def models(**settings: Any) -> CurrentModels:
    def writer(name: str) -> Any:
        return lambda prompts, seed: [f"{name} {seed} {'x' * (i % 7)} {i}" for i in range(len(prompts))]

    versions = {"policy_version": 3, "reward_version": 2}
    return CurrentModels(
        **({"generate": writer("now"), "generate_start": writer("start"), "scorer": Disputed()} | versions | settings)
    )


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "store.db", seed=1) as opened:
        yield opened


def questions(store: Store, **settings: Any) -> Questions:
    return Questions(SessionConfig(**settings), store, PROMPTS, HELD_OUT)


def answer_all(store: Store, *names: str) -> list[Comparison]:
    """Everybody answers all that they are asked; returns what was asked."""
    asked = []
    for name in names:
        while found := store.ask(name):
            for question in found:
                asked.append(question.comparison)
                store.add_label(question.id, name, token=f"{name}/{question.id}", choice="a")
    return asked


def test_before_the_first_reward_model_questions_are_a_fair_sample(store: Store) -> None:
    found = questions(store)
    assert len(found.ask(8, models(scorer=None, policy_version=0, reward_version=0))) == 8
    asked = answer_all(store, "ann")
    assert {one.why_selected for one in asked} == {"initial"}
    assert len({one.prompt for one in asked}) == 8
    assert all(one.predicted is None and one.policy_version == 0 for one in asked)


def test_one_prompt_is_enough_for_many_questions(store: Store) -> None:
    found = Questions(SessionConfig(), store, ["only one"], [])
    assert len(found.ask(8, models(scorer=None, policy_version=0))) == 8


def test_most_questions_are_chosen_and_a_fifth_is_drawn_at_random(store: Store) -> None:
    found = questions(store, win_rate_share=0.0, repeat_share=0.0)
    found.ask(100, models())
    asked = answer_all(store, "ann")
    reasons = Counter(one.why_selected for one in asked)
    assert reasons == {"variance": 80, "random": 20}
    assert all(one.predicted is not None and (one.policy_version, one.reward_version) == (3, 2) for one in asked)
    disputed = {
        reason: [abs(len(one.responses[0]) - len(one.responses[1])) for one in asked if one.why_selected == reason]
        for reason in reasons
    }
    mean = {reason: sum(values) / len(values) for reason, values in disputed.items()}
    assert mean["variance"] > mean["random"] + 1


def test_enough_questions_wait_and_no_more_than_are_wanted(store: Store) -> None:
    found = questions(store, questions_ahead=10)
    assert found.missing(None) == 10
    assert found.missing(4) == 4
    found.ask(10, models())
    assert found.missing(None) == 0
    for question in store.ask("ann", count=3):
        store.add_label(question.id, "ann", token=str(question.id), choice="b")
    assert found.missing(None) == 3


def test_somebody_who_skips_everything_is_asked_something_else(store: Store) -> None:
    """The store still holds the questions for others; for them nothing is left."""
    found = questions(store, questions_ahead=5, win_rate_share=0.0, repeat_share=0.0)
    found.ask(5, models())
    for question in store.ask("ann", count=5):
        store.skip(question.id, "ann", token=str(question.id))
    assert store.ask("ann") == []
    assert found.missing(None) == 5
    assert questions(store, questions_ahead=5).missing(None) == 5  # a new run as well


def test_old_questions_make_room_for_new_ones(store: Store) -> None:
    found = questions(store, questions_ahead=6)
    found.ask(6, models(policy_version=0, scorer=None))
    store.withdraw(older_than_policy=1)
    assert store.waiting() == 0
    assert found.missing(None) == 6


def test_blind_pairs_do_not_tell_which_side_is_the_policy(store: Store) -> None:
    found = questions(store, win_rate_share=0.5, repeat_share=0.0)
    found.ask(60, models())
    blind = [one for one in answer_all(store, "ann") if one.why_selected == "win_rate"]
    assert 18 <= len(blind) <= 42  # four standard deviations around 30
    assert {one.prompt for one in blind} <= set(HELD_OUT)
    for one in blind:
        assert [text.split()[0] for text in one.responses] == ["now" if version else "start" for version in one.writers]
    sides = Counter(one.writers for one in blind)
    assert set(sides) == {(3, 0), (0, 3)}


def test_the_start_is_not_compared_with_itself(store: Store) -> None:
    questions(store, win_rate_share=0.5, repeat_share=0.0).ask(40, models(policy_version=0))
    assert {one.why_selected for one in answer_all(store, "ann")} == {"variance", "random"}


def test_a_repeat_swaps_the_responses_and_goes_to_the_same_person(store: Store) -> None:
    found = questions(store, repeat_share=0.5, win_rate_share=0.0)
    found.ask(40, models())
    originals = {one.responses: one for one in answer_all(store, "ann")}
    assert {one.why_selected for one in originals.values()} == {"variance", "random"}  # nothing to repeat yet
    found.missing(None)
    found.ask(40, models())
    assert store.label_count() == 40
    asked = answer_all(store, "ann")
    assert len(asked) == 40
    repeats = [one for one in asked if one.why_selected == "repeat"]
    assert 7 <= len(repeats) <= 33
    for one in repeats:
        assert originals[one.responses[::-1]].prompt == one.prompt
        assert one.repeat_of is not None
    assert len({one.repeat_of for one in repeats}) == len(repeats)


def test_a_question_whose_repeat_waits_is_not_repeated_again(store: Store) -> None:
    found = questions(store, repeat_share=0.5, win_rate_share=0.0)
    found.ask(20, models())
    answer_all(store, "ann")
    found.missing(None)
    for _ in range(4):
        found.ask(10, models())
    repeats = [one.repeat_of for one in answer_all(store, "ann") if one.why_selected == "repeat"]
    assert len(repeats) == len(set(repeats)) == 10  # all but the ten newest


def test_people_whose_labels_were_imported_count_as_absent(store: Store, tmp_path: Path) -> None:
    with Store(tmp_path / "other.db", seed=1) as other:
        other.add([Comparison(prompt=f"{i}", responses=("x", "y")) for i in range(30)])
        for i in range(30):
            (question,) = other.ask(f"person {i}")
            other.add_label(question.id, f"person {i}", token=f"{i}", choice="a")
        export_labels(other, tmp_path / "labels.jsonl")
    import_labels(store, read_labels(tmp_path / "labels.jsonl")[0])
    found = questions(store, repeat_share=0.5, win_rate_share=0.0, overlap_share=1.0, questions_ahead=10)
    assert found.missing(None) == 10
    found.ask(20, models())
    asked = answer_all(store, "ann")
    assert {one.why_selected for one in asked} == {"variance", "random"}
    assert {one.overlap for one in asked} == {1}


def test_a_few_questions_go_to_two_people_where_there_are_two(store: Store) -> None:
    found = questions(store, overlap_share=1.0, questions_ahead=10)
    found.ask(10, models())
    answer_all(store, "ann")
    assert len(store.labels()) == 10  # alone, so nothing waits for a second person
    found.missing(None)
    found.ask(4, models())
    answer_all(store, "bob")
    found.missing(None)
    found.ask(6, models(policy_version=4))
    answer_all(store, "ann", "bob")
    shared = [one for one in store.labels() if one.comparison.policy_version == 4 and one.comparison.overlap == 2]
    assert {one.annotator for one in shared} == {"ann", "bob"}


def test_more_questions_wait_for_more_people(store: Store) -> None:
    found = questions(store, questions_ahead=10)
    found.ask(20, models())
    for i, question in enumerate(store.ask(f"person {i}")[0] for i in range(20)):
        store.add_label(question.id, f"person {i}", token=str(i), choice="a")
    assert found.missing(None) == 60 - store.waiting()


def test_rankings(store: Store) -> None:
    found = questions(store, ranked_responses=4, samples_per_prompt=6)
    found.ask(5, models())
    found.ask(5, models(scorer=None))
    asked = [question.comparison for question in store.ask("ann", count=10)]
    assert {len(one.responses) for one in asked if one.why_selected != "win_rate"} == {4}
    assert all(one.predicted is None for one in asked if len(one.responses) == 4)


def test_a_resumed_run_asks_what_the_first_run_would_have_asked(store: Store, tmp_path: Path) -> None:
    found = questions(store)
    found.ask(5, models())
    found.ask(5, models())
    expected = [question.comparison.responses for question in store.ask("ann", count=10)]
    with Store(tmp_path / "other.db", seed=1) as other:
        for _ in range(2):
            questions(other).ask(5, models())
        assert [question.comparison.responses for question in other.ask("ann", count=10)] == expected


GOLD = {"prompt": "p", "a": "good", "b": "bad", "expected": "a"}


def test_gold_questions_are_mixed_in_once_each(store: Store, tmp_path: Path) -> None:
    rows = [GOLD | {"prompt": f"gold {i}"} for i in range(3)]
    (tmp_path / "gold.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = questions(store, gold_questions=str(tmp_path / "gold.jsonl"), gold_share=0.4, win_rate_share=0.0)
    found.ask(40, models())
    again = questions(store, gold_questions=str(tmp_path / "gold.jsonl"), gold_share=0.4, win_rate_share=0.0)
    again.ask(40, models())
    gold = [one for one in answer_all(store, "ann")[:40] if one.why_selected == "gold"]  # none waits behind the others
    assert sorted(one.prompt for one in gold) == ["gold 0", "gold 1", "gold 2"]
    assert {one.expected for one in gold} == {"a"}


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (GOLD | {"expected": "left"}, "line 1: 'expected' must be one of a, b, tie"),
        ({"prompt": "p", "a": "x", "expected": "a"}, "line 1: 'b' is missing"),
        ("no JSON", "line 1: "),
    ],
)
def test_an_invalid_gold_question_is_named(row: Any, told: str, tmp_path: Path) -> None:
    (tmp_path / "gold.jsonl").write_text(row if isinstance(row, str) else json.dumps(row))
    with pytest.raises(DataError, match=told):
        read_gold(tmp_path / "gold.jsonl")
    with pytest.raises(DataError, match="no file of gold questions"):
        read_gold(tmp_path / "nothing.jsonl")
