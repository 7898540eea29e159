"""Batches with a NaN or an infinity: finds the first bad number, and writes such a batch to a file."""

import logging
from pathlib import Path

import torch

from deep_rlhf.runtime.run_directory import write_summary
from deep_rlhf.types import Rollout

logger = logging.getLogger(__name__)


def rollout_problem(rollout: Rollout) -> str | None:
    """Describes the first sample with a reward, log-probability, KL or value that is not finite; None without one.

    The raw rewards of all ensemble members count: neither clipping nor an ensemble rule makes an infinity acceptable.
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


def set_aside(path: Path, rollout: Rollout, *, step: int, reason: str) -> None:
    """Writes the texts and rewards of a batch that ended its update to a JSON file for inspection.

    A disk that refuses the file is only warned about.
    """
    rows = zip(rollout.prompts, rollout.responses, rollout.scores.tolist(), strict=True)
    samples = [{"prompt": prompt, "response": response, "score": repr(score)} for prompt, response, score in rows]
    try:
        write_summary(path, {"step": step, "reason": reason, "samples": samples})
    except OSError as error:
        logger.warning("The batch could not be written to '%s': %s.", path, error.strerror)
    else:
        logger.warning("The batch was written to '%s'.", path)
