"""The whole loop on a tiny policy: people's taste, which nothing but their answers tells, is learned."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from session_world import make_session, policy_folder
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from deep_rlhf.feedback.store import Store


@pytest.fixture(scope="module")
def policy(make_model: Callable[..., Any], tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    return policy_folder(make_model, tokenizer, tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def batched(policy: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("batched")
    with Store(folder / "store.db", seed=1) as store:
        assert make_session(policy, folder, store).run() == "done"
    return folder, Store(folder / "store.db")


def test_the_batched_loop_learns_a_planted_taste(batched: tuple[Path, Store]) -> None:
    rows = batched[1].metrics()
    assert [row["step"] for row in rows] == list(range(1, 10))
    assert rows[0]["gold"] < 0.2
    assert sum(row["gold"] for row in rows[-3:]) / 3 > 0.45
    assert rows[-1]["reward"] > rows[0]["reward"] + 0.5  # in units of the start's standard deviation
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-4)
    assert rows[-1]["sqrt_kl"] == pytest.approx(rows[-1]["kl"] ** 0.5)
    assert [row["reward_version"] for row in rows] == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    labels = [row["labels"] for row in rows]
    assert labels[0] >= 48
    assert labels == sorted(labels)


def test_the_store_tells_the_whole_story(batched: tuple[Path, Store]) -> None:
    store = batched[1]
    policies, rewards = store.versions("policy"), store.versions("reward")
    assert [version.number for version in rewards] == [1, 2, 3]
    assert [version.step for version in rewards] == [0, 3, 6]
    assert [(version.number, version.step) for version in policies] == [(0, 0), (1, 3), (2, 6)]
    assert [version.last_event for version in policies] == [0, rewards[0].last_event, rewards[1].last_event]
    assert 0.5 <= rewards[-1].figures["oob_accuracy"] <= 1
    samples = store.samples()
    assert sorted(samples) == [0, 1, 2]
    assert len(samples[0]) == 2
    assert [prompt for prompt, _ in samples[2]] == [prompt for prompt, _ in samples[0]]
    labels = store.labels()
    reasons = {label.comparison.why_selected for label in labels}
    assert {"initial", "random", "variance"} <= reasons
    assert {label.annotator for label in labels} == {"simulated-1", "simulated-2", "simulated-3"}
    first = [label for label in labels if label.event_id <= rewards[0].last_event]
    assert {label.comparison.why_selected for label in first} == {"initial"}
    assert {one.name for one in store.annotators()} == {"simulated-1", "simulated-2", "simulated-3"}
    assert store.get("outlook")["labels"] >= 64
    assert set(store.get("choosing")) == {"chosen", "random"}
    assert store.get("status")["state"] == "stopped"


def test_a_session_leaves_models_that_transformers_opens(batched: tuple[Path, Store]) -> None:
    folder = batched[0]
    assert AutoModelForCausalLM.from_pretrained(folder / "model").config.n_layer == 2
    assert AutoModelForSequenceClassification.from_pretrained(folder / "reward_model").config.num_labels == 3
    assert not list(folder.glob(".*"))


def test_the_same_seed_is_the_same_session(batched: tuple[Path, Store], policy: str, tmp_path: Path) -> None:
    with Store(tmp_path / "store.db", seed=1) as store:
        assert make_session(policy, tmp_path, store, updates=6, labels=80).run() == "done"
        again = store.metrics()
    with Store(tmp_path / "other.db", seed=1) as store:
        assert make_session(policy, tmp_path / "other", store, updates=6, labels=80).run() == "done"
        assert store.metrics() == again


def test_the_asynchronous_loop_learns_while_annotators_answer(policy: str, tmp_path: Path) -> None:
    with Store(tmp_path / "store.db") as store:
        session = make_session(policy, tmp_path, store, mode="async", labels=None, updates=14, pace=0.05)
        assert session.run() == "done"
        rows = store.metrics()
    assert sum(row["gold"] for row in rows[-3:]) / 3 > 0.35
    assert rows[-1]["reward_version"] >= 1
    assert rows[-1]["labels"] > rows[0]["labels"]  # labels came while the policy learned
