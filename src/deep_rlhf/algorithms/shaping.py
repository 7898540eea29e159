"""From the reward's own numbers to the one per response that an algorithm maximises."""

import dataclasses

import torch
from torch import Tensor

from deep_rlhf.algorithms.online_config import OnlineConfig
from deep_rlhf.ops.scores import (
    FIRST_MOMENTS,
    Moments,
    ensemble_score,
    moments_std,
    penalise_missing_eos,
    scaled_scores,
    updated_moments,
)
from deep_rlhf.types import Rollout, UserError


class ScoreShaping:
    """The ensemble's rule, the penalty for a missing EOS, the running scale and the clipping, in this order."""

    def __init__(self, config: OnlineConfig) -> None:
        self.config = config
        self.moments: Moments = FIRST_MOMENTS  # of every score seen by the running scale

    def combined(self, scores: Tensor) -> Tensor:
        """One number per response from the members' [N, K]. Raises UserError if a rule for several has but one."""
        kind = self.config.ensemble_reward
        if kind != "mean" and scores.shape[1] == 1:
            raise UserError(
                f"ensemble_reward={kind} compares the members of an ensemble, and this reward is a single number:"
                " use ensemble_reward=mean."
            )
        return ensemble_score(scores, kind, self.config.ensemble_std_coef or 0.0)

    def shaped(self, rollout: Rollout) -> Rollout:
        """The rollout of a whole batch with its combined scores penalised, scaled and clipped."""
        config, scores = self.config, rollout.shaped_scores
        if config.missing_eos_penalty is not None:
            scores = penalise_missing_eos(scores, rollout.finished, config.missing_eos_penalty, config.missing_eos_mode)
        mean, std = 0.0, 1.0
        if config.use_score_scaling:
            seen = scores[torch.isfinite(scores)]
            self.moments = updated_moments(self.moments, seen) if len(seen) else self.moments
            mean, std = self.moments[1], moments_std(self.moments)
        if config.use_score_scaling or config.score_clip is not None:
            scores = scaled_scores(scores, mean, std, center=config.use_score_norm, clip=config.score_clip)
        return dataclasses.replace(rollout, shaped_scores=scores)


def rollout_problem(rollout: Rollout) -> str | None:
    """The first sample with a reward, log-probability or value that is no finite number, in words; None without one."""
    for name, what in (("shaped_scores", "reward"), ("logprobs", "log-probability"), ("kl", "KL"), ("values", "value")):
        values = getattr(rollout, name).reshape(len(rollout.prompts), -1)
        bad = (~torch.isfinite(values)).any(1).nonzero()
        if len(bad):
            row = int(bad[0])
            number = float(values[row][~torch.isfinite(values[row])][0])
            prompt, response = rollout.prompts[row][-60:], rollout.responses[row][:60]
            return f"the {what} of sample {row} is {number} (prompt {prompt!r}, response {response!r})"
    return None
