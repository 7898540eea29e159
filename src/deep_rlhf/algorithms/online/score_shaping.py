"""From the scores of the reward to the one number per response that an algorithm maximises."""

import torch
from torch import Tensor

from deep_rlhf.algorithms.online.config import OnlineConfig
from deep_rlhf.errors import ConfigError
from deep_rlhf.ops.scores import (
    FIRST_MOMENTS,
    Moments,
    ensemble_score,
    moments_std,
    penalise_missing_eos,
    scaled_scores,
    updated_moments,
)
from deep_rlhf.runtime.processes import Runtime


class ScoreShaping:
    """The ensemble rule, the penalty for a missing EOS, the running scale and the clipping, in this order."""

    def __init__(self, config: OnlineConfig) -> None:
        self.config = config
        self.moments: Moments = FIRST_MOMENTS  # of all scores so far, for the running scale

    def shaped(self, scores: Tensor, finished: Tensor, runtime: Runtime) -> Tensor:
        """The shaped scores [n] of this process's responses; the running scale is that of all processes' responses.

        scores [n, K] are the ensemble members', finished [n] is True for a response that ended with EOS. Raises
        ConfigError if an ensemble rule meets a single score.
        """
        gathered = runtime.gather((scores.cpu(), finished.cpu()))
        all_scores, all_finished = (torch.cat(parts) for parts in zip(*gathered, strict=True))
        return runtime.share(self._shaped(all_scores, all_finished))

    def _shaped(self, member_scores: Tensor, finished: Tensor) -> Tensor:
        """The shaped scores [N] of a whole batch. A score that is not finite leaves the running scale unchanged."""
        config = self.config
        kind = config.ensemble_reward
        if kind != "mean" and member_scores.shape[1] == 1:
            raise ConfigError(
                f"ensemble_reward={kind} compares the members of an ensemble, and this reward is a single number:"
                " use ensemble_reward=mean."
            )
        scores = ensemble_score(member_scores, kind, config.ensemble_std_coef or 0.0)
        if config.missing_eos_penalty is not None:
            scores = penalise_missing_eos(scores, finished, config.missing_eos_penalty, config.missing_eos_mode)
        mean, std = 0.0, 1.0
        if config.use_score_scaling:
            if torch.isfinite(member_scores).all() and torch.isfinite(scores).all():
                self.moments = updated_moments(self.moments, scores)
            mean, std = self.moments[1], moments_std(self.moments)
        if config.use_score_scaling or config.score_clip is not None:
            scores = scaled_scores(scores, mean, std, center=config.use_score_norm, clip=config.score_clip)
        return scores
