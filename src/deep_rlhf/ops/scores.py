"""Shaping of scores: from the members' scores of a response to the one number that the policy maximises."""

from typing import Literal

import torch
from torch import Tensor

EnsembleKind = Literal["mean", "uncertainty", "min"]
MissingEOS = Literal["replace", "subtract"]
Moments = tuple[float, float, float]  # count, mean and biased variance of the values so far

FIRST_MOMENTS: Moments = (1e-24, 0.0, 1.0)  # before any value, as in TRL


def ensemble_score(scores: Tensor, kind: EnsembleKind, std_coef: float) -> Tensor:
    """One score per response from the K members' scores, [N, K] -> [N] (Coste et al. 2023).

    `mean`; `uncertainty`: mean − λ·std; `min`: the worst case. The std is unbiased, and 0 for one member; the paper
    uses the variance, whose unit is not that of a reward. λ = `std_coef` is used by `uncertainty` alone. Raises
    ValueError for another kind.
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
    """Penalises the scores [N] of responses that did not end with EOS (False in finished [N] bool).

    `replace`: their score becomes −penalty (Huang et al. 2024, with penalty 1); `subtract`: score − penalty (TRL).
    Raises ValueError for another mode.
    """
    if mode == "replace":
        penalised = torch.full_like(scores, -penalty)
    elif mode == "subtract":
        penalised = scores - penalty
    else:
        raise ValueError(f"unknown penalty for a missing EOS {mode!r}: choose replace or subtract")
    return torch.where(finished, scores, penalised)


def updated_moments(moments: Moments, values: Tensor) -> Moments:
    """Running moments including new `values` [any shape, at least one]; start with `FIRST_MOMENTS`.

    The update of Chan et al. 1979 for two sets, as in TRL ≤ 0.11 (trl/core.py, RunningMoments), in float64.
    """
    count, mean, var = moments
    new = values.double()
    new_count, new_mean, new_var = new.numel(), new.mean().item(), new.var(correction=0).item()
    total = count + new_count
    delta = new_mean - mean
    squares = var * count + new_var * new_count + delta**2 * count * new_count / total
    return total, mean + delta * new_count / total, squares / total


def moments_std(moments: Moments) -> float:
    """The unbiased standard deviation √(var · n/(n − 1)); 1 for fewer than two values."""
    count, _, var = moments
    return (var * count / (count - 1)) ** 0.5 if count > 1 else 1.0


def scaled_scores(scores: Tensor, mean: float, std: float, *, center: bool, clip: float | None) -> Tensor:
    """Scores [any shape] divided by (std + the dtype's epsilon), then clamped to ±clip.

    With `center` the mean is subtracted first. In TRL ≤ 0.11 (trl/trainer/ppo_trainer.py, step) the division by the
    running std is use_score_scaling, the centring use_score_norm, and the clamp score_clip.
    """
    shifted = scores - mean if center else scores
    scaled = shifted / (std + torch.finfo(scores.dtype).eps)
    return scaled if clip is None else scaled.clamp(-clip, clip)
