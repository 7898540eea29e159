"""Annotators who are a file or a program: every vote arrives once, as the label of the person who gave it."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deep_rlhf.errors import UserError
from deep_rlhf.feedback.annotators.base import BackgroundLabeler, People
from deep_rlhf.feedback.annotators.reliability import alpha
from deep_rlhf.feedback.annotators.replay import Replay, read_votes
from deep_rlhf.feedback.annotators.simulated import SimulatedLabeler
from deep_rlhf.feedback.records import Comparison
from deep_rlhf.feedback.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "store.db", seed=1) as opened:
        yield opened


def lines(path: Path, rows: list[Any]) -> Path:
    text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n"
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def voted(folder: Path) -> Path:
    """Three pairs of arguments with the votes of workers; their texts stand in a file beside."""
    texts = [{"id": f"arg{i}", "topic": "t", "text": f"argument {i}"} for i in range(4)]
    lines(folder / "arguments.jsonl.gz", texts)
    rows = [
        {"id": "arg0_arg1", "topic": "tea-or-coffee_tea", "votes": [[7, "a1", 0.5], [8, "equal", 0.1], [9, "a2", 0.9]]},
        {"id": "arg1_arg2", "topic": "tea-or-coffee_tea", "votes": [[7, "a2", 0.5], [8, "a2", 0.1], [7, "a1", 0.5]]},
        {"id": "arg2_arg3", "topic": "cats_yes", "votes": [[10, "a1", 0.2]]},
    ]
    return lines(folder / "votes.jsonl.gz", rows)


def test_each_vote_is_a_label_of_its_worker(store: Store, tmp_path: Path) -> None:
    replay = Replay(read_votes(voted(tmp_path)), seed=1)
    assert replay.label(store, 100) == 6  # the second vote of worker 7 on a pair is left out
    assert replay.label(store, 100) == 0
    found = {(one.comparison.responses, one.annotator): one.choice for one in store.labels()}
    assert found == {
        ((" argument 0", " argument 1"), "worker-7"): "a",
        ((" argument 0", " argument 1"), "worker-8"): "tie",
        ((" argument 0", " argument 1"), "worker-9"): "b",
        ((" argument 1", " argument 2"), "worker-7"): "b",
        ((" argument 1", " argument 2"), "worker-8"): "b",
        ((" argument 2", " argument 3"), "worker-10"): "a",
    }
    assert {one.comparison.prompt for one in store.labels()} == {
        "\n\nHuman: tea or coffee: tea\n\nAssistant:",
        "\n\nHuman: cats: yes\n\nAssistant:",
    }
    assert sorted(replay.prompts) == sorted({one.comparison.prompt for one in store.labels()})
    assert len({one.comparison_id for one in store.labels()}) == 3
    assert store.waiting() == 0


def test_a_replay_goes_on_where_it_was(store: Store, tmp_path: Path) -> None:
    pairs = read_votes(voted(tmp_path))
    assert Replay(pairs, seed=1).label(store, 2) == 2
    first = [one.event_id for one in store.labels()]
    assert Replay(pairs, seed=1).label(store, 100) == 4
    assert [one.event_id for one in store.labels()][:2] == first
    assert store.label_count() == 6


def test_the_seed_decides_the_order(store: Store, tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "a": "x", "b": "y", "votes": [["ann", "a"]]} for i in range(20)]
    pairs = read_votes(lines(tmp_path / "votes.jsonl", rows))
    orders = [Replay(pairs, seed=seed).prompts for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(pair.prompt for pair in pairs) != orders[0]


def test_labels_of_one_person_are_replayed_as_theirs(store: Store, tmp_path: Path) -> None:
    rows = [
        {"prompt": "p", "a": "x", "b": "y", "mu": 1.0, "annotator": "ann"},
        {"prompt": "p", "a": "x", "b": "y", "mu": 0.0, "annotator": "bob"},
        {"prompt": "q", "a": "x", "b": "y", "mu": 0.5},
    ]
    Replay(read_votes(lines(tmp_path / "labels.jsonl", rows), template="plain")).label(store, 100)
    found = {(one.comparison.prompt, one.annotator, one.choice) for one in store.labels()}
    assert found == {("p", "ann", "a"), ("p", "bob", "b"), ("q", "replay", "tie")}


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"id": "arg0_arg9", "topic": "t", "votes": [[1, "a1", 0.5]]}, "line 2: .*'arg9'"),
        ({"id": "arg0_arg1", "topic": "t", "votes": [[1, "left", 0.5]]}, "line 2: .*'left'"),
        ({"id": "arg0_arg1", "votes": [[1, "a1", 0.5]]}, "line 2: .*'topic'"),
        ({"prompt": "p", "a": ["x"], "b": "y", "votes": [[1, "a", 0.5]]}, "line 2: .*text"),
        ("{", "line 2: "),
    ],
)
def test_a_malformed_row_is_named(row: Any, told: str, tmp_path: Path) -> None:
    voted(tmp_path)
    good = {"id": "arg0_arg1", "topic": "t", "votes": [[1, "a1", 0.5]]}
    with pytest.raises(UserError, match=told):
        read_votes(lines(tmp_path / "bad.jsonl", [good, row]))
    with pytest.raises(UserError, match="no file"):
        read_votes(tmp_path / "nothing.jsonl")


def test_real_disagreement_is_replayed(store: Store, shared: Path) -> None:
    pairs = read_votes(shared / "data" / "convarg" / "votes.jsonl.gz")
    assert len(pairs) > 16_000
    replay = Replay(pairs, seed=3)
    assert replay.label(store, 250) == 250
    labels = store.labels()
    assert len({one.annotator for one in labels}) > 40
    agreement = alpha(labels)
    assert agreement is not None
    assert 0.1 < agreement < 0.7  # people disagree about arguments


def longer(prompt: str, response: str) -> float:
    return float(len(response))


def add(store: Store, count: int, **settings: Any) -> None:
    store.add([Comparison(prompt=f"p{i}", responses=("x", "x" * 30), **settings) for i in range(count)])


def test_simulated_annotators_take_turns_at_the_store(store: Store) -> None:
    add(store, 9)
    labeler = SimulatedLabeler(longer, seed=1)
    assert labeler.label(store, 4) == 4
    assert labeler.label(store, 100) == 5
    assert labeler.label(store, 100) == 0
    labels = store.labels()
    assert len({one.annotator for one in labels}) == 3
    assert sum(one.choice == "b" for one in labels) >= 7
    add(store, 1)
    assert SimulatedLabeler(longer, seed=1).label(store, 9) == 1  # a new run of the same annotators
    assert People().label(store, 9) == 0


def test_a_question_with_overlap_is_labelled_by_several_annotators(store: Store) -> None:
    add(store, 2, overlap=3)
    assert SimulatedLabeler(longer, seed=1).label(store, 100) == 6


def test_simulated_annotators_rank(store: Store) -> None:
    store.add([Comparison(prompt="p", responses=("xx" * 40, "x", "x" * 40)) for _ in range(10)])
    SimulatedLabeler(longer, seed=1).label(store, 100)
    ranks = [one.ranks for one in store.labels()]
    assert ranks.count((1, 3, 2)) >= 5


def test_annotators_in_the_background_label_until_they_are_stopped(store: Store) -> None:
    add(store, 5)
    background = BackgroundLabeler(SimulatedLabeler(longer, seed=1), store)
    for _ in range(200):
        if len(store.labels()) == 5:
            break
        background._stopped.wait(0.05)
    background.stop()
    assert len(store.labels()) == 5
    add(store, 1)
    assert not background._thread.is_alive()
    assert len(store.labels()) == 5
