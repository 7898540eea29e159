"""Experiment trackers (wandb, tensorboard, …); a missing one never stops a run."""

import importlib.util
import logging
import os
from collections.abc import Collection
from typing import Any

from accelerate.utils import LoggerType
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from deep_rlhf.errors import ConfigError
from deep_rlhf.extras import install_command

logger = logging.getLogger(__name__)

TRAINER_TRACKERS = tuple(sorted(INTEGRATION_TO_CALLBACK))  # of supervised training: transformers' callbacks
LOOP_TRACKERS = tuple(
    sorted(kind.value for kind in LoggerType if kind != LoggerType.ALL)
)  # of online training: accelerate's trackers


def usable_trackers(
    names: list[str],
    *,
    run_name: str,
    project: str | None = None,
    tracker_kwargs: dict[str, dict[str, Any]] | None = None,
    known: Collection[str] = TRAINER_TRACKERS,
) -> list[str]:
    """Those of `names` that can be used, in order; a warning says why another cannot.

    A wandb run named `run_name` of `project` (default: $WANDB_PROJECT, or deep-rlhf) is started here with its part of
    `tracker_kwargs` ({tracker: arguments}), on the main process, because only starting it shows that it works.
    Raises ConfigError for a name that is not `known`, and for `tracker_kwargs` that have another form or that wandb
    refuses.
    """
    names = [name for name in names if name not in ("none", "")]
    for name in (*names, *(tracker_kwargs or {})):
        if name not in known:
            raise ConfigError(f"Unknown tracker '{name}': choose among {', '.join(known)}.")
    for name, arguments in (tracker_kwargs or {}).items():
        if not isinstance(arguments, dict):
            raise ConfigError(f"tracker_kwargs must hold a dict of arguments for {name}, not {arguments!r}.")
    if project is None:
        project = os.environ.get("WANDB_PROJECT", "deep-rlhf")
    wandb_arguments = {"project": project, "name": run_name} | (tracker_kwargs or {}).get("wandb", {})
    return [name for name in names if _is_usable(name, wandb_arguments)]


def _is_usable(name: str, wandb_arguments: dict[str, Any]) -> bool:
    if importlib.util.find_spec(name) is None:
        logger.warning("%s is not installed: training continues without it (%s).", name, install_command(name))
        return False
    return _started_wandb(wandb_arguments) if name == "wandb" else True


def _started_wandb(arguments: dict[str, Any]) -> bool:
    try:
        import wandb

        if wandb.run is not None or os.environ.get("RANK", "0") != "0":
            return True
        mode = arguments.get("mode") or os.environ.get("WANDB_MODE", "online")
        if mode == "online" and not wandb.login(prompt=False):
            logger.warning(
                "wandb has no API key: training continues without it (run `wandb login`, or set WANDB_MODE=offline to"
                " keep a local record)."
            )
            return False
        wandb.init(**arguments)
    except Exception as error:  # half installed, no network, …: a tracker's failure must not end a training run
        reason = " ".join(str(error).split())
        if isinstance(error, TypeError) and arguments.keys() - {"project", "name"}:
            raise ConfigError(f"wandb refuses its part of tracker_kwargs: {reason}.") from error
        logger.warning("wandb could not start (%s): training continues without it.", reason)
        return False
    return True
