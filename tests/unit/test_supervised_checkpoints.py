"""SFT that is stopped, resumed and made longer ends as an undisturbed run does: to the last bit, with dropout."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from facts import assert_names
from torch import Tensor

from deep_rlhf.algorithms.supervised.sft import SFTConfig, train_sft
from deep_rlhf.errors import CheckpointError
from deep_rlhf.runtime.checkpoint import latest_checkpoint
from deep_rlhf.runtime.signals import Stopped

EXAMPLES = [("red cat", f"{word} dog") for word in ("sees", "likes", "finds", "eats", "the", "a")] * 3

Train = Callable[..., dict[str, Tensor]]


@pytest.fixture
def train(make_model: Callable[..., Any], make_tokenizer: Callable[..., Any], tmp_path: Path) -> Train:
    """train(folder, update=, act=, **flags): the weights after SFT; `act` is called after the update of this number."""

    def run(folder: str, *, update: int = 0, act: Callable[[], Any] = lambda: None, **flags: Any) -> dict[str, Tensor]:
        model, done = make_model("gpt2"), iter(range(1, 1000))
        for module in model.modules():
            if type(module).__name__ == "Dropout":
                module.p = 0.1
        settings: dict[str, Any] = {
            "per_device_train_batch_size": 2,
            "save_strategy": "steps",
            "save_steps": 2,
            "logging_steps": 1,
            "num_train_epochs": 1,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
        }
        config = SFTConfig(output_dir=str(tmp_path / folder), **settings | flags)
        train_sft(config, model, make_tokenizer(), EXAMPLES, lambda: act() if next(done) == update else None)
        return {name: weight.clone() for name, weight in model.state_dict().items()}

    return run


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


def fail() -> None:
    raise ZeroDivisionError


def test_a_failed_run_goes_on_to_the_same_end(train: Train) -> None:
    whole = train("whole")
    with pytest.raises(ZeroDivisionError):
        train("failed", update=5, act=fail)
    assert same(train("failed", resume=True), whole)


def test_a_signal_saves_and_the_run_goes_on(train: Train, tmp_path: Path) -> None:
    number = signal.SIGTERM
    with pytest.raises(Stopped) as stop:
        train("stopped", update=3, act=lambda: signal.raise_signal(number))
    assert stop.value.number == number
    found = latest_checkpoint(tmp_path / "stopped" / "checkpoints")
    assert found is not None
    assert [row["metrics"]["step"] for row in found.history.rows] == [1, 2, 3]
    assert same(train("stopped", resume=True), train("whole"))


def test_a_finished_run_can_be_made_longer(train: Train, tmp_path: Path) -> None:
    train("short")
    assert same(train("short", resume=True, num_train_epochs=2), train("long", num_train_epochs=2))
    with pytest.raises(CheckpointError) as told:
        train("long", resume=True, num_train_epochs=1)
    assert_names(told.value, tmp_path / "long", "18 updates", "9", "--num_train_epochs")


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        ({"lr_scheduler_type": "linear"}, "linear"),
        ({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 0.5}, "warm-up"),
        ({"logging_steps": 0.5}, "logging_steps"),
    ],
)
def test_a_longer_run_that_would_begin_differently_is_refused(train: Train, flags: dict[str, Any], why: str) -> None:
    train("short", max_steps=2, **flags)
    with pytest.raises(CheckpointError) as told:
        train("short", max_steps=4, resume=True, **flags)
    assert_names(told.value, "max_steps (2", "now 4", why)


def test_other_examples_are_another_run(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    train("run", max_steps=2)
    monkeypatch.setitem(globals(), "EXAMPLES", EXAMPLES[1:])
    with pytest.raises(CheckpointError, match="examples"):
        train("run", max_steps=2, resume=True)


def test_a_run_from_a_checkpoint_elsewhere_has_its_own_history(train: Train, tmp_path: Path) -> None:
    whole = train("whole")
    with pytest.raises(ZeroDivisionError):
        train("failed", update=5, act=fail)
    weights = train("other", resume_from_checkpoint=str(tmp_path / "failed" / "checkpoints" / "step-4"))
    assert same(weights, whole)
    found = latest_checkpoint(tmp_path / "other" / "checkpoints")
    assert found is not None
    assert [row["metrics"]["step"] for row in found.history.rows] == list(range(1, 10))
