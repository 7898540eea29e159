"""A tracker that cannot be used costs one clear line, never a training run."""

import importlib.util
import logging
import sys
import types
from typing import Any

import pytest

from deep_rlhf.runtime.trackers import usable_trackers
from deep_rlhf.types import UserError


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


def test_no_tracker_is_no_tracker() -> None:
    assert usable_trackers(["none", ""], run_name="x") == []


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert usable_trackers(["wandb"], run_name="x") == []
    assert caplog.messages == ["wandb is not installed (pip install wandb): training goes on without it."]


def test_wandb_without_a_key_is_left_out(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    fake = use(monkeypatch, FakeWandb(has_key=False))
    assert usable_trackers(["wandb"], run_name="x") == []
    assert fake.started == []
    assert len(caplog.messages) == 1
    assert "no API key: training goes on without it" in caplog.messages[0]


def test_wandb_offline_needs_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    fake = use(monkeypatch, FakeWandb(has_key=False))
    assert usable_trackers(["wandb"], run_name="my run") == ["wandb"]
    assert fake.started == [{"project": "deep-rlhf", "name": "my run"}]


def test_wandb_in_trouble_is_left_out(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    use(monkeypatch, FakeWandb(trouble="no route\nto host"))
    with caplog.at_level(logging.WARNING):
        assert usable_trackers(["wandb"], run_name="x") == []
    assert caplog.messages == ["wandb could not start (no route to host): training goes on without it."]


def test_only_the_main_process_starts_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    fake = use(monkeypatch, FakeWandb())
    assert usable_trackers(["wandb"], run_name="x") == ["wandb"]
    assert fake.started == []


def test_a_name_that_is_no_tracker_is_refused() -> None:
    with pytest.raises(UserError, match=r"Unknown tracker 'wandbb': choose among .*tensorboard.*wandb"):
        usable_trackers(["none", "wandbb"], run_name="x")
