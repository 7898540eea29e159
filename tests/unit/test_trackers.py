"""Trackers and the runtime that feeds them: one that cannot be used costs one clear line, never a training run."""

import importlib.util
import logging
import sys
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate.tracking import GeneralTracker
from accelerate.utils import ProjectConfiguration
from facts import assert_names

from deep_rlhf.errors import ConfigError, UserError
from deep_rlhf.runtime.processes import Runtime
from deep_rlhf.runtime.trackers import LOOP_TRACKERS, TRAINER_TRACKERS, usable_trackers


class FakeWandb(types.ModuleType):
    """Stands in for the wandb package: says whether there is a key, and records what is started."""

    def __init__(self, *, has_key: bool = True, trouble: str | None = None) -> None:
        super().__init__("wandb")
        self.run, self.started = None, []
        self.has_key, self.trouble = has_key, trouble

    def login(self, **options: Any) -> bool:
        return self.has_key

    def init(self, **options: Any) -> None:
        if self.trouble:
            raise RuntimeError(self.trouble)
        self.started.append(options)


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_MODE", "WANDB_PROJECT", "RANK"):
        monkeypatch.delenv(name, raising=False)
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "wandb" or real(name))


def use(monkeypatch: pytest.MonkeyPatch, fake: FakeWandb) -> FakeWandb:
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_none_and_an_empty_name_are_no_tracker() -> None:
    assert usable_trackers(["none", ""], run_name="x") == []


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert usable_trackers(["wandb"], run_name="x") == []
    (message,) = caplog.messages
    assert_names(message, "wandb", "not installed", "pip install 'deep-rlhf[wandb]'")


def test_wandb_without_a_key_is_left_out(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    fake = use(monkeypatch, FakeWandb(has_key=False))
    assert usable_trackers(["wandb"], run_name="x") == []
    assert fake.started == []
    (message,) = caplog.messages
    assert_names(message, "wandb", "no API key", "training continues")


def test_wandb_offline_needs_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    fake = use(monkeypatch, FakeWandb(has_key=False))
    assert usable_trackers(["wandb"], run_name="my run") == ["wandb"]
    assert fake.started == [{"project": "deep-rlhf", "name": "my run"}]


def test_wandb_gets_its_project_and_its_part_of_the_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "from-environment")
    fake = use(monkeypatch, FakeWandb())
    assert usable_trackers(["wandb"], run_name="x") == ["wandb"]
    arguments = {"wandb": {"tags": ["a"], "name": "better"}, "aim": {"repo": "y"}}
    usable_trackers(["wandb"], run_name="x", project="p", tracker_kwargs=arguments, known=LOOP_TRACKERS)
    assert fake.started == [
        {"project": "from-environment", "name": "x"},
        {"project": "p", "name": "better", "tags": ["a"]},
    ]


def test_wandb_offline_by_argument_needs_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeWandb(has_key=False))
    assert usable_trackers(["wandb"], run_name="x", tracker_kwargs={"wandb": {"mode": "offline"}}) == ["wandb"]


