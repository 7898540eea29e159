"""Experiment trackers (wandb, tensorboard, …): which can be used here. A missing one never stops a run."""

import importlib.util
import logging
import os

from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from deep_rlhf.types import UserError

logger = logging.getLogger(__name__)


def usable_trackers(names: list[str], *, run_name: str) -> list[str]:
    """Those of `names` that can be used, in order; a line in the log tells why another cannot.

    A wandb run named `run_name` is started here, on the main process, because only starting it shows that it works.
    Raises UserError for a name that is no tracker.
    """
    names = [name for name in names if name not in ("none", "")]
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise UserError(f"Unknown tracker '{name}': choose among {', '.join(sorted(INTEGRATION_TO_CALLBACK))}.")
    return [name for name in names if _is_usable(name, run_name)]


def _is_usable(name: str, run_name: str) -> bool:
    if importlib.util.find_spec(name) is None:
        logger.warning("%s is not installed (pip install %s): training goes on without it.", name, name)
        return False
    return _started_wandb(run_name) if name == "wandb" else True


def _started_wandb(run_name: str) -> bool:
    try:
        import wandb

        if wandb.run is not None or os.environ.get("RANK", "0") != "0":
            return True
        if os.environ.get("WANDB_MODE", "online") == "online" and not wandb.login(prompt=False):
            logger.warning(
                "wandb has no API key: training goes on without it (run `wandb login`, or set WANDB_MODE=offline to"
                " keep a local record)."
            )
            return False
        wandb.init(project=os.environ.get("WANDB_PROJECT", "deep-rlhf"), name=run_name)
    except Exception as error:  # half installed, no network, …: a tracker's trouble must not cost a training run
        logger.warning("wandb could not start (%s): training goes on without it.", " ".join(str(error).split()))
        return False
    return True
