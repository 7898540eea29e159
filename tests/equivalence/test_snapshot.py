"""A trainer that is put back to a snapshot goes on as if it had never gone on from there."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from grids import slow_but
from torch import Tensor

from deep_rlhf import PPOConfig, PPOTrainer
from deep_rlhf.algorithms.online.state import trainable_tensors
from deep_rlhf.algorithms.online.trainer import OnlineTrainer
from deep_rlhf.algorithms.rloo import RLOOConfig, RLOOTrainer
from deep_rlhf.algorithms.trpo import TRPOConfig, TRPOTrainer
from deep_rlhf.runtime.checkpoint import latest_checkpoint, save_checkpoint

PROMPTS = ["the cat sees", "red", "a very old dog finds the small house and not", "two fish", "moon or sun", "bad", "a"]
SETTINGS: dict[str, Any] = {
    **{"batch_size": 8, "steps": 48, "max_new_tokens": 6, "learning_rate": 1e-3, "lr_scheduler_type": "linear"},
    **{"adap_kl_ctrl": True, "target": 0.1, "horizon": 50, "use_score_scaling": True, "use_score_norm": True},
}
TIMED = {"tokens_per_second", "sampling_share_of_time", "memory_gb"}
PPO = (PPOTrainer, PPOConfig, {"ppo_epochs": 2, "mini_batch_size": 4, "critic": "separate"})
KINDS = {
    "ppo": ("gpt2", *PPO),
    "ppo with lora": ("lora", *PPO),
    "rloo": ("gpt2", RLOOTrainer, RLOOConfig, {"group_size": 4}),
    "trpo": ("gpt2", TRPOTrainer, TRPOConfig, {}),
}
Make = Callable[[], OnlineTrainer]


def reward(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    return [len(response) / 10 + (response[:1] < "f") for response in responses]


@pytest.fixture(params=slow_but(["ppo", "rloo"], KINDS))
def make(request: pytest.FixtureRequest, make_model: Callable[..., Any], tokenizer: Any) -> Make:
    kind, trainer, config, own = KINDS[request.param]
    return lambda: trainer(
        config(**SETTINGS | own), model=make_model(kind), tokenizer=tokenizer, prompts=PROMPTS, reward=reward
    )


def steps(trainer: OnlineTrainer, updates: Sequence[int]) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """Metrics of the updates, but for their times, and the weights after them."""
    metrics = [{k: v for k, v in trainer.step(update).items() if k not in TIMED} for update in updates]
    return metrics, {name: weights.clone() for name, weights in trainable_tensors(trainer._policy).items()}


def assert_same(one: Any, other: Any) -> None:
    assert one[0] == other[0]
    assert all(torch.equal(weights, other[1][name]) for name, weights in one[1].items())


def test_a_restored_trainer_takes_the_same_steps_again(make: Make) -> None:
    trainer = make()
    steps(trainer, [0, 1])
    state = trainer.snapshot()
    straight = steps(trainer, [2, 3])
    strayed = steps(trainer, [4, 5])
    trainer.restore(state)
    assert_same(steps(trainer, [2, 3]), straight)
    assert not torch.equal(*(next(iter(run[1].values())) for run in (straight, strayed)))
    trainer.restore(state)  # which the training in between has not touched
    assert_same(steps(trainer, [2, 3]), straight)


def test_a_snapshot_goes_through_a_file_into_another_trainer(make: Make, tmp_path: Path) -> None:
    trainer = make()
    steps(trainer, [0, 1])
    save_checkpoint(tmp_path, 2, trainer.snapshot())
    straight = steps(trainer, [2, 3])
    found = latest_checkpoint(tmp_path)
    assert found is not None
    other = make()
    other.restore(found.state)
    assert_same(steps(other, [2, 3]), straight)
