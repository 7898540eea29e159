"""A session without its database, with other settings than before, and with damaged files in its folder."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from facts import assert_names
from session_world import HONEST, SETTINGS, brevity, make_session, policy_folder

from deep_rlhf.cli.loop_config import LoopConfig, run_folder_errors
from deep_rlhf.errors import CheckpointError, DataError, NotFiniteError, ResourceError, StoreUnavailable, UserError
from deep_rlhf.feedback.annotators.simulated import SimulatedLabeler
from deep_rlhf.feedback.loop import session as session_module
from deep_rlhf.feedback.loop.config import KEPT_SETTINGS, SessionConfig
from deep_rlhf.feedback.loop.session import Session
from deep_rlhf.feedback.reward_refit.supervisor import RefitProcess
from deep_rlhf.feedback.reward_refit.versions import Refits, Refitted, newest_version, start_responses
from deep_rlhf.feedback.store import Store
from deep_rlhf.runtime.run_directory import write_summary

SHORT: dict[str, Any] = {"updates": 2, "batched_updates": 1, "initial_labels": 16, "labels": 24, "batch_size": 16}
SHORT |= {"mini_batch_size": 16, "ppo_epochs": 1, "save_every": 1}


@pytest.fixture(scope="module")
def policy(make_model: Callable[..., Any], tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    return policy_folder(make_model, tokenizer, tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def finished(policy: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    with Store(folder / "store.db", seed=1) as store:
        assert make_session(policy, folder, store, **SHORT).run() == "done"
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to continue or to damage."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def again(policy: str, folder: Path, store: Store, **settings: Any) -> Session:
    return make_session(policy, folder, store, **(SHORT | {"updates": 3} | settings))


# ---- without the database


class RefitsHere:
    """Refits in this process, in the place of RefitProcess."""

    def __init__(self, job: Any, folder: Path, store_url: str, *, threads: int) -> None:
        self.store = Store(store_url)
        self.refits = Refits(job, folder, self.store)

    def poll(self, known: int) -> Any:
        try:
            if self.refits.newest is None and self.refits.due():
                self.refits.run()
        except StoreUnavailable:
            return None
        newest = self.refits.newest
        return newest if newest is not None and newest.number > known else None

    def stop(self) -> None:
        self.store.close()


def test_the_policy_learns_on_while_the_database_is_away_and_then_catches_up(
    policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "RefitProcess", RefitsHere)
    with Store(tmp_path / "store.db", seed=1) as store:
        database = store._database
        plain = database._with_retries
        calls: list[int] = []

        def away(transaction: Any) -> Any:
            calls.append(1)
            raise StoreUnavailable("The store does not answer.")

        def toggle(row: dict[str, Any]) -> None:
            if row["step"] in (2, 22):
                database._with_retries = away if row["step"] == 2 else plain  # type: ignore[method-assign]

        settings = SHORT | {
            "mode": "async",
            "labels": None,
            "updates": 24,
            "version_every": 5,
            "alarms": ["kl=-1:warn"],
        }
        session = make_session(policy, tmp_path, store, on_update=toggle, **settings)
        assert session.run() == "done"
        assert calls
        assert [row["step"] for row in store.metrics()] == list(range(1, 25))
        policies = store.versions("policy")
        assert [version.number for version in policies] == list(range(len(policies)))
        assert len(policies) >= 4
        assert set(store.samples()) == {version.number for version in policies}
        assert [alarm.name for alarm in store.alarms()].count("kl") == 1


# ---- with other settings

# The settings that may change, each with another value and with where its effect is found.
APPLIED: dict[str, tuple[Any, Callable[[Session], Any]]] = {
    "updates": (5, lambda one: one.trainer.updates),
    "labels": (33, lambda one: one.collector._schedule.total),  # type: ignore[union-attr]
    "label_decay": (7.0, lambda one: one.collector._schedule.decay),  # type: ignore[union-attr]
    **{
        name: (value, lambda one, name=name: getattr(one.collector._questions.config, name))
        for name, value in {
            **{"questions_ahead": 5, "choose_by": "random", "random_share": 0.5, "samples_per_prompt": 6},
            **{"ranked_responses": 3, "win_rate_share": 0.1, "repeat_share": 0.1, "overlap_share": 0.2},
            **{"gold_questions": "gold.jsonl", "gold_share": 0.2},
        }.items()
    },
    "label_noise": (0.2, lambda one: one.refit_job.settings["label_noise"]),
    "refit_after": (3, lambda one: one.refit_job.refit_after),
    "refit_growth": (0.3, lambda one: one.refit_job.refit_growth),
    "reward_learning_rate": (1e-4, lambda one: one.refit_job.settings["learning_rate"]),
    "reward_batch_size": (4, lambda one: one.refit_job.settings["batch_size"]),
    "batch_size": (12, lambda one: one.trainer.config.batch_size),
    "mini_batch_size": (6, lambda one: one.trainer.config.mini_batch_size),
    "ppo_epochs": (3, lambda one: one.trainer.config.ppo_epochs),
    "learning_rate": (1e-3, lambda one: one.trainer.learner.optimisation.learning_rate),  # type: ignore[attr-defined]
    "init_kl_coef": (0.4, lambda one: one.trainer.kl_coef),
    "temperature": (0.9, lambda one: one.trainer.config.temperature),
    "alarms": (["kl=20:stop"], lambda one: ["kl=20:stop"] if one.monitor.tracker.limits.kl.limit == 20 else []),
    **{
        name: (value, lambda one, name=name: getattr(one.config, name))
        for name, value in {
            **{"version_every": 3, "save_every": 2, "mode": "async", "batched_updates": 7, "pace": 1.0, "threads": 2},
        }.items()
    },
}
# What `deep-rlhf loop` adds: it names the run, or its texts, or decides who labels from now on.
FLAGS = {"model", "prompts", "prompts_split", "prompts_column", "store", "output_dir", "labeler", "annotators", "taste"}


def test_every_setting_may_change_or_is_kept() -> None:
    settings = {field.name for field in dataclasses.fields(SessionConfig)}
    assert settings == {*APPLIED, *KEPT_SETTINGS, "initial_labels"}
    assert {field.name for field in dataclasses.fields(LoopConfig)} == settings | FLAGS


def test_a_setting_that_may_change_is_applied(policy: str, folder: Path) -> None:
    gold = folder / "gold.jsonl"
    gold.write_text('{"prompt": "p", "a": "x", "b": "y", "expected": "a"}\n')
    values = {name: value for name, (value, _) in APPLIED.items()} | {"gold_questions": str(gold)}
    with Store(folder / "store.db", seed=1) as store:
        session = again(policy, folder, store, **values)
        session.begin()
        found = {name: effect(session) for name, (_, effect) in APPLIED.items()}
        assert found == values
        groups = session.trainer.learner.optimisation.adam.param_groups  # type: ignore[attr-defined]
        assert {group["lr"] for group in groups} == {1e-3}
        session.versions.restore(0)  # as a roll-back does
        session._apply_settings()
        assert {group["lr"] for group in groups} == {1e-3}
        assert session.trainer.kl_coef == 0.4


def test_a_setting_that_must_be_kept_is_refused_with_both_values(policy: str, folder: Path) -> None:
    other = {"seed": 2, "members": 5, "held_out_members": 2, "template": "hh", "max_new_tokens": 9}
    other |= {"max_prompt_length": 41, "fixed_prompts": 1, "initial_labels": 17}
    assert set(other) == {*KEPT_SETTINGS, "initial_labels"}
    begun = SETTINGS | SHORT
    with Store(folder / "store.db", seed=1) as store:
        with pytest.raises(CheckpointError) as refused:
            again(policy, folder, store, **other)
        for name, value in other.items():
            assert_names(refused.value, name, repr(begun[name]), repr(value))
        before = store.metrics()
        assert again(policy, folder, store).run() == "done"  # nothing was lost
        assert store.metrics()[: len(before)] == before


def test_other_prompts_are_refused(policy: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("session_world.PROMPTS", ["the cat sees", "red"])
    with Store(folder / "store.db", seed=1) as store, pytest.raises(CheckpointError, match="prompts"):
        again(policy, folder, store)


# ---- with damaged files


def test_another_store_is_refused(policy: str, folder: Path) -> None:
    with Store(folder / "other.db", seed=1) as store, pytest.raises(CheckpointError) as told:
        again(policy, folder, store)
    assert_names(told.value, "other.db", str(folder), "--store", "--output_dir")


# ---- a refit that fails


def test_a_batched_loop_goes_on_with_the_reward_model_before_a_refit_that_is_not_finite(
    policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain = Refits.version_after

    def not_finite_at_first(failing: int, refits: Refits, known: int) -> Refitted:
        if known == failing:
            raise NotFiniteError("The loss is nan.")
        return plain(refits, known)

    with Store(tmp_path / "store.db", seed=1) as store:
        monkeypatch.setattr(Refits, "version_after", lambda refits, known: not_finite_at_first(1, refits, known))
        assert make_session(policy, tmp_path / "run", store, **SHORT).run() == "done"
        assert [row["reward_version"] for row in store.metrics()] == [1, 1]
        assert [version.number for version in store.versions("reward")] == [1]
    assert_names(caplog.text, "version 1", "nan")
    with Store(tmp_path / "first.db", seed=1) as store:
        monkeypatch.setattr(Refits, "version_after", lambda refits, known: not_finite_at_first(0, refits, known))
        with pytest.raises(NotFiniteError):
            make_session(policy, tmp_path / "first", store, **SHORT).run()
        assert store.metrics() == []


def test_bad_batches_are_counted_on_after_a_restart(policy: str, folder: Path) -> None:
    with Store(folder / "store.db", seed=1) as store:
        first = again(policy, folder, store)
        first.begin()
        first.trainer.bad_batches, first.trainer.bad_in_a_row = 3, 2
        first._checkpoint()
        second = again(policy, folder, store)
        second.begin()
        assert (second.trainer.bad_batches, second.trainer.bad_in_a_row) == (3, 2)


# ---- damaged files


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"responses": []}', b'{"responses": [[1, 2]]}', b"\xff\xfe"])
def test_damaged_start_responses_count_as_missing(
    content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "start_responses.json").write_bytes(content)
    assert start_responses(tmp_path) is None
    assert str(tmp_path / "start_responses.json") in caplog.text


@pytest.mark.parametrize("content", [b"", b"[]", b'{"why": 1}', b"\xff"])
def test_a_damaged_note_of_a_failed_refit_is_still_told(
    content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "failure.json").write_bytes(content)
    RefitProcess._tell_failure(cast(RefitProcess, SimpleNamespace(folder=tmp_path)), 3)
    assert_names(caplog.text, str(tmp_path / "refits.log"), "Version 3")
    assert not (tmp_path / "failure.json").exists()


@pytest.mark.parametrize("name", ["job.json", "start_responses.json", "version.json"])
def test_a_folder_in_the_place_of_a_file_is_told(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    assert start_responses(tmp_path) is None
    with pytest.raises(ResourceError) as told, run_folder_errors():
        write_summary(tmp_path / name, {})
    assert_names(told.value, str(tmp_path / name))
    with pytest.raises(ResourceError) as told, run_folder_errors():
        (tmp_path / name).open("ab")
    assert_names(told.value, str(tmp_path / name))


def test_damaged_files_are_named_and_replaced_by_what_is_whole(
    policy: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    responses = start_responses(folder / "rewards")
    newest = newest_version(folder / "rewards")
    assert newest is not None
    flip(newest.path / "model.safetensors")
    empty(folder / "rewards" / "start_responses.json")
    empty(folder / "rewards" / "job.json")
    cut(folder / "versions" / "1" / "responses.json")
    cut(next((folder / "checkpoints" / "step-2").glob("*.safetensors")))
    with Store(folder / "store.db", seed=1) as store:
        assert again(policy, folder, store).run() == "done"
        assert [row["step"] for row in store.metrics()] == [1, 2, 3]
    for name in ("version-2", "start_responses.json", "responses.json", "step-2"):
        assert name in caplog.text, name
    assert (folder / "rewards" / "damaged-version-2").is_dir()
    assert start_responses(folder / "rewards") == responses


# ---- without a difference


def test_a_policy_that_always_writes_the_same_is_told(policy: str, tmp_path: Path) -> None:
    with Store(tmp_path / "store.db", seed=1) as store:
        session = make_session(policy, tmp_path, store, **(SHORT | {"temperature": 0.001}))
        with pytest.raises(DataError) as told:
            session.run()
    assert_names(told.value, "temperature", "0.001")


def test_annotators_who_never_decide_are_told(policy: str, tmp_path: Path) -> None:
    undecided = SimulatedLabeler(brevity, seed=1, habits=dataclasses.replace(HONEST, cant_tell_rate=1.0))
    with Store(tmp_path / "store.db", seed=1) as store:
        session = make_session(policy, tmp_path, store, labeler=undecided, **SHORT)
        with pytest.raises(UserError) as told:
            session.run()
    assert_names(told.value, "labels")
