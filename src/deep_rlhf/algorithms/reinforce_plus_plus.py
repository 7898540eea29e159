"""REINFORCE++: PPO's token-level loss without a critic and without groups (Hu et al. 2025, arXiv 2501.03262).

    A_t = Σ_{s ≥ t} γ^(s−t) r_s,  r_t = −β KL_t, plus the score on the last token
    L = mean over all tokens of −min(ρ_t Â_t, clip(ρ_t, 1 ± ε) Â_t),  Â = (A − mean) / std over the whole batch

The one baseline is the mean over the tokens of the batch (of all processes), so a prompt needs one response only; what
a critic or a group would explain stays in the advantages as noise. Where it departs from the paper: its clipping and
scaling of rewards are the shared options `score_clip` and `use_score_scaling`, off by default, and its variant with a
baseline per prompt is not here.
"""

from dataclasses import dataclass, field

from torch import Tensor

from deep_rlhf.algorithms.critic_free import (
    CriticFreeConfig,
    CriticFreeLearner,
)
from deep_rlhf.algorithms.online.optimiser_step import mean_of_steps, policy_metrics
from deep_rlhf.algorithms.online.trainer import OnlineTrainer
from deep_rlhf.errors import UserError
from deep_rlhf.ops.advantages import gae, token_rewards
from deep_rlhf.ops.losses import policy_loss
from deep_rlhf.ops.masked import masked_sum, whiten
from deep_rlhf.rollout.records import experience_from
from deep_rlhf.types import Experience, Rollout


@dataclass(frozen=True)
class ReinforcePlusPlusConfig(CriticFreeConfig):
    """What REINFORCE++ adds to the settings of every online algorithm. Raises UserError for values that cannot work."""

    exp_name: str = field(default="reinforce_plus_plus", metadata={"help": "the run's name"})
    gamma: float = field(default=1.0, metadata={"help": "discount"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_kl_in_reward()
        if not 0 <= self.gamma <= 1:
            raise UserError(f"gamma must lie between 0 and 1, not {self.gamma}.")


class ReinforcePlusPlus(CriticFreeLearner):
    """The learner: what REINFORCE++ does with a rollout."""

    config: ReinforcePlusPlusConfig

    def learn(self, rollout: Rollout, *, kl_coef: float, update: int) -> dict[str, float]:
        """One update; returns means over the optimiser steps."""
        experience = self.experience(rollout, kl_coef)
        learning_rate = self.optimisation.learning_rate
        steps = []
        for minibatch in self.minibatches(update):
            step = self.optimisation.backward(experience, minibatch, self._losses)
            steps.append({**step, "grad_norm": self.optimisation.step()})
        self.optimisation.schedule.step()
        return {"learning_rate": learning_rate, **mean_of_steps(steps)}

    def experience(self, rollout: Rollout, kl_coef: float) -> Experience:
        """Per-token rewards, their discounted sums to the end, and these normalised over the batch."""
        mask = rollout.response_mask
        rewards = token_rewards(rollout.shaped_scores, rollout.kl, mask, kl_coef)
        # without values and with λ = 1 the advantage is the return
        _, returns = gae(rewards, rollout.values, mask, gamma=self.config.gamma, lam=1.0)
        return experience_from(rollout, rewards=rewards, advantages=whiten(returns, mask), returns=returns)

    def _losses(self, part: Experience) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss summed over the real tokens of `part`, and what is reported of each token."""
        logprobs = self.logprobs(part)
        losses, clipped = policy_loss(logprobs, part.logprobs, part.advantages, cliprange=self.config.cliprange)
        return masked_sum(losses, part.response_mask), policy_metrics(logprobs, part, clipped)


class ReinforcePlusPlusTrainer(OnlineTrainer):
    """`OnlineTrainer` with REINFORCE++: `ReinforcePlusPlusTrainer(config, prompts=…, reward=…).train()`."""

    make_learner = ReinforcePlusPlus
