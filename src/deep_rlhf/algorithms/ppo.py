"""Proximal policy optimisation of a language model against a reward on text (Schulman 2017; Ziegler 2019).

One update: sample a response to each prompt and score the text (`online.trainer`), turn the scores and the KL penalty
per token into advantages (GAE), then make a few passes over the batch with clipped policy and value losses. The maths
is in `ops`, the sampling in `rollout`. Where this departs from the sources:
- a token is drawn by inverting the distribution at a given uniform, so it depends on neither padding nor neighbours;
- losses are divided by the global number of real tokens, so the cut into forward passes changes nothing;
- Adam's eps is 1e-5 (Huang et al. 2024), added after the bias correction as PyTorch does.
"""

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from deep_rlhf.algorithms.online.config import OnlineConfig
from deep_rlhf.algorithms.online.metrics import mean_of_steps, policy_metrics
from deep_rlhf.algorithms.online.optimiser_step import Optimisation, minibatches
from deep_rlhf.algorithms.online.state import load_tensors, trainable_tensors
from deep_rlhf.algorithms.online.trainer import OnlineTrainer
from deep_rlhf.errors import ConfigError
from deep_rlhf.models.critic import Critic, make_critic
from deep_rlhf.models.policy import Policy
from deep_rlhf.ops.advantages import gae, token_rewards
from deep_rlhf.ops.kl import kl_estimate
from deep_rlhf.ops.losses import explained_variance, policy_loss, truncated_importance, value_loss
from deep_rlhf.ops.masked import masked_mean, masked_sum, whiten
from deep_rlhf.rollout.records import experience_from
from deep_rlhf.runtime.processes import Runtime
from deep_rlhf.settings import setting
from deep_rlhf.types import CriticKind, Experience, Rollout, Scorer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PPOConfig(OnlineConfig):
    """The settings of PPO, named as in TRL ≤ 0.11. Raises ConfigError for settings that cannot work."""

    mini_batch_size: int | None = setting(None, "responses per minibatch; default: batch_size", least=1)
    gradient_accumulation_steps: int = setting(1, "minibatches per optimiser step", least=1)
    ppo_epochs: int = setting(4, "passes over each batch", least=1)
    early_stopping: bool = setting(False, "make no further pass once approx_kl exceeds 1.5 × target_kl")
    target_kl: float = setting(
        1.0, "KL from the policy that sampled the batch, in nats per token, for early_stopping", above=0
    )
    ratio_threshold: float = setting(10.0, "skip minibatches whose mean policy ratio is larger", above=1)
    gamma: float = setting(1.0, "discount factor γ per token", least=0, most=1)
    lam: float = setting(0.95, "λ of generalised advantage estimation", least=0, most=1)
    cliprange: float = setting(0.2, "clip range ε of the policy ratio: 1 ± ε", above=0)
    dual_clip: float | None = setting(
        None, "upper bound of the policy ratio where the advantage is negative; 3 in Ye et al. 2020", above=1
    )
    cliprange_value: float = setting(0.2, "clip range of the change of a value, in units of reward", above=0)
    vf_coef: float = setting(0.1, "weight of the value loss", least=0)
    entropy_coef: float = setting(0.0, "weight of the entropy bonus", least=0)
    whiten_rewards: bool = setting(False, "divide the rewards by their standard deviation before GAE")
    critic: CriticKind = setting(
        "shared", "value head on the policy's trunk, on a copy of it (separate), or on a copy of the reward model's"
    )
    critic_warmup_updates: int = setting(0, "number of first updates in which only the critic learns", least=0)
    importance_cap: float | None = setting(
        None,
        "cap of truncated importance sampling weights π_train/π_sampler; 2 is common; not needed with the built-in"
        " sampler",
        least=1,
    )

    @property
    def optimizer_batch_size(self) -> int:
        """Responses per optimiser step."""
        return (self.mini_batch_size or self.batch_size) * self.gradient_accumulation_steps

    @property
    def recomputes_logprobs(self) -> bool:
        """Only truncated importance sampling compares the trainer's log-probabilities with the sampler's."""
        return self.importance_cap is not None

    def adapts_kl_coef(self, update: int) -> bool:
        """Not while only the critic learns: the KL is then 0 whatever its coefficient."""
        return super().adapts_kl_coef(update) and update >= self.critic_warmup_updates

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.optimizer_batch_size > self.batch_size:
            raise ConfigError(
                f"mini_batch_size × gradient_accumulation_steps is {self.optimizer_batch_size}, more than the"
                f" batch_size={self.batch_size} of one update: lower one of them."
            )
        if self.dual_clip is not None and self.dual_clip <= 1 + self.cliprange:
            raise ConfigError(
                f"dual_clip={self.dual_clip} must be larger than 1 + cliprange, or cliprange has no effect."
            )


