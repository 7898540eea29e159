"""Group relative policy optimisation, GRPO (Shao et al. 2024, "DeepSeekMath", arXiv 2402.03300).

The G responses to one prompt are each other's baseline and scale; the rest is PPO's clipped ratio, and the KL stands in
the loss:

    A_i = (R_i − mean of R) / std of R,  R = score
    L = mean over i of 1/|y_i| Σ_t [−min(ρ_t A_i, clip(ρ_t, 1 ± ε) A_i) + β KL_t],  ρ_t = π/π_old, KL the estimator k3

`scale_rewards=False` leaves the division out, and `loss_reduction="token"` replaces the mean of means by one mean over
all tokens (DAPO, Yu et al. 2025); both together are Dr. GRPO (Liu et al. 2025) but for its constant in the denominator.

What it converges to. The gradient of k3 on samples of the policy is that of the forward KL(π₀ ‖ π), and dividing by
the group's standard deviation σ multiplies β by σ, so this is not PPO's optimum π₀ exp(r/β): for answers of one token
it is β'π₀/(λ − r), with β' = β or βσ. With `kl_in_loss=False, kl_penalty="kl"` R = score − β Σ_t log(π/π₀), which is
one constant at PPO's optimum; there the advantages vanish, whatever they are divided by.

Where it departs from the paper: 1e-4 is added to the standard deviation, for groups whose responses are all equally
good, and the reference never moves.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from deep_rlhf.algorithms.critic_free import (
    CriticFreeConfig,
    CriticFreeLearner,
)
from deep_rlhf.algorithms.online.optimiser_step import mean_of_steps, policy_metrics
from deep_rlhf.algorithms.online.trainer import OnlineTrainer
from deep_rlhf.ops.advantages import group_mean_std, token_rewards
from deep_rlhf.ops.kl import KLPenalty, kl_estimate
from deep_rlhf.ops.losses import policy_loss
from deep_rlhf.ops.masked import masked_sum, sequence_mean
from deep_rlhf.rollout.records import experience_from
from deep_rlhf.types import Experience, Rollout


@dataclass(frozen=True)
class GRPOConfig(CriticFreeConfig):
    """What GRPO adds to the settings of every online algorithm. Raises UserError for values that cannot work."""

    exp_name: str = field(default="grpo", metadata={"help": "the run's name"})
    group_size: int = field(default=8, metadata={"help": "responses to each prompt; G in the paper"})
    scale_rewards: bool = field(
        default=True, metadata={"help": "divide advantages by the group's standard deviation; Dr. GRPO does not"}
    )
    loss_reduction: Literal["sequence", "token"] = field(
        default="sequence", metadata={"help": "mean over tokens, then responses (GRPO); or over all tokens (DAPO)"}
    )
    init_kl_coef: float = field(default=0.04, metadata={"help": "KL coefficient at the start"})
    kl_penalty: KLPenalty = field(
        default="k3", metadata={"help": "estimator of the KL per token; k1 is kl, k2 is mse, full is exact"}
    )
    kl_in_loss: bool = field(default=True, metadata={"help": "the KL is part of the loss, not of the reward"})

    @property
    def samples_per_prompt(self) -> int:
        return self.group_size

    def __post_init__(self) -> None:
        self.check_range("group_size", least=2)
        super().__post_init__()


class GRPO(CriticFreeLearner):
    """The learner: what GRPO does with a rollout."""

    config: GRPOConfig

    def learn(self, rollout: Rollout, *, kl_coef: float, update: int) -> dict[str, float]:
        """One update; returns means over the optimiser steps."""
        experience = self.experience(rollout, kl_coef)
        learning_rate = self.optimisation.learning_rate
        steps = []
        for minibatch in self.minibatches(update):
            by_response = self.config.loss_reduction == "sequence"
            count = torch.tensor(len(minibatch)) if by_response else None
            step = self.optimisation.backward(
                experience, minibatch, lambda part: self._losses(part, kl_coef), count=count
            )
            steps.append({**step, "grad_norm": self.optimisation.step()})
        self.optimisation.schedule.step()
        return {"learning_rate": learning_rate, **mean_of_steps(steps)}

    def experience(self, rollout: Rollout, kl_coef: float) -> Experience:
        """Rewards and group-relative advantages; every token of a response has the advantage of the whole."""
        in_reward = 0.0 if self.config.kl_in_loss else kl_coef
        rewards = token_rewards(rollout.shaped_scores, rollout.kl, rollout.response_mask, in_reward)
        returns = rewards.sum(1)
        mean, std = group_mean_std(returns, rollout.group)
        advantages = returns - mean
        if self.config.scale_rewards:
            advantages = advantages / (std + 1e-4)
        return experience_from(
            rollout, rewards=rewards, advantages=advantages.unsqueeze(1), returns=returns.unsqueeze(1)
        )

    def _losses(self, part: Experience, kl_coef: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss summed over the responses or the tokens of `part`, and what is reported of each token."""
        config, mask = self.config, part.response_mask
        logprobs = self.logprobs(part)
        losses, clipped = policy_loss(logprobs, part.logprobs, part.advantages, cliprange=config.cliprange)
        if config.kl_in_loss:
            losses = losses + kl_coef * kl_estimate(logprobs, part.ref_logprobs, config.kl_penalty)
        by_response = config.loss_reduction == "sequence"
        total = len(mask) * sequence_mean(losses, mask) if by_response else masked_sum(losses, mask)
        return total, policy_metrics(logprobs, part, clipped)


class GRPOTrainer(OnlineTrainer):
    """`OnlineTrainer` with GRPO as its learner: `GRPOTrainer(config, prompts=…, reward=…).train()`."""

    make_learner = GRPO
