"""The settings with which each algorithm is shown to reach the known optimum; `optimum` has the task."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import optimum

from deep_rlhf.algorithms.grpo import GRPOConfig, GRPOTrainer
from deep_rlhf.algorithms.online.config import OnlineConfig
from deep_rlhf.algorithms.online.trainer import OnlineTrainer
from deep_rlhf.algorithms.ppo import PPOConfig, PPOTrainer
from deep_rlhf.algorithms.reinforce_plus_plus import ReinforcePlusPlusConfig, ReinforcePlusPlusTrainer
from deep_rlhf.algorithms.rloo import RLOOConfig, RLOOTrainer
from deep_rlhf.algorithms.trpo import TRPOConfig, TRPOTrainer

Settings = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """An algorithm, its model, and its settings: for all lengths, and by the longest response."""

    config_class: type[OnlineConfig]
    trainer_class: type[OnlineTrainer]
    settings: Settings
    by_length: dict[int, Settings]
    model: str = "gpt2"


# Normalised advantages never shrink, so the steps must: every schedule falls to 0.
PPO_BY_LENGTH: dict[int, Settings] = {
    1: {"batch_size": 256, "updates": 16, "lam": 1.0, "lr_scheduler_type": "linear"},
    3: {"batch_size": 512, "updates": 30, "lam": 0.95, "lr_scheduler_type": "cosine", "mini_batch_size": 256},
}
PPO: Settings = {"ppo_epochs": 2, "learning_rate": 3e-3}
CRITIC_FREE: Settings = {"ppo_epochs": 2, "learning_rate": 3e-3, "lr_scheduler_type": "cosine"}
GROUPS: Settings = {"group_size": 32, "batch_size": 256, "mini_batch_size": 128}
GROUPS_BY_LENGTH: dict[int, Settings] = {1: {"updates": 20}, 3: {"updates": 40}}

RUNS: dict[str, Run] = {
    "ppo": Run(PPOConfig, PPOTrainer, PPO, PPO_BY_LENGTH),
    "ppo, separate critic": Run(PPOConfig, PPOTrainer, PPO | {"critic": "separate"}, PPO_BY_LENGTH),
    "ppo, adapters": Run(
        PPOConfig,
        PPOTrainer,
        PPO | {"learning_rate": 4e-3, "use_peft": True, "mini_batch_size": 128},
        PPO_BY_LENGTH,
        model="wide gpt2",
    ),
    "ppo, t5": Run(PPOConfig, PPOTrainer, PPO | {"learning_rate": 1e-2}, PPO_BY_LENGTH, model="t5"),
    "trpo": Run(
        TRPOConfig,
        TRPOTrainer,
        {
            **{"batch_size": 256, "max_kl": 0.1, "cg_damping": 1e-3, "cg_iterations": 6, "value_epochs": 5, "lam": 1.0},
            **{"learning_rate": 4e-3, "lr_scheduler_type": "linear"},
        },
        {1: {"updates": 8}, 3: {"updates": 16}},
    ),
    "rloo": Run(RLOOConfig, RLOOTrainer, CRITIC_FREE | GROUPS, GROUPS_BY_LENGTH),
    # with the KL in the loss its optimum is another one: test_grpo_fixed_point.py
    "grpo": Run(
        GRPOConfig,
        GRPOTrainer,
        CRITIC_FREE | GROUPS | {"kl_in_loss": False, "kl_penalty": "kl"},
        GROUPS_BY_LENGTH,
    ),
    # neither a critic nor a group explains what a batch's mean does not, so it needs more samples
    "reinforce++": Run(
        ReinforcePlusPlusConfig,
        ReinforcePlusPlusTrainer,
        CRITIC_FREE | {"batch_size": 512, "mini_batch_size": 256},
        GROUPS_BY_LENGTH,
    ),
}


@dataclass
class Outcome:
    """A trained policy beside the best one."""

    trainer: OnlineTrainer
    best: optimum.Optimum
    distances: list[float] = field(default_factory=list)  # KL(π ‖ π*) at the start, after updates if asked, at the end
    seconds_measuring: list[float] = field(default_factory=list)


def train(
    name: str,
    make_model: Callable[..., Any],
    tokenizer: Any,
    *,
    length: int,
    beta: float,
    seed: int,
    every_update: bool = False,
    model: str | None = None,
    **others: Any,
) -> Outcome:
    """Trains as RUNS says, with another `model` and `others` over it, and measures the way to the optimum."""
    run = RUNS[name]
    settings = {**run.by_length[length], **run.settings, **others}
    config = run.config_class(
        exp_name=name,
        steps=settings["batch_size"] * settings.pop("updates"),
        max_new_tokens=length,
        init_kl_coef=beta,
        adap_kl_ctrl=False,
        seed=seed,
        **settings,
    )
    reference = optimum.reference_model(make_model, model or run.model, seed)
    best = optimum.Optimum(reference, tokenizer, length=length, beta=beta)
    reward = optimum.reward_for(beta)
    trainer = run.trainer_class(config, model=reference, tokenizer=tokenizer, prompts=[optimum.PROMPT], reward=reward)
    outcome = Outcome(trainer, best, [best.distance(trainer.policy)])

    def measure(_: dict[str, float]) -> None:
        start = time.perf_counter()
        outcome.distances.append(best.distance(trainer.policy))
        outcome.seconds_measuring.append(time.perf_counter() - start)

    trainer.train(on_update=measure if every_update else None)
    if not every_update:
        measure({})
    return outcome
