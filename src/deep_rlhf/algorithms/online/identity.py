"""The identity of a run: everything that decides what it computes, so that no other run continues its checkpoints."""

import dataclasses
import hashlib
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from deep_rlhf.algorithms.online.config import OnlineConfig
from deep_rlhf.models.policy import Reference
from deep_rlhf.models.reward import RewardModel
from deep_rlhf.types import Scorer


def run_identity(
    config: OnlineConfig,
    prompts: Sequence[str],
    reference: Reference,
    scorer: Scorer,
    *,
    updates: int,
    processes: int,
    without: Collection[str],
) -> dict[str, Any]:
    """The settings except `without`, and digests of the prompts, the reference and the reward model.

    `steps` and `template` count as what they were resolved to, so settings from the command line and from a saved
    config.yaml have the same identity. Empty without an output_dir: such a run cannot be resumed.
    """
    if config.output_dir is None:
        return {}
    without = {*without, "template"}  # the prompts contain it
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in without}
    settings["steps"] = updates * config.batch_size
    texts = hashlib.sha256("\0".join(prompts).encode(errors="surrogatepass")).hexdigest()[:16]
    identity = {**settings, "processes": processes, "prompts": texts}
    with reference.model() as frozen:  # adapters are switched off in the reference
        weights = [tensor for name, tensor in frozen.named_parameters() if "lora_" not in name]
    identity["weights of the reference"] = _fingerprint(weights)
    if isinstance(scorer, RewardModel):
        identity["weights of the reward model"] = _fingerprint([*scorer.model.parameters(), scorer.mean, scorer.std])
    return identity


def _fingerprint(tensors: Iterable[Tensor]) -> str:
    """The first 16 hex digits of the SHA-256 of the tensors' bytes."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