def test_wandb_in_trouble_is_left_out(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    use(monkeypatch, FakeWandb(trouble="no route\nto host"))
    with caplog.at_level(logging.WARNING):
        assert usable_trackers(["wandb"], run_name="x") == []
    (message,) = caplog.messages
    assert_names(message, "wandb", "no route to host", "training continues")


def test_only_the_main_process_starts_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    fake = use(monkeypatch, FakeWandb())
    assert usable_trackers(["wandb"], run_name="x") == ["wandb"]
    assert fake.started == []


@pytest.mark.parametrize(
    ("names", "options", "said"),
    [
        (["none", "wandbb"], {}, r"Unknown tracker 'wandbb': choose among .*tensorboard.*wandb"),
        (["neptune"], {"known": LOOP_TRACKERS}, "Unknown tracker 'neptune': choose among aim, clearml"),
        (["aim"], {}, "Unknown tracker 'aim'"),
        (["none"], {"tracker_kwargs": {"tags": ["a"]}}, "Unknown tracker 'tags'"),
        (["none"], {"tracker_kwargs": {"wandb": "a"}}, "must hold a dict of arguments for wandb, not 'a'"),
    ],
)
def test_an_invalid_tracker_is_refused(names: list[str], options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        usable_trackers(names, run_name="x", **options)


def test_every_known_tracker_passes_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for known in (LOOP_TRACKERS, TRAINER_TRACKERS):
        assert {"wandb", "tensorboard", "mlflow"} < set(known)
        assert "all" not in known
        assert usable_trackers(list(known), run_name="x", known=known) == []


# ---- the runtime


class Notebook(GeneralTracker):
    """A tracker of accelerate that remembers what it was given."""

    name = "notebook"
    requires_logging_directory = True
    made: "list[Notebook]"
    trouble: Exception | None

    def __init__(self, project: str, logging_dir: str, *, pages: int = 1) -> None:
        super().__init__()
        self.got: list[Any] = [project, logging_dir, pages]

    @property
    def tracker(self) -> "Notebook":
        return self

    def start(self) -> None:
        if self.trouble:
            raise self.trouble
        self.made.append(self)

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.got.append(values)

    def log(self, values: dict[str, float], step: int | None = None, **options: Any) -> None:
        self.got.append((values, step))

    def finish(self) -> None:
        self.got.append("finished")


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> type[Notebook]:
    from accelerate import tracking

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "notebook", Notebook)
    Notebook.made, Notebook.trouble = [], None
    return Notebook


@pytest.mark.parametrize(
    ("project_kwargs", "folder"),
    [(None, "runs"), ({"logging_dir": "a"}, "a"), ({"project_dir": "b"}, "b"), ({"total_limit": 2}, "runs")],
)
def test_a_tracker_gets_project_folder_settings_and_metrics(
    notebook: type[Notebook], project_kwargs: dict[str, Any] | None, folder: str
) -> None:
    runtime = Runtime(["notebook"], project_kwargs=project_kwargs)
    runtime.start_trackers("p", {"lr": 0.1, "nested": {}, "none": None}, {"notebook": {"pages": 3}})
    runtime.log({"score": 1.5}, 2)
    runtime.finish()
    assert [each.got for each in notebook.made] == [["p", folder, 3, {"lr": 0.1}, ({"score": 1.5}, 2), "finished"]]


def test_a_tracker_that_does_not_start_is_left_out(notebook: type[Notebook], caplog: pytest.LogCaptureFixture) -> None:
    notebook.trouble = OSError("no server")
    runtime = Runtime(["notebook"])
    runtime.start_trackers("p", {})
    runtime.log({"score": 1.5}, 2)
    runtime.finish()
    (message,) = caplog.messages
    assert_names(message, "tracker", "OSError: no server", "training goes on")


def test_arguments_that_a_tracker_refuses_are_told(notebook: type[Notebook]) -> None:
    with pytest.raises(UserError, match=r"tracker_kwargs.*TypeError.*'page'"):
        Runtime(["notebook"]).start_trackers("p", {}, {"notebook": {"page": 3}})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"project_kwargs": {"dir": "x"}},
            "project_kwargs takes no dir: leave it out, or give project_dir, logging_dir, automatic_checkpoint_naming,"
            " total_limit, iteration, save_on_each_node.",
        ),
        ({"accelerator_kwargs": {"mixed": "no", "cpus": 1}}, "accelerator_kwargs takes no cpus and no mixed: leave"),
        ({"accelerator_kwargs": {"log_with": "wandb"}}, "accelerator_kwargs takes no log_with"),
        (
            {"accelerator_kwargs": {"mixed_precision": "bf16"}},
            "accelerator_kwargs takes no mixed_precision: leave it out, use the setting precision for mixed_precision",
        ),
        ({"accelerator_kwargs": {"gradient_accumulation_steps": 3}}, "accelerator_kwargs takes no gradient_accum"),
        ({"accelerator_kwargs": {"kwargs_handlers": 3}}, "accelerate refuses accelerator_kwargs: "),
    ],
)
def test_arguments_that_accelerate_does_not_take_are_named(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Runtime(**options)
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


def test_supported_accelerator_arguments_take_effect(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    runtime = Runtime(accelerator_kwargs={"cpu": True, "project_dir": str(tmp_path)})
    assert runtime._accelerator.project_configuration == ProjectConfiguration(project_dir=str(tmp_path))
    assert caplog.messages == []


def test_one_process_agrees_with_itself() -> None:
    runtime = Runtime()
    assert (runtime.any(True), runtime.any(False)) == (True, False)
    runtime.wait()


# ---- the real ones


@pytest.fixture
def real_wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    wandb = pytest.importorskip("wandb")
    for name, value in (("MODE", "offline"), ("DIR", str(tmp_path)), ("SILENT", "true")):
        monkeypatch.setenv(f"WANDB_{name}", value)
    yield wandb
    wandb.teardown()


def test_a_run_of_wandb(real_wandb: Any, tmp_path: Path) -> None:
    arguments = {"wandb": {"tags": ["small"]}}
    names = usable_trackers(["wandb"], run_name="mine", project="p", tracker_kwargs=arguments, known=LOOP_TRACKERS)
    run = real_wandb.run
    assert (run.project, run.name, run.tags) == ("p", "mine", ("small",))
    runtime = Runtime(names)
    runtime.start_trackers("p", {"lr": 0.1}, arguments)
    runtime.log({"score": 1.5}, 1)
    assert real_wandb.run is run
    assert dict(run.config) == {"lr": 0.1}
    runtime.finish()
    assert real_wandb.run is None
    (record,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    deadline = time.monotonic() + 60  # wandb's own process writes the file, when it gets the time
    while b"score" not in record.read_bytes():
        assert time.monotonic() < deadline, "the score was never written"
        threading.Event().wait(0.05)


def test_arguments_that_wandb_refuses_are_told(real_wandb: Any) -> None:
    with pytest.raises(UserError, match=r"wandb.*tracker_kwargs.*'tagz'"):
        usable_trackers(["wandb"], run_name="x", tracker_kwargs={"wandb": {"tagz": []}})


def test_a_run_of_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    names = usable_trackers(["tensorboard"], run_name="x", known=LOOP_TRACKERS)
    runtime = Runtime(names, project_kwargs={"logging_dir": str(tmp_path)})
    runtime.start_trackers("p", {"lr": 0.1}, {"tensorboard": {"flush_secs": 5}})
    runtime.log({"score": 1.5}, 1)
    runtime.finish()
    (record,) = tmp_path.glob("p/events.out.tfevents.*")
    (point,) = EventAccumulator(str(record)).Reload().Scalars("score")
    assert (point.step, point.value) == (1, 1.5)
