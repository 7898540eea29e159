"""From the reward model's scores to the one number per answer that the policy is trained on."""

from typing import Literal

import torch
from torch import Tensor

EnsembleKind = Literal["mean", "uncertainty", "min"]
MissingEOS = Literal["replace", "subtract"]
Moments = tuple[float, float, float]  # how many values were seen, their mean, their (biased) variance

FIRST_MOMENTS: Moments = (1e-24, 0.0, 1.0)  # of nothing seen yet, as in TRL


def ensemble_score(scores: Tensor, kind: EnsembleKind, std_coef: float) -> Tensor:
    """One score per answer from the K members', [N, K] -> [N] (Coste et al. 2023).

    `mean`; `uncertainty` mean − λ·std, unbiased and 0 for one member (the paper has the variance, which is no reward's
    unit); `min` the worst case. `std_coef` λ counts for `uncertainty` alone.
    """
    if kind == "mean":
        return scores.mean(1)
    if kind == "uncertainty":
        spread = scores.std(1) if scores.shape[1] > 1 else torch.zeros_like(scores[:, 0])
        return scores.mean(1) - std_coef * spread
    if kind == "min":
        return scores.amin(1)
    raise ValueError(f"unknown ensemble score {kind!r}: choose mean, uncertainty or min")


def penalise_missing_eos(scores: Tensor, finished: Tensor, penalty: float, mode: MissingEOS) -> Tensor:
    """Scores [N] of answers, where those that did not end with EOS (finished [N] bool False) pay for it.

    `replace`: their score is −penalty (Huang et al. 2024, with penalty 1); `subtract`: it is `penalty` less (TRL).
    """
    if mode == "replace":
        punished = torch.full_like(scores, -penalty)
    elif mode == "subtract":
        punished = scores - penalty
    else:
        raise ValueError(f"unknown penalty for a missing EOS {mode!r}: choose replace or subtract")
    return torch.where(finished, scores, punished)


def updated_moments(moments: Moments, values: Tensor) -> Moments:
    """The moments after `values` [any shape, at least one] were seen too; start from `FIRST_MOMENTS`.

    Chan et al. 1979's update for two sets, as in TRL ≤ 0.11 (trl/core.py, RunningMoments), in float64 throughout.
    """
    count, mean, var = moments
    new = values.double()
    new_count, new_mean, new_var = new.numel(), new.mean().item(), new.var(correction=0).item()
    total = count + new_count
    delta = new_mean - mean
    squares = var * count + new_var * new_count + delta**2 * count * new_count / total
    return total, mean + delta * new_count / total, squares / total


def moments_std(moments: Moments) -> float:
    """The unbiased standard deviation √(var · n/(n − 1)); 1 before two values were seen, where it is undefined."""
    count, _, var = moments
    return (var * count / (count - 1)) ** 0.5 if count > 1 else 1.0


def scaled_scores(scores: Tensor, mean: float, std: float, *, center: bool, clip: float | None) -> Tensor:
    """Scores [any shape] divided by (std + the dtype's epsilon), then clamped to ±clip.

    With `center` the mean is taken off first. TRL ≤ 0.11 (trl/trainer/ppo_trainer.py, step): use_score_scaling is the
    division by the running std, use_score_norm the centring, score_clip the clamp.
    """
    shifted = scores - mean if center else scores
    scaled = shifted / (std + torch.finfo(scores.dtype).eps)
    return scaled if clip is None else scaled.clamp(-clip, clip)
