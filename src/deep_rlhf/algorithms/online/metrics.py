"""The metrics of an update: what a batch was like, and how far the policy moved."""

from typing import Any

import torch
from torch import Tensor

from deep_rlhf.ops.masked import masked_mean
from deep_rlhf.types import Experience, Rollout

SAMPLES_PER_UPDATE = 4  # that are logged


def rollout_metrics(rollout: Rollout) -> dict[str, float]:
    """The metrics of a batch before anything is learned from it; KL in nats per response, entropy in nats per token."""
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


def sample_rows(rollout: Rollout, step: float) -> list[dict[str, Any]]:
    """The first samples of a batch, as the log holds them."""
    count = min(SAMPLES_PER_UPDATE, len(rollout.responses))
    return [
        {
            "step": step,
            "prompt": rollout.prompts[row],
            "response": rollout.responses[row],
            "score": float(rollout.scores[row]),
        }
        for row in range(count)
    ]


def policy_metrics(logprobs: Tensor, part: Experience, clipped: Tensor) -> dict[str, Tensor]:
    """Per token, [n, R]: how far the policy has moved since the rollout.

    logprobs [n, R] are the policy's now; `clipped` [n, R] or [n, 1] is True where clipping removed the gradient.
    """
    logprobs = logprobs.detach()
    change = logprobs - part.logprobs
    return {
        "policy_clip_fraction": clipped.expand_as(change),
        "approx_kl": 0.5 * change**2,
        "ratio": change.exp(),
        "sampler_logprob_gap": (logprobs - part.sampler_logprobs).abs(),
    }


def mean_of_steps(steps: list[dict[str, float]]) -> dict[str, float]:
    """The means over the optimiser steps of an update, and their number.

    `sampler_logprob_gap` is the first step's alone: after it the policy is no longer the one that sampled.
    """
    means = {name: sum(step[name] for step in steps) / len(steps) for name in (steps[0] if steps else {})}
    if steps:
        means["sampler_logprob_gap"] = steps[0]["sampler_logprob_gap"]
    return {"optimizer_steps": float(len(steps)), **means}
