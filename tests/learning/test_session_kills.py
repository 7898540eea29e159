"""A batched session that is killed and continued ends, bit for bit, as one that was never disturbed."""

import random
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from safetensors.torch import load_file
from session_world import make_session, policy_folder

from deep_rlhf.errors import StoreUnavailable
from deep_rlhf.feedback.store import Store

# Long enough for two refits; blind pairs, repeats, overlaps, versions between refits and a roll-back all occur.
SETTINGS: dict[str, Any] = {
    **{"updates": 4, "batched_updates": 2, "save_every": 3, "version_every": 1, "initial_labels": 16, "labels": 44},
    **{"win_rate_share": 0.2, "repeat_share": 0.2, "overlap_share": 0.5, "held_out_members": 2, "batch_size": 16},
    **{"mini_batch_size": 16, "alarms": ["length_ratio=1.02:roll_back"], "samples_per_prompt": 3},
}


class Killed(BaseException):
    """Nothing catches it, so nothing is saved: what is on the disk is what a kill leaves."""


def finish(policy: str, folder: Path) -> None:
    with Store(folder / "store.db", seed=1) as store:
        assert make_session(policy, folder, store, **SETTINGS).run() == "done"


def end_state(folder: Path) -> dict[str, Any]:
    """What a run leaves, without times."""
    with Store(folder / "store.db", seed=1) as store:
        labels = [
            (one.event_id, one.comparison_id, one.annotator, one.choice, one.comparison) for one in store.labels()
        ]
        rows = [{name: value for name, value in row.items() if name != "id"} for row in store.metrics()]
        alarms = [(one.name, one.step, one.action, one.message) for one in store.alarms()]
        versions = [
            (one.number, one.step, one.labels, one.last_event, {**one.figures, "seconds": 0})
            for kind in ("policy", "reward")
            for one in store.versions(kind)  # type: ignore[arg-type]
        ]
        state = {"labels": labels, "rows": rows, "alarms": alarms, "versions": versions, "samples": store.samples()}
    snapshots = sorted(path.name for path in (folder / "versions").iterdir())
    rewards = sorted(path.name for path in (folder / "rewards").glob("version-*"))
    return state | {"snapshots": snapshots, "rewards": rewards}


def assert_same(found: Path, expected: Path) -> None:
    ours, theirs = end_state(found), end_state(expected)
    for name, value in theirs.items():
        assert ours[name] == value, name
    for model in ("model", "reward_model"):
        weights, right = (load_file(folder / model / "model.safetensors") for folder in (found, expected))
        assert all(torch.equal(weights[name], right[name]) for name in right), model


@pytest.fixture(scope="module")
def policy(make_model: Callable[..., Any], tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    return policy_folder(make_model, tokenizer, tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def undisturbed(policy: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    finish(policy, folder)
    return folder


def test_the_undisturbed_run_shows_everything_that_a_kill_could_spoil(undisturbed: Path) -> None:
    state = end_state(undisturbed)
    assert {one[4].why_selected for one in state["labels"]} >= {"initial", "random", "variance", "repeat", "win_rate"}
    assert {one[4].overlap for one in state["labels"]} == {1, 2}
    assert {alarm[2] for alarm in state["alarms"]} >= {"roll_back"}
    assert [row["step"] for row in state["rows"]] == [1, 2, 3, 4]
    assert len(state["rewards"]) == 2


def killed_in_write(policy: str, folder: Path, write: int) -> bool:
    """Runs a session until it has written to the store `write` times, or to its end; whether it was killed."""
    with Store(folder / "store.db", seed=1) as store:
        plain, count = store._database.write, 0

        def counted(work: Any) -> Any:
            nonlocal count
            if threading.current_thread() is threading.main_thread():
                count += 1
                if count > write:
                    raise Killed
            return plain(work)

        session = make_session(policy, folder, store, **SETTINGS)
        store._database.write = counted  # type: ignore[method-assign]
        try:
            session.run()
        except Killed:
            return True
        return False


def test_a_session_that_is_killed_again_and_again_ends_as_one_that_never_was(
    policy: str, undisturbed: Path, tmp_path: Path
) -> None:
    rng = random.Random(1)
    kills = 0
    while killed_in_write(policy, tmp_path, rng.randrange(20, 110)):
        kills += 1
    assert kills >= 2
    assert_same(tmp_path, undisturbed)


def test_neither_a_fault_of_the_database_nor_the_stop_button_spoils_a_roll_back(
    policy: str, undisturbed: Path, tmp_path: Path
) -> None:
    """The alarm is stored though the database says that it is not; then the stop comes while the policy is sampled."""
    with Store(tmp_path / "store.db", seed=1) as store:
        session = make_session(policy, tmp_path, store, **SETTINGS)
        plain_alarm, plain_add, faults = store.add_alarm, session.versions.add, []

        def fault(alarm: Any) -> int:
            number = plain_alarm(alarm)
            if not faults:
                faults.append(alarm)
                raise StoreUnavailable("The store does not answer.")
            return number

        def stop(*arguments: Any) -> Any:
            if session.progress.restored is not None:
                session.stop_signal.stop()
            return plain_add(*arguments)

        store.add_alarm, session.versions.add = fault, stop  # type: ignore[method-assign]
        assert session.run() == "stopped"
        assert faults
        assert session.progress.rolled_back == len(store.alarms()) == 1
        assert session.trainer.kl_coef == 2 * session.config.init_kl_coef
    finish(policy, tmp_path)
    assert_same(tmp_path, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_many_sessions_that_are_killed(seed: int, policy: str, undisturbed: Path, tmp_path: Path) -> None:
    rng = random.Random(f"many {seed}")
    while killed_in_write(policy, tmp_path, int(rng.expovariate(1 / 60)) + 8):
        pass
    assert_same(tmp_path, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["before", "after"])
def test_kills_beside_every_checkpoint(place: str, policy: str, undisturbed: Path, tmp_path: Path) -> None:
    done: set[tuple[Any, ...]] = set()
    while True:
        with Store(tmp_path / "store.db", seed=1) as store:
            session = make_session(policy, tmp_path, store, **SETTINGS)
            plain = session._checkpoint

            def kill() -> None:
                kind = (session.progress.step, session.progress.rolled_back, session.progress.restored)  # noqa: B023
                if place == "after":
                    plain()  # noqa: B023
                if kind not in done:
                    done.add(kind)
                    raise Killed
                if place == "before":
                    plain()  # noqa: B023

            session._checkpoint = kill  # type: ignore[method-assign]
            try:
                session.run()
                break
            except Killed:
                continue
    assert len(done) >= 5
    assert_same(tmp_path, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_real_kills(seed: int, policy: str, undisturbed: Path, tmp_path: Path) -> None:
    rng, code = random.Random(f"real {seed}"), -signal.SIGKILL
    while code == -signal.SIGKILL:
        process = processes.start(finish, policy, tmp_path, log=tmp_path / "log.txt")
        process.join(rng.uniform(2, 8))
        process.kill()
        code = processes.ending(process, tmp_path / "log.txt")
    assert code == 0
    assert_same(tmp_path, undisturbed)
