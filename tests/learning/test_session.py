"""The whole loop on a tiny policy: people's taste, which nothing but their answers tells, is learned."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from session_world import make_session, policy_folder
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from deep_rlhf.errors import CheckpointError
from deep_rlhf.feedback.annotators.base import People
from deep_rlhf.feedback.questions.schedule import LabelSchedule
from deep_rlhf.feedback.state import (
    ANNOTATORS,
    FORECAST,
    HEARTBEAT,
    SELECTION,
    STATUS,
    STOP,
    AccuracyForecast,
    Status,
    StopRequest,
)
from deep_rlhf.feedback.store import Store
from deep_rlhf.models.reward import RewardModel


@pytest.fixture(scope="module")
def policy(make_model: Callable[..., Any], tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    return policy_folder(make_model, tokenizer, tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def batched(policy: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("batched")
    with Store(folder / "store.db", seed=1) as store:
        assert make_session(policy, folder, store, held_out_members=2).run() == "done"
    return folder, Store(folder / "store.db")


def test_the_batched_loop_learns_a_planted_taste(batched: tuple[Path, Store]) -> None:
    rows = batched[1].metrics()
    assert [row["step"] for row in rows] == list(range(1, 10))
    assert rows[0]["gold"] < 0.2
    assert sum(row["gold"] for row in rows[-3:]) / 3 > 0.45
    assert all("held_out_reward" in row for row in rows)
    assert rows[-1]["reward"] > rows[0]["reward"] + 0.5  # in units of the start's standard deviation
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-4)
    assert rows[-1]["sqrt_kl"] == pytest.approx(rows[-1]["kl"] ** 0.5)
    assert [row["reward_version"] for row in rows] == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    labels = [row["labels"] for row in rows]
    assert labels[0] >= 48
    assert labels == sorted(labels)


def test_the_store_records_versions_samples_and_labels(batched: tuple[Path, Store]) -> None:
    store = batched[1]
    policies, rewards = store.versions("policy"), store.versions("reward")
    assert [version.number for version in rewards] == [1, 2, 3]
    assert [version.step for version in rewards] == [0, 3, 6]
    assert [(version.number, version.step) for version in policies] == [(0, 0), (1, 3), (2, 6)]
    assert [version.last_event for version in policies] == [0, rewards[0].last_event, rewards[1].last_event]
    assert 0.3 <= rewards[-1].figures["oob_accuracy"] <= 1  # of about sixteen pairs, some of equal length
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
    assert {one.name for one in ANNOTATORS.read(store) or []} == {"simulated-1", "simulated-2", "simulated-3"}
    assert (FORECAST.read(store) or AccuracyForecast()).labels >= 64
    assert set(store.get(SELECTION.key)) == {"chosen", "random"}
    assert (STATUS.read(store) or Status()).state == "stopped"


def test_a_batched_session_waits_for_people_and_replaces_skipped_questions(policy: str, tmp_path: Path) -> None:
    with Store(tmp_path / "store.db", seed=1) as store:
        session = make_session(policy, tmp_path, store, labeler=People(), initial_labels=12, labels=12, updates=1)
        stopped = threading.Event()

        def ann() -> None:
            while not stopped.wait(0.01):
                for question in store.ask("ann"):
                    if question.id % 2:
                        store.skip(question.id, "ann", token=f"{question.id}")
                    else:
                        store.add_label(question.id, "ann", token=f"{question.id}", choice="a")

        person = threading.Thread(target=ann)
        person.start()
        try:
            assert session.run() == "done"
        finally:
            stopped.set()
            person.join()
        assert len([one for one in store.labels() if one.event_id <= store.versions("reward")[0].last_event]) >= 12
        assert store.metrics()[0]["labels"] >= 12


def test_a_session_leaves_models_that_transformers_opens(batched: tuple[Path, Store]) -> None:
    folder = batched[0]
    assert AutoModelForCausalLM.from_pretrained(folder / "model").config.n_layer == 2
    assert AutoModelForSequenceClassification.from_pretrained(folder / "reward_model").config.num_labels == 3
    assert not list(folder.glob(".*"))


@pytest.mark.slow
def test_the_same_seed_is_the_same_session_and_it_can_be_stopped(
    batched: tuple[Path, Store], policy: str, tmp_path: Path
) -> None:
    expected = batched[1].metrics()
    with Store(tmp_path / "store.db", seed=1) as store:

        def press(row: dict[str, Any]) -> None:
            if row["step"] == 4:
                session.stop_signal.stop()  # as the red button does, which is looked at twice a second

        session = make_session(policy, tmp_path, store, held_out_members=2, on_update=press)
        assert session.run() == "stopped"
        assert store.metrics() == expected[:4]
        assert (STATUS.read(store) or Status()).state == "stopped"


def test_the_asynchronous_loop_learns_while_people_answer_and_another_process_refits(
    policy: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Store(tmp_path / "store.db") as store:
        scores: list[float] = []

        def enough(row: dict[str, Any]) -> None:
            """How many updates fit between two refits depends on the machine, so the number of updates is not fixed."""
            scores.append(row["gold"])
            if row["reward_version"] >= 2 and row["step"] >= 8 and sum(scores[-3:]) / 3 > 0.3:
                session.stop_signal.stop()

        settings = {"mode": "async", "labels": None, "updates": 1000, "version_every": 50}
        session = make_session(policy, tmp_path, store, pace=0.05, on_update=enough, **settings)
        assert session.run() == "stopped"
        rows = store.metrics()
        assert sum(row["gold"] for row in rows[-3:]) / 3 > 0.3
        assert rows[-1]["labels"] > rows[0]["labels"]  # labels came while the policy learned
        versions = store.versions("reward")
        assert versions[-1].labels > versions[0].labels
        assert HEARTBEAT.read(store)
    assert "restarted" not in caplog.text
    assert session.refit_process is not None
    assert session.refit_process._process is None  # and it is gone


@pytest.mark.slow
def test_no_more_questions_are_labelled_than_are_due(policy: str, tmp_path: Path) -> None:
    with Store(tmp_path / "store.db", seed=1) as store:
        assert make_session(policy, tmp_path, store, mode="async", updates=12).run() == "done"
        rows, schedule = store.metrics(), LabelSchedule(initial=48, total=96, decay=50)
        assert store.versions("reward")[0].labels == 48  # though annotators who take no time waited for it
        assert all(row["labels"] <= schedule.due(row["step"], 12) for row in rows)
        assert 48 < store.label_count() <= 96


def test_the_red_button_stops_a_session_and_the_next_one_goes_on(policy: str, tmp_path: Path) -> None:
    with Store(tmp_path / "store.db", seed=1) as store:

        def press(row: dict[str, Any]) -> None:
            if row["step"] == 2:
                STOP.write(store, StopRequest(by="ann"))
                session.stop_signal.wait(60)

        session = make_session(policy, tmp_path, store, on_update=press)
        assert session.run() == "stopped"
        stopped = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
        labels = store.label_count()
        again = make_session(policy, tmp_path, store, updates=4)
        assert again.run() == "done"
        assert STOP.read(store) is None
        assert store.label_count() >= labels
        rows, rewards = store.metrics(), store.versions("reward")
        assert [row["step"] for row in rows] == [1, 2, 3, 4]
        assert [(version.number, version.step) for version in rewards] == [(1, 0), (2, 3)]
        assert [version.last_event for version in store.versions("policy")] == [0, rewards[0].last_event]
        assert rows[2]["kl"] > rows[1]["kl"] / 2 > 0.005  # the policy is not the start again
        assert [version.number for version in store.versions("reward")][-1] == rows[3]["reward_version"] == 2
    gone_on = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    assert any(not torch.equal(stopped[name], gone_on[name]) for name in stopped)


class Killed(BaseException):
    """Nothing catches it, so nothing is saved: what is on the disk is what a kill leaves."""


def test_after_a_kill_a_session_goes_on_from_its_checkpoint_and_no_label_is_lost(policy: str, tmp_path: Path) -> None:
    with Store(tmp_path / "store.db", seed=1) as store:

        def kill(row: dict[str, Any]) -> None:
            if row["step"] == 5:
                raise Killed

        with pytest.raises(Killed):
            make_session(policy, tmp_path, store, save_every=2, on_update=kill).run()
        labels = [one.event_id for one in store.labels()]
        assert not (tmp_path / "model").exists()
        (tmp_path / "rewards" / ".version-3.tmp").mkdir()  # half of a reward model
        again = make_session(policy, tmp_path, store, save_every=2, updates=6)
        assert again.run() == "done"
        assert [row["step"] for row in store.metrics()] == [1, 2, 3, 4, 5, 6]
        assert [one.event_id for one in store.labels()][: len(labels)] == labels
        once = {one.comparison_id: one.comparison for one in store.labels() if one.comparison.repeat_of is None}
        asked = [(one.prompt, frozenset(one.responses)) for one in once.values()]
        assert len(set(asked)) == len(asked)  # what was asked after the checkpoint is not asked again
    AutoModelForCausalLM.from_pretrained(tmp_path / "model")


def test_a_store_of_another_policy_is_refused(
    policy: str, make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    with Store(tmp_path / "store.db") as store:
        make_session(policy, tmp_path, store)
        make_model("gpt2", seed=5).save_pretrained(tmp_path / "other")
        tokenizer.save_pretrained(tmp_path / "other")
        with pytest.raises(CheckpointError, match=r"^The store .* another policy"):
            make_session(str(tmp_path / "other"), tmp_path / "run", store)


@pytest.mark.slow
def test_an_alarm_rolls_back_to_the_best_version_that_is_no_reason_for_it(policy: str, tmp_path: Path) -> None:
    """Responses become shorter, as annotators like them, and less than 1/1.6 of the length is told to be too short."""
    with Store(tmp_path / "store.db", seed=1) as store:
        restored: list[int] = []
        ratios: list[float] = []

        def watch(row: dict[str, Any]) -> None:
            if store.alarms() and row["step"] >= store.alarms()[0].step + 10:
                session.stop_signal.stop()

        def restore(number: int) -> None:
            restored.append(number)
            ratios.append(session.versions.figures(number)["length_ratio"])
            plain(number)

        alarms = ["length_ratio=1.6:roll_back", "ensemble_std=off"]
        settings = {"alarms": alarms, "version_every": 1, "updates": 100}
        session = make_session(policy, tmp_path, store, on_update=watch, **settings)
        plain, session.versions.restore = session.versions.restore, restore  # type: ignore[method-assign]
        session.run()
        raised = store.alarms()
        assert {(alarm.name, alarm.action) for alarm in raised} == {("length_ratio", "roll_back")}
        assert all(1 / 1.6 < ratio < 1.6 for ratio in ratios)
        coefficients = [session.config.init_kl_coef * 2 ** (i + 1) for i in range(len(raised))]
        assert session.trainer.kl_coef == coefficients[-1]
        for alarm, number, coefficient in zip(raised, restored, coefficients, strict=True):
            assert alarm.message.endswith(f"back at version {number}; the KL coefficient is {coefficient:g} now.")
        samples, versions = store.samples(), store.versions("policy")
        again = {one.number: int(one.figures["back_at"]) for one in versions if "back_at" in one.figures}
        assert list(again.values()) in (restored, restored[:-1])  # the stop may come before the last version is made
        assert all(samples[made] == samples[number] for made, number in again.items())


def test_a_reward_of_the_wrong_sign_stops_the_loop_before_it_is_used(
    policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = RewardModel.score
    with Store(tmp_path / "store.db", seed=1) as store:
        with monkeypatch.context() as wrong:
            wrong.setattr(RewardModel, "score", lambda self, prompts, responses: -right(self, prompts, responses))
            assert make_session(policy, tmp_path, store).run() == "stopped"
            (alarm,) = store.alarms()
            assert (alarm.name, alarm.step, alarm.action) == ("reward_sign", 0, "stop")
            assert store.metrics() == []
            assert make_session(policy, tmp_path, store).run() == "stopped"
            assert len(store.versions("reward")) == 2  # the same command waits for the next one, which is as wrong
        assert make_session(policy, tmp_path, store, updates=1).run() == "done"