class PPO:
    """The learner of PPO: one update from a rollout."""

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
        """`critic` replaces the one that `config.critic` describes; `optimizer` and `schedule` as in `Optimisation`.

        Raises ConfigError if the critic's warm-up leaves no update to the policy.
        """
        if config.critic_warmup_updates >= updates:
            raise ConfigError(
                f"critic_warmup_updates={config.critic_warmup_updates} leaves none of the {updates} updates to the"
                " policy: lower it, or raise steps."
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
        """Makes one update: advantages, then passes over the minibatches. Returns means over the optimiser steps."""
        config = self.config
        experience = self.experience(rollout, kl_coef)
        metrics = {"learning_rate": self.optimisation.learning_rate, **_value_metrics(experience)}
        generator = torch.Generator().manual_seed(config.seed * 104_729 + update)
        steps: list[dict[str, float]] = []
        skipped, approx_kl = 0, 0.0
        for _ in range(config.ppo_epochs):
            for minibatch in minibatches(
                generator, len(rollout.scores), config.optimizer_batch_size, self.runtime.device
            ):
                step = self.optimisation.backward(experience, minibatch, lambda part: self._losses(part, kl_coef))
                approx_kl = step["approx_kl"]  # also of a minibatch that is skipped
                if step["ratio"] > config.ratio_threshold:
                    logger.warning("A minibatch is skipped: its mean policy ratio is %.1f.", step["ratio"])
                    self.optimisation.clear_gradients()
                    skipped += 1
                    continue
                if update < config.critic_warmup_updates:
                    self._drop_policy_gradients()
                steps.append({**step, "grad_norm": self.optimisation.step()})
            if config.early_stopping and approx_kl > 1.5 * config.target_kl:
                break
        self.optimisation.schedule.step()
        return metrics | {"skipped_minibatches": float(skipped), **mean_of_steps(steps)}

    def experience(self, rollout: Rollout, kl_coef: float) -> Experience:
        """Computes rewards, advantages and returns of a rollout, [N, R]."""
        config, mask = self.config, rollout.response_mask
        rewards = token_rewards(rollout.shaped_scores, rollout.kl, mask, 0.0 if config.kl_in_loss else kl_coef)
        if config.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False)
        advantages, returns = gae(rewards, rollout.values, mask, gamma=config.gamma, lam=config.lam)
        return experience_from(rollout, rewards=rewards, advantages=whiten(advantages, mask), returns=returns)

    def _losses(self, part: Experience, kl_coef: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss summed over the real tokens of `part`, and the metrics per token [n, R]."""
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
        """Both [n, R] with gradient; the entropy only for its bonus, since it needs the gradient of every logit."""
        inputs = (states, part.response_ids, part.response_mask, self.config.temperature)
        if self.config.entropy_coef:
            return self.policy.logprobs_and_entropy(*inputs)
        return self.policy.logprobs(*inputs), None

    def _drop_policy_gradients(self) -> None:
        """Drops the policy's gradients while the critic warms up; on a shared trunk only the value head learns."""
        for parameter in self.policy.parameters():
            parameter.grad = None

    def state(self) -> dict[str, Any]:
        """The weights of the critic and the state of the optimiser."""
        return {"critic": trainable_tensors(self.critic), "optimisation": self.optimisation.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restores what `state` returned."""
        load_tensors(self.critic, state["critic"])
        self.optimisation.load_state(state["optimisation"])


class PPOTrainer(OnlineTrainer):
    """Trains with PPO: `PPOTrainer(config, prompts=…, reward=…).train()`."""

    make_learner = PPO


def _value_metrics(experience: Experience) -> dict[str, float]:
    values, returns, mask = experience.values, experience.returns, experience.response_mask
    return {
        "value_mean": float(masked_mean(values, mask)),
        "explained_variance": float(explained_variance(values, returns, mask)),
    }
