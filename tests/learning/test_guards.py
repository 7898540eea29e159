"""A NaN or an infinity never reaches the weights: its batch is set aside, counted, and leaves no trace in the run."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from deep_rlhf import PPOConfig, PPOTrainer
from deep_rlhf.algorithms.online.state import copied, trainable_tensors
from deep_rlhf.algorithms.online.trainer import OnlineTrainer
from deep_rlhf.algorithms.rloo import RLOOConfig, RLOOTrainer
from deep_rlhf.algorithms.trpo import TRPOConfig, TRPOTrainer
from deep_rlhf.errors import RewardError
from deep_rlhf.evaluation.report import write_report
from deep_rlhf.runtime.checkpoint import latest_checkpoint
from deep_rlhf.runtime.run_directory import write_summary

PROMPTS = ["the cat sees", "red", "a very old dog finds the small house and not", "two fish", "moon or sun", "bad", "a"]
SETTINGS: dict[str, Any] = {
    "batch_size": 8,
    "steps": 64,
    "max_new_tokens": 4,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "linear",
    "adap_kl_ctrl": True,
    "target": 0.1,
    "horizon": 50,
    "use_score_scaling": True,
    "use_score_norm": True,
}
PPO: dict[str, Any] = {"ppo_epochs": 2, "mini_batch_size": 4}


class Planned:
    """An ensemble of two that rewards length, but for the samples and batches in which it is told not to."""

    def __init__(self, bad: dict[int, Tensor]) -> None:
        """`bad`: number of the batch, from 1 -> what the members say of its sample 3."""
        self.bad = bad
        self.batches = 0

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        self.batches += 1
        lengths = torch.tensor([float(len(text)) for text in responses])
        scores = torch.stack([lengths, lengths + 1], 1)
        scores[3] = self.bad.get(self.batches, scores[3])
        return scores


@pytest.fixture
def make(make_model: Callable[..., Any], tokenizer: Any) -> Callable[..., OnlineTrainer]:
    def make_trainer(
        bad: dict[int, Tensor] | None = None,
        trainer: type[OnlineTrainer] = PPOTrainer,
        config: Any = PPOConfig,
        **settings: Any,
    ) -> OnlineTrainer:
        own = PPO if config is PPOConfig else {}
        return trainer(
            config(**SETTINGS | own | settings),
            model=make_model("gpt2"),
            tokenizer=tokenizer,
            prompts=PROMPTS,
            reward=Planned(bad or {}),
        )

    return make_trainer


def everything(trainer: OnlineTrainer) -> Any:
    """All that a batch may change: weights, Adam, schedule, KL coefficient, score statistics."""
    state = (trainable_tensors(trainer._policy), trainer.learner.state(), trainer.kl_coef, trainer._shaping.moments)
    return copied(state)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def infinite_gradient(trainer: OnlineTrainer, *, backward: int, value: float = math.inf) -> None:
    """One number of a gradient is `value` in the `backward`-th backward pass from now, and only then."""
    passes = iter(range(1, 10_000))

    def spoil(gradient: Tensor) -> Tensor:
        if next(passes) != backward:
            return gradient
        gradient = gradient.clone()
        gradient.view(-1)[0] = value
        return gradient

    trainer._policy.trainable_parameters()[-1].register_hook(spoil)


REWARDS = {
    "one member's nan": ([math.nan, 1.0], {}),
    "one member's inf": ([1.0, math.inf], {}),
    "inf, clipped": ([math.inf, math.inf], {"score_clip": 2.0}),
    "inf, the worst counts": ([1.0, math.inf], {"ensemble_reward": "min"}),
    "-inf, uncertainty": ([-math.inf, 1.0], {"ensemble_reward": "uncertainty", "ensemble_std_coef": 0.5}),
    "nan, replaced without EOS": ([math.nan, math.nan], {"missing_eos_penalty": 1.0}),
}


@pytest.mark.parametrize(("member_scores", "settings"), REWARDS.values(), ids=REWARDS)
def test_a_reward_that_is_not_finite_changes_nothing(
    member_scores: list[float], settings: dict[str, Any], make: Callable[..., OnlineTrainer], tmp_path: Path
) -> None:
    trainer = make({2: torch.tensor(member_scores)}, **settings, output_dir=str(tmp_path))
    trainer.train(updates=1)
    before = everything(trainer)
    metrics = trainer.train(updates=1)[1]
    assert metrics["bad_batches"] == 1
    assert same(everything(trainer), before)
    aside = json.loads((tmp_path / "bad_batches" / "step-2.json").read_text())
    assert aside["step"] == 2
    assert aside["reason"].startswith("the reward of sample 3 is ")
    assert len(aside["samples"]) == 8
    assert aside["samples"][3]["score"] in ("nan", "inf", "-inf")
    assert aside["samples"][3]["response"] == trainer.last_rollout.responses[3]  # type: ignore[union-attr]
    assert trainer.train(updates=1)[2]["bad_batches"] == 1
    assert not same(everything(trainer), before)  # the next batch is learned from


def test_a_reward_that_overflows_in_the_loss_changes_nothing(make: Callable[..., OnlineTrainer]) -> None:
    """Each reward is a number, but not their squares."""
    settings = {"use_score_scaling": False, "use_score_norm": False}
    trainer = make({2: torch.tensor([3e38, -1e38])}, **settings)
    trainer.train(updates=1)
    before = everything(trainer)
    assert trainer.train(updates=1)[1]["bad_batches"] == 1
    assert math.isfinite(trainer.history[1]["score_mean"])
    assert same(everything(trainer), before)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("backward", [1, 3])
def test_a_gradient_that_is_not_finite_ends_the_update(
    backward: int, value: float, make: Callable[..., OnlineTrainer], caplog: pytest.LogCaptureFixture
) -> None:
    """The third backward pass comes after two finite steps of Adam, which stay."""
    trainer = make()
    trainer.train(updates=1)
    before = everything(trainer)
    infinite_gradient(trainer, backward=backward, value=value)
    steps: list[int] = []
    handle = register_optimizer_step_pre_hook(lambda *_: steps.append(1))
    metrics = trainer.train(updates=1)[1]
    handle.remove()
    assert len(steps) == backward - 1
    assert metrics["bad_batches"] == 1
    assert "the gradient's norm is " in caplog.text
    assert same(everything(trainer), before) == (backward == 1)
    assert all(torch.isfinite(weight).all() for weight in trainer.learner.optimisation.parameters)
    assert trainer.train(updates=1)[2]["bad_batches"] == 1
    assert not same(everything(trainer), before)


@pytest.mark.parametrize(
    ("trainer_class", "config", "settings"),
    [
        (RLOOTrainer, RLOOConfig, {"ppo_epochs": 2, "group_size": 4}),
        (TRPOTrainer, TRPOConfig, {}),
        (PPOTrainer, PPOConfig, PPO | {"critic": "separate", "use_peft": True, "lora_r": 2}),
    ],
    ids=["rloo", "trpo", "lora and a separate critic"],
)
def test_an_update_of_the_relatives_ends_at_a_gradient_that_is_not_finite(
    trainer_class: Any, config: Any, settings: dict[str, Any], make: Callable[..., OnlineTrainer]
) -> None:
    trainer = make(None, trainer_class, config, **settings)
    trainer.train(updates=1)
    steps: list[int] = []
    handle = register_optimizer_step_pre_hook(lambda *_: steps.append(1))
    last = trainer.learner.optimisation.parameters[-1]  # type: ignore[attr-defined]
    passes = iter(range(1, 100))
    hook = last.register_hook(lambda gradient: gradient * (math.inf if next(passes) == 2 else 1.0))
    metrics = trainer.train(updates=1)[1]
    handle.remove(), hook.remove()
    assert len(steps) == 1
    assert metrics["bad_batches"] == 1
    assert all(torch.isfinite(weight).all() for weight in trainer.learner.optimisation.parameters)
    assert trainer.train(updates=1)[2]["bad_batches"] == 1


def test_bad_batches_in_a_row_end_the_run_and_a_good_one_between_does_not(
    make: Callable[..., OnlineTrainer], tmp_path: Path
) -> None:
    bad = dict.fromkeys((2, 4, 5, 7, 8), torch.full((2,), math.nan))
    trainer = make(bad, output_dir=str(tmp_path), max_bad_batches=3, save_freq=1)
    assert [metrics["bad_batches"] for metrics in trainer.train()] == [0, 1, 1, 2, 3, 3, 4, 5]
    assert len(list((tmp_path / "bad_batches").iterdir())) == 5


def test_a_stopped_run_names_the_last_good_checkpoint_and_goes_on_with_a_mended_reward(
    make: Callable[..., OnlineTrainer], tmp_path: Path
) -> None:
    whole = make().train()
    bad = dict.fromkeys((4, 5, 6), torch.full((2,), math.inf))
    trainer = make(bad, output_dir=str(tmp_path / "run"), max_bad_batches=3, save_freq=1)
    with pytest.raises(RewardError) as told:
        trainer.train()
    good = tmp_path / "run" / "checkpoints" / "step-3"
    assert str(told.value).startswith(
        "3 batches in a row could not be learned from, the last because the reward of sample 3 is inf (prompt "
    )
    assert str(told.value).endswith(
        f"): correct the reward and add --resume to continue from '{good}', the last good checkpoint, or start again"
        " with a lower learning rate."
    )
    newest = latest_checkpoint(good.parent)
    assert newest is not None
    assert newest.path == good
    mended = make(output_dir=str(tmp_path / "run"), max_bad_batches=3, save_freq=1, resume=True)
    timed = {"tokens_per_second", "sampling_share_of_time", "memory_gb"}
    for expected, actual in zip(whole, mended.train(), strict=True):
        assert {name: expected[name] for name in expected.keys() - timed} == {
            name: actual[name] for name in actual.keys() - timed
        }


def test_weights_that_overflow_end_the_run(make: Callable[..., OnlineTrainer], tmp_path: Path) -> None:
    trainer = make(learning_rate=1e3, max_bad_batches=2, output_dir=str(tmp_path), save_freq=1)
    trainer.learner.optimisation.set_learning_rate(1e30)  # type: ignore[attr-defined]
    with pytest.raises(RewardError, match=r"\b2 batches in a row\b.* lower learning rate\.$"):
        trainer.train()
    assert len(trainer.history) < 4


def test_the_report_copes_with_bad_batches(make: Callable[..., OnlineTrainer], tmp_path: Path) -> None:
    trainer = make(dict.fromkeys((1, 3, 8), torch.tensor([math.nan, 1.0])))
    history = trainer.train()
    assert "policy_loss" not in history[0]
    assert math.isnan(history[0]["score_mean"])
    write_summary(tmp_path / "summary.json", {"first": history[0], "last": history[-1]})
    assert json.loads((tmp_path / "summary.json").read_text())["first"]["score_mean"] is None
    text = write_report(tmp_path / "report.html", title="ppo", history=history).read_text()
    for title in ("Reward", "KL from the reference model", "Policy clip fraction"):
        assert f"{title}</" in text
    assert ">nan" not in text
