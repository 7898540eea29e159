"""REINFORCE with a leave-one-out baseline, RLOO (Kool et al. 2019; Ahmadian et al. 2024, arXiv 2402.14740).

A whole response y is one action, and the k responses to one prompt give each other's baseline:

    ∇J = mean over i of (R_i − mean of R_j, j ≠ i) ∇log π(y_i),  R = score − β Σ_t KL_t,  log π(y) = Σ_t log π(y_t)

With one optimiser step per batch, the default, that is the gradient. Where this departs from the paper: with several
steps per batch, the loss is PPO's clipped surrogate on the ratio π(y)/π_old(y) of whole responses, which keeps the
policy near the one that sampled. log π_old is then the trainer's own: rounding differences to the sampler's add up over
a response, and below float32 the clip range would already exclude responses that the policy has just sampled.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from deep_rlhf.algorithms.critic_free import CriticFreeConfig, CriticFreeLearner
from deep_rlhf.algorithms.online.metrics import mean_of_steps, policy_metrics
from deep_rlhf.algorithms.online.trainer import OnlineTrainer
from deep_rlhf.ops.advantages import leave_one_out, token_rewards
from deep_rlhf.ops.losses import policy_loss
from deep_rlhf.rollout.records import experience_from
from deep_rlhf.settings import setting
from deep_rlhf.types import Experience, Rollout


@dataclass(frozen=True)
class RLOOConfig(CriticFreeConfig):
    """The settings of RLOO. Raises ConfigError for settings that cannot work."""

    exp_name: str = setting("rloo", "name of the run")
    group_size: int = setting(4, "number of responses to each prompt, k in the paper", least=2)

    @property
    def samples_per_prompt(self) -> int:
        return self.group_size

    @property
    def has_one_step(self) -> bool:
        """Whether each batch gets one optimiser step."""
        return self.ppo_epochs == 1 and self.optimizer_batch_size == self.batch_size

    @property
    def recomputes_logprobs(self) -> bool:
        """For the ratio of whole responses, which only further steps use."""
        return not self.has_one_step

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_kl_in_reward()


class RLOO(CriticFreeLearner):
    """The learner of RLOO: one update from a rollout."""

    config: RLOOConfig

    def learn(self, rollout: Rollout, *, kl_coef: float, update: int) -> dict[str, float]:
        """Makes one update; returns means over the optimiser steps."""
        experience = self.experience(rollout, kl_coef)
        learning_rate = self.optimisation.learning_rate
        steps = []
        for minibatch in self.minibatches(update):
            responses = torch.tensor(len(minibatch))
            step = self.optimisation.backward(experience, minibatch, self._losses, count=responses)
            steps.append({**step, "grad_norm": self.optimisation.step()})
        self.optimisation.schedule.step()
        return {"learning_rate": learning_rate, **mean_of_steps(steps)}

    def experience(self, rollout: Rollout, kl_coef: float) -> Experience:
        """Computes rewards and leave-one-out advantages; all tokens of a response share one advantage."""
        rewards = token_rewards(rollout.shaped_scores, rollout.kl, rollout.response_mask, kl_coef)
        returns = rewards.sum(1)
        baseline = leave_one_out(returns, rollout.group)
        return experience_from(
            rollout, rewards=rewards, advantages=(returns - baseline).unsqueeze(1), returns=returns.unsqueeze(1)
        )

    def _losses(self, part: Experience) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss summed over the responses of `part`, and the metrics per token [n, R]."""
        logprobs = self.logprobs(part)
        old_logprobs = logprobs.detach() if self.config.has_one_step else part.logprobs  # with itself the ratio is 1
        # every response has a first token, whose advantage is that of the response
        losses, clipped = policy_loss(
            logprobs.sum(1), old_logprobs.sum(1), part.advantages[:, 0], cliprange=self.config.cliprange
        )
        return losses.sum(), policy_metrics(logprobs, part, clipped.unsqueeze(1))


class RLOOTrainer(OnlineTrainer):
    """Trains with RLOO: `RLOOTrainer(config, prompts=…, reward=…).train()`."""

    make_learner = RLOO
