"""Group relative policy optimisation, GRPO (Shao et al. 2024, "DeepSeekMath", arXiv 2402.03300).

The G responses to one prompt give each other's baseline and scale; the policy ratio is clipped as in PPO, and the KL is
part of the loss:

    A_i = (R_i − mean of R) / std of R,  R = score
    L = mean over i of 1/|y_i| Σ_t [−min(ρ_t A_i, clip(ρ_t, 1 ± ε) A_i) + β KL_t],  ρ_t = π/π_old, KL the estimator k3

`scale_rewards=False` omits the division, and `loss_reduction="token"` replaces the mean of means by one mean over all
tokens (DAPO, Yu et al. 2025); both together are Dr. GRPO (Liu et al. 2025) except for its constant denominator.

Fixed point: the gradient of k3 on samples of the policy is that of the forward KL(π₀ ‖ π), and dividing by the group's
standard deviation σ multiplies β by σ, so this is not PPO's optimum π₀ exp(r/β): for responses of one token it is
β'π₀/(λ − r), with β' = β or βσ. With `kl_in_loss=False, kl_penalty="kl"` R = score − β Σ_t log(π/π₀), which is constant
at PPO's optimum; there the advantages vanish, whatever they are divided by.

Where this departs from the paper: 1e-4 is added to the standard deviation, for groups whose responses all have the same
reward, and the reference is never updated.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from deep_rlhf.algorithms.critic_free import CriticFreeConfig, CriticFreeLearner
from deep_rlhf.algorithms.online.metrics import mean_of_steps, policy_metrics
from deep_rlhf.algorithms.online.trainer import OnlineTrainer
from deep_rlhf.ops.advantages import group_mean_std, token_rewards
from deep_rlhf.ops.kl import KLPenalty, kl_estimate
from deep_rlhf.ops.losses import policy_loss
from deep_rlhf.ops.masked import masked_sum, sequence_mean
from deep_rlhf.rollout.records import experience_from
from deep_rlhf.settings import setting
from deep_rlhf.types import Experience, Rollout


@dataclass(frozen=True)
class GRPOConfig(CriticFreeConfig):
    """The settings of GRPO. Raises ConfigError for settings that cannot work."""

    exp_name: str = setting("grpo", "name of the run")
    group_size: int = setting(8, "number of responses to each prompt, G in the paper", least=2)
    scale_rewards: bool = setting(True, "divide advantages by the group's standard deviation; Dr. GRPO does not")
    loss_reduction: Literal["sequence", "token"] = setting(
        "sequence", "sequence: mean over the tokens, then over the responses (GRPO); token: over all tokens (DAPO)"
    )
    init_kl_coef: float = setting(
        0.04, "initial KL coefficient β: weight of the KL in the loss; raise it if the text degenerates", least=0
    )
    kl_penalty: KLPenalty = setting(
        "k3", "estimator of the KL per token: kl = k1, mse = k2, abs, k3, or full, the exact KL"
    )
    kl_in_loss: bool = setting(True, "add the KL to the loss instead of subtracting it from the reward")

    @property
    def samples_per_prompt(self) -> int:
        return self.group_size


class GRPO(CriticFreeLearner):
    """The learner of GRPO: one update from a rollout."""

    config: GRPOConfig

    def learn(self, rollout: Rollout, *, kl_coef: float, update: int) -> dict[str, float]:
        """Makes one update; returns means over the optimiser steps."""
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
        """Computes rewards and group-relative advantages; all tokens of a response share one advantage."""
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
        """The loss summed over the responses or the tokens of `part`, and the metrics per token [n, R]."""
        config, mask = self.config, part.response_mask
        logprobs = self.logprobs(part)
        losses, clipped = policy_loss(logprobs, part.logprobs, part.advantages, cliprange=config.cliprange)
        if config.kl_in_loss:
            losses = losses + kl_coef * kl_estimate(logprobs, part.ref_logprobs, config.kl_penalty)
        by_response = config.loss_reduction == "sequence"
        total = len(mask) * sequence_mean(losses, mask) if by_response else masked_sum(losses, mask)
        return total, policy_metrics(logprobs, part, clipped)


class GRPOTrainer(OnlineTrainer):
    """Trains with GRPO: `GRPOTrainer(config, prompts=…, reward=…).train()`."""

    make_learner = GRPO
