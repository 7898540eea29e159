"""The statistics of `PPOTrainer.step` under TRL's keys (TRL's logging guide): floats and NumPy arrays."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from deep_rlhf.ops.masked import masked_mean, masked_var
from deep_rlhf.types import Experience

_LEARNED = {  # TRL's key -> metric of the learner, a mean over its optimiser steps
    "ppo/loss/policy": "policy_loss",
    "ppo/loss/value": "value_loss",
    "ppo/loss/total": "loss",
    "ppo/policy/approxkl": "approx_kl",
    "ppo/policy/clipfrac": "policy_clip_fraction",
    "ppo/policy/ratio": "ratio",
    "ppo/val/clipfrac": "value_clip_fraction",
    "ppo/val/var_explained": "explained_variance",
    "ppo/learning_rate": "learning_rate",
}


def step_stats(experience: Experience, learned: dict[str, float], kl_coef: float) -> dict[str, Any]:
    """The statistics of one step; values and advantages are those from before the update."""
    mask, values, returns = experience.response_mask, experience.values, experience.returns
    kl_per_response = torch.where(mask, experience.kl, 0.0).sum(1)
    figures = {
        "objective/kl": kl_per_response.mean(),
        "objective/entropy": torch.where(mask, -experience.logprobs, 0.0).sum(1).mean(),
        "ppo/mean_non_score_reward": -kl_coef * masked_mean(experience.kl, mask),
        "ppo/mean_scores": experience.shaped_scores.mean(),
        "ppo/std_scores": _std(experience.shaped_scores),
        "ppo/policy/entropy": masked_mean(experience.entropy, mask),
        "ppo/policy/advantages_mean": masked_mean(experience.advantages, mask),
        "ppo/returns/mean": masked_mean(returns, mask),
        "ppo/returns/var": masked_var(returns, mask),
        "ppo/val/vpred": masked_mean(values, mask),
        "ppo/val/mean": masked_mean(values, mask),
        "ppo/val/var": masked_var(values, mask),
        "ppo/val/error": masked_mean((values - returns) ** 2, mask),
    }
    distributions = {
        "objective/kl_dist": kl_per_response,
        "objective/logprobs": experience.logprobs,
        "objective/ref_logprobs": experience.ref_logprobs,
        "ppo/policy/advantages": experience.advantages[mask],
    }
    for name, lengths in (("queries", experience.prompt_mask.sum(1)), ("responses", mask.sum(1))):
        figures[f"tokens/{name}_len_mean"] = lengths.float().mean()
        figures[f"tokens/{name}_len_std"] = _std(lengths.float())
        distributions[f"tokens/{name}_dist"] = lengths.float()
    return {
        "objective/kl_coef": np.float64(kl_coef),
        **{name: np.float64(value.item()) for name, value in figures.items()},
        **{name: np.float64(learned.get(source, float("nan"))) for name, source in _LEARNED.items()},
        "ppo/policy/policykl": np.float64(learned.get("approx_kl", float("nan"))),
        **{name: values.detach().float().cpu().numpy() for name, values in distributions.items()},
    }


def _std(values: Tensor) -> Tensor:
    """The standard deviation as in TRL, but 0 for a single value."""
    return values.std() if len(values) > 1 else torch.zeros(())
