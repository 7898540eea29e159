"""From the reward's own numbers to the one per response that an algorithm maximises; what a rollout tells of itself."""

import dataclasses

import torch
from torch import Tensor

from deep_rlhf.algorithms.online.config import OnlineConfig
from deep_rlhf.errors import UserError
from deep_rlhf.ops.masked import masked_mean
from deep_rlhf.ops.scores import (
    FIRST_MOMENTS,
    Moments,
    ensemble_score,
    moments_std,
    penalise_missing_eos,
    scaled_scores,
    updated_moments,
)
from deep_rlhf.types import Rollout


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
        """The rollout of a whole batch with its combined scores penalised, scaled and clipped.

        A batch with a score that is no finite number leaves the running scale as it is.
        """
        config, scores = self.config, rollout.shaped_scores
        if config.missing_eos_penalty is not None:
            scores = penalise_missing_eos(scores, rollout.finished, config.missing_eos_penalty, config.missing_eos_mode)
        mean, std = 0.0, 1.0
        if config.use_score_scaling:
            if torch.isfinite(rollout.scores).all() and torch.isfinite(scores).all():
                self.moments = updated_moments(self.moments, scores)
            mean, std = self.moments[1], moments_std(self.moments)
        if config.use_score_scaling or config.score_clip is not None:
            scores = scaled_scores(scores, mean, std, center=config.use_score_norm, clip=config.score_clip)
        return dataclasses.replace(rollout, shaped_scores=scores)


def rollout_metrics(rollout: Rollout) -> dict[str, float]:
    """The metrics of a batch before anything is learned from it."""
    mask = rollout.response_mask
    kl = torch.where(mask, rollout.logprobs - rollout.ref_logprobs, 0.0).sum(1)
    return {
        "score_mean": float(rollout.scores.mean()),
        "score_std": float(rollout.scores.std(correction=0)),
        "score_member_std": float(rollout.score_std.mean()),
        "shaped_score_mean": float(rollout.shaped_scores.mean()),
        "kl": float(kl.mean()),
        "entropy": float(masked_mean(rollout.entropy, mask)),
        "response_tokens": float(mask.sum(1).float().mean()),
        "missing_eos": float(1.0 - rollout.finished.float().mean()),
    }


def rollout_problem(rollout: Rollout) -> str | None:
    """The first sample with a reward, log-probability or value that is no finite number, in words; None without one.

    The reward counts as it came, every member's: neither clipping nor a rule for ensembles makes an infinity good.
    """
    names = {
        "scores": "reward",
        "shaped_scores": "shaped reward",
        "logprobs": "log-probability",
        "kl": "KL",
        "values": "value",
    }
    for name, what in names.items():
        values = getattr(rollout, name).reshape(len(rollout.prompts), -1)
        bad = (~torch.isfinite(values)).any(1).nonzero()
        if len(bad):
            row = int(bad[0])
            number = float(values[row][~torch.isfinite(values[row])][0])
            prompt, response = rollout.prompts[row][-60:], rollout.responses[row][:60]
            return f"the {what} of sample {row} is {number} (prompt {prompt!r}, response {response!r})"
    return None
