"""Runs of PPO that are stopped, damaged, extended or replaced, from Python: they end as undisturbed ones do."""

import dataclasses
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from facts import assert_names

from deep_rlhf.algorithms.ppo import PPOConfig, PPOTrainer
from deep_rlhf.errors import CheckpointError
from deep_rlhf.runtime.processes import Runtime
from deep_rlhf.runtime.signals import Stopped

TIMED = {"tokens_per_second", "sampling_share_of_time", "memory_gb"}


def length(prompts: list[str], responses: list[str]) -> list[float]:
    return [float(len(response)) for response in responses]


@pytest.fixture
def make(make_model: Callable[..., Any], make_tokenizer: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    def trainer(updates: int = 4, folder: str = "run", **settings: Any) -> PPOTrainer:
        sizes = {"batch_size": 2, "mini_batch_size": 2, "max_new_tokens": 2, "save_freq": 1, "learning_rate": 1e-3}
        config = PPOConfig(**sizes | settings, steps=2 * updates, output_dir=str(tmp_path / folder))
        prompts = ["red cat", "big dog", "sun"]
        return PPOTrainer(config, model=make_model("gpt2"), tokenizer=make_tokenizer(), prompts=prompts, reward=length)

    return trainer


def untimed(history: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in row.items() if name not in TIMED} for row in history]


def same(a: PPOTrainer, b: PPOTrainer) -> bool:
    weights = zip(a.policy.state_dict().values(), b.policy.state_dict().values(), strict=True)
    logged = [[row["samples"] for row in each.logged] for each in (a, b)]
    return untimed(a.history) == untimed(b.history) and logged[0] == logged[1] and all(x.equal(y) for x, y in weights)


def test_a_finished_run_can_be_made_longer(make: Callable[..., PPOTrainer], tmp_path: Path) -> None:
    whole, short = make(4, "whole"), make(2)
    whole.train()
    short.train()
    longer = make(4, resume=True)
    assert len(longer.history) == 2
    longer.train()
    assert same(longer, whole)
    with pytest.raises(CheckpointError) as told:
        make(3, resume=True)
    assert_names(told.value, "4 updates", "3", "--steps")


def test_a_run_whose_learning_rate_falls_cannot_be_made_longer(make: Callable[..., PPOTrainer]) -> None:
    make(1, lr_scheduler_type="linear").train()
    with pytest.raises(CheckpointError) as told:
        make(4, lr_scheduler_type="linear", resume=True)
    assert_names(told.value, "steps (2", "now 8", "lr_scheduler_type=linear", "constant")


def test_a_signal_saves_and_the_run_goes_on(make: Callable[..., PPOTrainer]) -> None:
    number = signal.SIGTERM
    stopped, whole = make(3, save_freq=10), make(3, "whole")
    before = signal.getsignal(number)
    with pytest.raises(Stopped) as stop:
        stopped.train(lambda metrics: signal.raise_signal(number))
    assert stop.value.number == number
    assert signal.getsignal(number) is before
    resumed = make(3, save_freq=10, resume=True)
    assert len(resumed.history) == 1
    resumed.train()
    whole.train()
    assert same(resumed, whole)


def test_an_update_whose_callback_raises_is_saved(make: Callable[..., PPOTrainer]) -> None:
    def stop(metrics: dict[str, float]) -> None:
        metrics["seen"] = 1.0
        raise ZeroDivisionError

    trainer = make(3, save_freq=10)
    with pytest.raises(ZeroDivisionError):
        trainer.train(stop)
    resumed = make(3, save_freq=10, resume=True)
    assert [row["seen"] for row in resumed.history] == [1.0]


def test_an_earlier_run_is_not_touched_before_the_new_one_begins(
    make: Callable[..., PPOTrainer], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make(1).train()
    checkpoints = tmp_path / "run" / "checkpoints"
    new = make(2)
    assert (checkpoints / "step-1").exists()
    new.train(updates=1)
    assert (checkpoints / "step-1").exists()
    with pytest.raises(CheckpointError, match="1 of 2 updates"):
        make(2)
    for path in checkpoints.glob("step-*/state.json"):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError) as told:  # it may be unfinished
        make(2)
    assert_names(told.value, "step-1", "state.json", "empty", "output_dir")
    with caplog.at_level("INFO", "deep_rlhf"):
        again = make(2, resume=True)
    assert again.history == []
    assert "from the beginning" in caplog.text
    again.train(updates=1)
    assert_names(caplog.messages[-1], "damaged", tmp_path / "run" / "checkpoints_damaged")
    assert (tmp_path / "run" / "checkpoints_damaged" / "step-1" / "state.safetensors").exists()


def test_trackers_are_opened_once(make: Callable[..., PPOTrainer], monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make(3)
    opened: list[str] = []
    monkeypatch.setattr(trainer.runtime.accelerator, "init_trackers", lambda name, **_: opened.append(name))
    for _ in range(5):
        trainer.train(updates=1)
    assert opened == ["deep-rlhf"]


def test_a_failure_on_the_main_process_is_raised_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise CheckpointError("full")

    runtime = Runtime()
    with pytest.raises(CheckpointError, match="full"):
        runtime.on_main(fail)
    assert runtime.on_main(lambda: 3) == 3
    runtime.is_main = False
    monkeypatch.setattr(runtime, "gather", lambda value: [CheckpointError("there"), value])
    with pytest.raises(CheckpointError, match="there"):
        runtime.on_main(fail)


def test_a_callback_that_changes_the_working_directory_moves_no_checkpoint(
    make: Callable[..., PPOTrainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    trainer = make(2, folder=".")
    trainer = PPOTrainer(
        dataclasses.replace(trainer.config, output_dir="run"),
        model=trainer.policy,
        tokenizer=trainer.tokenizer,
        prompts=["red cat", "big dog"],
        reward=length,
    )
    trainer.train(on_update=lambda metrics: os.chdir(tmp_path / "elsewhere"))
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert (tmp_path / "run" / "checkpoints").is_dir()
