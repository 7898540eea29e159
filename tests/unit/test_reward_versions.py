"""When the reward model is fitted again, where its versions are, and what happens when its process dies."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from facts import assert_names

from deep_rlhf.errors import NotFiniteError, ResourceError
from deep_rlhf.feedback.records import Comparison
from deep_rlhf.feedback.reward_refit import supervisor
from deep_rlhf.feedback.reward_refit.ensemble import RewardFit
from deep_rlhf.feedback.reward_refit.preferences import training_preferences
from deep_rlhf.feedback.reward_refit.supervisor import RefitProcess
from deep_rlhf.feedback.reward_refit.versions import (
    RefitJob,
    Refits,
    Refitted,
    newest_version,
    start_responses,
    write_start_responses,
)
from deep_rlhf.feedback.store import Store

JOB = RefitJob(policy="nowhere", initial_labels=20, refit_after=8, refit_growth=0.1, settings={}, held_out_members=0)


class Counting:
    """A store of which nothing matters but how many labels it has."""

    labels = 0

    def label_count(self) -> int:
        return self.labels


def write_version(folder: Path, number: int, **changed: Any) -> None:
    path = folder / f"version-{number}"
    path.mkdir()
    values = {"number": number, "labels": 10 * number, "last_event": 11 * number, "figures": {"accuracy": 0.5}}
    (path / "version.json").write_text(json.dumps(values | changed))


def test_a_refit_is_due_after_enough_new_labels(tmp_path: Path) -> None:
    store = Counting()
    refits = Refits(JOB, tmp_path, store)  # type: ignore[arg-type]

    def due(labels: int) -> bool:
        store.labels = labels
        return refits.due()

    assert [due(labels) for labels in (0, 19, 20)] == [False, False, True]
    refits.newest = Refitted(number=1, labels=20, last_event=25)
    assert [due(labels) for labels in (20, 27, 28)] == [False, False, True]
    refits.newest = Refitted(number=9, labels=201, last_event=225)
    assert [due(labels) for labels in (210, 221, 222)] == [False, False, True]  # a tenth of 201, rounded up


def test_the_newest_complete_version_is_found(tmp_path: Path) -> None:
    assert newest_version(tmp_path) is None
    for number in (2, 9, 10):
        write_version(tmp_path, number)
    (tmp_path / "version-11").mkdir()  # nothing is in it
    (tmp_path / ".version-12.tmp").mkdir()
    found = newest_version(tmp_path)
    assert found is not None
    assert (found.number, found.labels, found.last_event) == (10, 100, 110)
    assert found.path == tmp_path / "version-10"
    assert Refits(JOB, tmp_path, Counting()).newest == found  # type: ignore[arg-type]


def test_start_responses_are_kept(tmp_path: Path) -> None:
    assert start_responses(tmp_path) is None
    write_start_responses(tmp_path, [("p", "é"), ("q", "b")])
    assert start_responses(tmp_path) == [("p", "é"), ("q", "b")]


def test_each_label_is_learned_once_and_labels_for_measuring_never(tmp_path: Path) -> None:
    pair = Comparison(prompt="p", responses=("x", "y"), overlap=2)
    ranking = Comparison(prompt="p", responses=("x", "y", "z"))
    blind = Comparison(prompt="p", responses=("now", "start"), why_selected="win_rate", writers=(1, 0))
    gold = Comparison(prompt="p", responses=("good", "bad"), why_selected="gold", expected="a")
    with Store(tmp_path / "labels.db", seed=1) as store:
        both, ranked, *_ = store.add([pair, ranking, blind, gold])
        for person in ("ann", "bob"):
            for question in store.ask(person, count=4):
                of_three = len(question.comparison.responses) == 3
                given = {"ranks": (1, 2, 3)} if of_three else {"choice": "a" if person == "ann" else "b"}
                store.add_label(question.id, person, token=f"{person} {question.id}", **given)
        preferences, source = training_preferences(store.labels())
    assert [(one.a, one.b, one.mu) for one in preferences if source[one.id].comparison_id == both] == [
        ("x", "y", 1.0),
        ("x", "y", 0.0),
    ]
    assert [source[one.id].annotator for one in preferences if source[one.id].comparison_id == ranked] == ["ann"] * 3
    assert len(preferences) == len({one.id for one in preferences}) == len(source) == 5


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """program(code): runs in the place of Python, with the arguments and the input that it would have got."""

    def make(code: str) -> None:
        path = tmp_path / "python"
        path.write_text(f"#!{sys.executable} -S\nimport os, sys\n{code}\n")
        path.chmod(0o755)
        monkeypatch.setattr(supervisor.sys, "executable", str(path))

    return make


def waited(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_process_that_dies_is_started_again_and_the_log_says_so(
    program: Callable[[str], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(supervisor, "PAUSES", (0.0, 0.6))
    program("print('out of luck', flush=True); sys.exit(3)")
    process = RefitProcess(JOB, tmp_path, "labels.db")
    with pytest.raises(ResourceError, match=r"\b3 times.* code 3\b.*refits\.log"):
        waited(lambda: process.poll(0))
    assert caplog.text.count("ended with code 3") == 2
    assert [line.count("in 1 seconds") for line in caplog.messages] == [0, 1]  # the first restart is immediate
    assert all(str(tmp_path / "refits.log") in line for line in caplog.messages)
    assert (tmp_path / "refits.log").read_text() == "out of luck\n" * 3
    process.stop()


def test_a_version_is_given_until_it_is_used_and_the_process_ends_with_its_input(
    program: Callable[[str], None], tmp_path: Path
) -> None:
    program(
        "os.write(1, sys.stdin.buffer.readline()); open(f'{sys.argv[-1]}/ready', 'w').close();"
        "sys.stdin.buffer.read(); open(f'{sys.argv[-1]}/ended', 'w').close()"
    )
    write_version(tmp_path, 1)
    process = RefitProcess(JOB, tmp_path, "postgresql://ann:secret@host/db")
    assert process.poll(1) is None
    write_version(tmp_path, 2)
    for _ in range(2):  # whoever uses it may be hindered
        found = process.poll(1)
        assert found is not None
        assert found.number == 2
    assert process.poll(2) is None
    waited(lambda: (tmp_path / "ready").exists())
    assert (tmp_path / "refits.log").read_text() == "postgresql://ann:secret@host/db\n"
    assert "secret" not in (tmp_path / "job.json").read_text()
    assert process._process is not None
    assert process._process.stdin is not None
    process._process.stdin.close()  # as when whoever started it dies
    waited(lambda: (tmp_path / "ended").exists())
    process.stop()
    assert process._process is None


def test_a_refit_that_fails_is_told_once_and_its_process_lives(
    program: Callable[[str], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    program("sys.stdin.buffer.read()")
    process = RefitProcess(JOB, tmp_path, "labels.db")
    (tmp_path / "failure.json").write_text(json.dumps({"reason": "Update 3, whose loss is nan."}))
    assert process.poll(4) is None
    assert process.poll(4) is None
    assert len(caplog.messages) == 1
    assert_names(caplog.messages[0], "Update 3", "Version 4")
    process.stop()


def test_after_a_failed_refit_the_next_one_continues_from_the_newest_version(tmp_path: Path) -> None:
    """What the failed one has changed in memory is forgotten."""
    with Store(tmp_path / "labels.db") as store:
        refits = Refits(JOB, tmp_path, store)
        refits._fit = refits._held_out = cast(RewardFit, SimpleNamespace(fit=_fails))
        with pytest.raises(NotFiniteError):
            refits.run()
    assert refits._fit is None
    assert refits._held_out is None


def _fails(*_: Any, **__: Any) -> None:
    raise NotFiniteError("the loss is nan")


def test_a_label_that_is_counted_is_learned_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A label arrives as soon as the refit has read anything."""
    learned: list[Any] = []

    def fit(preferences: list[Any], **_: Any) -> Any:
        learned.extend(preferences)
        numbers = dict.fromkeys(("train_loss", "oob_loss", "ratio", "weight_decay", "accuracy", "seconds"), 1.0)
        return SimpleNamespace(**numbers, oob_accuracy=[1.0], predictions={})

    with Store(tmp_path / "labels.db", seed=1) as store:
        store.add([Comparison(prompt="p", responses=("x", f"y{i}")) for i in range(9)])

        def answer() -> None:
            (question,) = store.ask("ann")
            store.add_label(question.id, "ann", token=str(question.id), choice="a")

        plain = store._database.read

        def read(work: Any) -> Any:
            found = plain(work)
            monkeypatch.setattr(store._database, "read", plain)
            answer()
            monkeypatch.setattr(store._database, "read", read)
            return found

        answer()
        answer()
        refits = Refits(JOB, tmp_path, store)
        state = SimpleNamespace(history=[])
        refits._fit = cast(RewardFit, SimpleNamespace(fit=fit, save=lambda folder: folder.mkdir(), state=state))
        monkeypatch.setattr(store._database, "read", read)
        version = refits.run()
        monkeypatch.setattr(store._database, "read", plain)
        events = {int(pair.id.split("-")[0]) for pair in learned}
        assert version.labels == len(learned) == len([one for one in store.labels() if one.event_id in events])
        assert version.last_event == max(events)
        assert store.label_count() > version.labels
