"""Proximal policy optimisation of a language model against a reward on text (Schulman 2017; Ziegler 2019).

One update: sample a response to each prompt, score the text (`online`), turn the score and the per-token KL penalty
into advantages (GAE), then a few epochs of clipped policy and value losses. The maths is in `ops`, the sampling in
`rollout`; what is here is the algorithm. Where it departs from the sources:
- a sample is drawn by inverting the distribution at a given uniform, so it depends on neither padding nor neighbours;
- losses are divided by the global number of real tokens, so the cut into forward passes changes nothing;
- Adam's eps is 1e-5 (Huang et al. 2024), added after the bias correction as PyTorch does.
"""

import logging
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from deep_rlhf.algorithms.online.build import load_tensors, trainable_tensors
from deep_rlhf.algorithms.online.optimiser_step import Optimisation, mean_of_steps, minibatches, policy_metrics
from deep_rlhf.algorithms.online.trainer import OnlineTrainer
from deep_rlhf.algorithms.ppo_config import PPOConfig
from deep_rlhf.errors import UserError
from deep_rlhf.models.critic import Critic, make_critic
from deep_rlhf.models.policy import Policy
from deep_rlhf.ops.advantages import gae, token_rewards
from deep_rlhf.ops.kl import kl_estimate
from deep_rlhf.ops.losses import explained_variance, policy_loss, truncated_importance, value_loss
from deep_rlhf.ops.masked import masked_mean, masked_sum, whiten
from deep_rlhf.rollout.records import experience_from
from deep_rlhf.runtime.processes import Runtime
from deep_rlhf.types import Experience, Rollout, Scorer

logger = logging.getLogger(__name__)


class PPO:
    """The learner: what PPO does with a rollout."""

    def __init__(
        self,
        config: PPOConfig,
        policy: Policy,
        runtime: Runtime,
        *,
        updates: int,
        scorer: Scorer | None,
        tokenizer: PreTrainedTokenizerBase,
        critic: Critic | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        schedule: torch.optim.lr_scheduler.LRScheduler | None = None,
    ) -> None:
        """`critic` is trained where there is one already; otherwise `config.critic` says which to make.

        `optimizer` and `schedule` as `Optimisation` takes them.
        """
        if config.critic_warmup_steps >= updates:
            raise UserError(
                f"critic_warmup_steps={config.critic_warmup_steps} leaves none of the {updates} updates to the policy:"
                " lower it, or raise steps."
            )
        self.config = config
        self.policy = policy
        self.runtime = runtime
        self.critic = critic or make_critic(config.critic, policy, scorer, tokenizer)
        if config.gradient_checkpointing and self.critic.own_trunk is not None:
            self.critic.own_trunk.checkpoint_activations()
        self.optimisation = Optimisation(
            policy.trainable_parameters() + self.critic.trainable_parameters(),
            policy,
            self.critic,
            config,
            runtime,
            updates=updates,
            max_rows=config.forward_batch_size or config.mini_batch_size,
            optimizer=optimizer,
            schedule=schedule,
        )

    def learn(self, rollout: Rollout, *, kl_coef: float, update: int) -> dict[str, float]:
        """One update: experience, then epochs of minibatches. Returns means over the optimiser steps."""
        config = self.config
        experience = self.experience(rollout, kl_coef)
        metrics = {"learning_rate": self.optimisation.learning_rate, **_value_metrics(experience)}
        generator = torch.Generator().manual_seed(config.seed * 104_729 + update)
        steps: list[dict[str, float]] = []
        skipped = 0
        for _ in range(config.ppo_epochs):
            for minibatch in minibatches(
                generator, len(rollout.scores), config.optimizer_batch_size, self.runtime.device
            ):
                step = self.optimisation.backward(experience, minibatch, lambda part: self._losses(part, kl_coef))
                if step["ratio"] > config.ratio_threshold:
                    logger.warning("A minibatch is left out: its mean policy ratio is %.1f.", step["ratio"])
                    self.optimisation.forget_gradients()
                    skipped += 1
                    continue
                if update < config.critic_warmup_steps:
                    self._keep_the_policy()
                steps.append({**step, "grad_norm": self.optimisation.step()})
            if config.early_stopping and steps and steps[-1]["approx_kl"] > 1.5 * config.target_kl:
                break
        self.optimisation.schedule.step()
        return metrics | {"skipped_minibatches": float(skipped), **mean_of_steps(steps)}

    def experience(self, rollout: Rollout, kl_coef: float) -> Experience:
        """Rewards, advantages and returns of a rollout."""
        config, mask = self.config, rollout.response_mask
        rewards = token_rewards(rollout.shaped_scores, rollout.kl, mask, 0.0 if config.kl_in_loss else kl_coef)
        if config.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False)
        advantages, returns = gae(rewards, rollout.values, mask, gamma=config.gamma, lam=config.lam)
        return experience_from(rollout, rewards=rewards, advantages=whiten(advantages, mask), returns=returns)

    def _losses(self, part: Experience, kl_coef: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss summed over the real tokens of `part`, and what is reported of each token."""
        config, mask = self.config, part.response_mask
        states = self.policy.states(part.prompt_ids, part.prompt_mask, part.response_ids, mask)
        logprobs, entropy = self._logprobs_and_entropy(part, states)
        policy_losses, policy_clipped = policy_loss(
            logprobs, part.logprobs, part.advantages, cliprange=config.cliprange, dual_clip=config.dual_clip
        )
        if config.importance_cap is not None:
            weights = truncated_importance(part.logprobs, part.sampler_logprobs, config.importance_cap)
            policy_losses = weights * policy_losses
        value_losses, value_clipped = value_loss(
            self.critic(part, states), part.values, part.returns, cliprange_value=config.cliprange_value
        )
        losses = policy_losses + config.vf_coef * value_losses
        if config.kl_in_loss:
            losses = losses + kl_coef * kl_estimate(logprobs, part.ref_logprobs, config.kl_penalty)
        if entropy is not None:
            losses = losses - config.entropy_coef * entropy
        return masked_sum(losses, mask), {
            "policy_loss": policy_losses,
            "value_loss": value_losses,
            "value_clip_fraction": value_clipped,
            **policy_metrics(logprobs, part, policy_clipped),
        }

    def _logprobs_and_entropy(self, part: Experience, states: Tensor) -> tuple[Tensor, Tensor | None]:
        """The entropy is computed only for a bonus: it needs every logit's gradient."""
        given = (states, part.response_ids, part.response_mask, self.config.temperature)
        if self.config.entropy_coef:
            return self.policy.logprobs_and_entropy(*given)
        return self.policy.logprobs(*given), None

    def _keep_the_policy(self) -> None:
        """While the critic warms up, the policy has no gradient; on a shared trunk only the value head learns."""
        for parameter in self.policy.parameters():
            parameter.grad = None

    def state(self) -> dict[str, Any]:
        return {"critic": trainable_tensors(self.critic), "optimisation": self.optimisation.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        load_tensors(self.critic, state["critic"])
        self.optimisation.load_state(state["optimisation"])


class PPOTrainer(OnlineTrainer):
    """`OnlineTrainer` with PPO as its learner: `PPOTrainer(config, prompts=…, reward=…).train()`."""

    make_learner = PPO


def _value_metrics(experience: Experience) -> dict[str, float]:
    values, returns, mask = experience.values, experience.returns, experience.response_mask
    return {
        "value_mean": float(masked_mean(values, mask)),
        "explained_variance": float(explained_variance(values, returns, mask)),
    }
