"""REINFORCE++: PPO's token-level loss without a critic and without groups (Hu et al. 2025, arXiv 2501.03262).

    A_t = Σ_{s ≥ t} γ^(s−t) r_s,  r_t = −β KL_t, plus the score on the last token
    L = mean over all tokens of −min(ρ_t Â_t, clip(ρ_t, 1 ± ε) Â_t),  Â = (A − mean) / std over the whole batch

The only baseline is the mean over the tokens of the batch (of all processes), so a prompt needs one response only; the
variance that a critic or a group would explain stays in the advantages. Where this departs from the paper: its clipping
and scaling of rewards are the shared settings `score_clip` and `use_score_scaling`, off by default; its variant with a
baseline per prompt is not implemented.
"""

from dataclasses import dataclass

from torch import Tensor

from deep_rlhf.algorithms.critic_free import CriticFreeConfig, CriticFreeLearner
from deep_rlhf.algorithms.online.metrics import mean_of_steps, policy_metrics
from deep_rlhf.algorithms.online.trainer import OnlineTrainer
from deep_rlhf.ops.advantages import gae, token_rewards
from deep_rlhf.ops.losses import policy_loss
from deep_rlhf.ops.masked import masked_sum, whiten
from deep_rlhf.rollout.records import experience_from
from deep_rlhf.settings import setting
from deep_rlhf.types import Experience, Rollout


@dataclass(frozen=True)
class ReinforcePlusPlusConfig(CriticFreeConfig):
    """The settings of REINFORCE++. Raises ConfigError for settings that cannot work."""

    exp_name: str = setting("reinforce_plus_plus", "name of the run")
    gamma: float = setting(1.0, "discount factor γ per token", least=0, most=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_kl_in_reward()


class ReinforcePlusPlus(CriticFreeLearner):
    """The learner of REINFORCE++: one update from a rollout."""

    config: ReinforcePlusPlusConfig

    def learn(self, rollout: Rollout, *, kl_coef: float, update: int) -> dict[str, float]:
        """Makes one update; returns means over the optimiser steps."""
        experience = self.experience(rollout, kl_coef)
        learning_rate = self.optimisation.learning_rate
        steps = []
        for minibatch in self.minibatches(update):
            step = self.optimisation.backward(experience, minibatch, self._losses)
            steps.append({**step, "grad_norm": self.optimisation.step()})
        self.optimisation.schedule.step()
        return {"learning_rate": learning_rate, **mean_of_steps(steps)}

    def experience(self, rollout: Rollout, kl_coef: float) -> Experience:
        """Computes rewards per token, returns, and returns whitened over the batch as advantages."""
        mask = rollout.response_mask
        rewards = token_rewards(rollout.shaped_scores, rollout.kl, mask, kl_coef)
        # without values and with λ = 1 the advantage is the return
        _, returns = gae(rewards, rollout.values, mask, gamma=self.config.gamma, lam=1.0)
        return experience_from(rollout, rewards=rewards, advantages=whiten(returns, mask), returns=returns)

    def _losses(self, part: Experience) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss summed over the real tokens of `part`, and the metrics per token [n, R]."""
        logprobs = self.logprobs(part)
        losses, clipped = policy_loss(logprobs, part.logprobs, part.advantages, cliprange=self.config.cliprange)
        return masked_sum(losses, part.response_mask), policy_metrics(logprobs, part, clipped)


class ReinforcePlusPlusTrainer(OnlineTrainer):
    """Trains with REINFORCE++: `ReinforcePlusPlusTrainer(config, prompts=…, reward=…).train()`."""

    make_learner = ReinforcePlusPlus
