"""When a supervised run is saved, what a checkpoint holds, and how a run continues from one.

`<output_dir>/checkpoints/step-<N>` holds the trained weights, optimiser, schedule, progress and random states, so that
a resumed run ends as one that was never stopped, to the last bit. Besides those of `save_strategy` there is a
checkpoint every ten minutes under "best", whether the model improved or not, and one at Ctrl-C.
"""

import dataclasses
import hashlib
import json
import logging
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import TrainerControl, TrainerState

from deep_rlhf.algorithms.supervised.config import SupervisedConfig
from deep_rlhf.errors import CheckpointError
from deep_rlhf.runtime.checkpoint import (
    Checkpoint,
    changed_flags,
    is_checkpoint,
    latest_checkpoint,
    random_states,
    read_checkpoint,
    remove_checkpoints,
    save_checkpoint,
    set_random_states,
)
from deep_rlhf.runtime.finite import check_finite
from deep_rlhf.runtime.processes import Runtime

logger = logging.getLogger(__name__)

SECONDS_BETWEEN = 600.0  # checkpoints under save_strategy="best"

# Flags that change where and how a run is shown, kept or sped up, but none of its numbers.
# fmt: off
RESUME_MAY_CHANGE = frozenset({
    "output_dir", "resume", "resume_from_checkpoint", "report_to", "run_name", "logging_dir", "project",
    "disable_tqdm", "log_level", "log_level_replica", "log_on_each_node", "local_rank", "save_total_limit",
    "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "hub_token", "hub_private_repo",
    "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision", "dataloader_num_workers",
    "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor", "ddp_timeout",
})
# fmt: on


class Resumable(Protocol):
    """What a checkpoint saves and restores of a trainer."""

    config: SupervisedConfig
    runtime: Runtime
    run_flags: dict[str, Any]  # what the run depends on
    state: TrainerState
    control: TrainerControl
    callbacks: Any
    optimizer: Any
    scheduler: Any
    loss_since_log: Tensor
    loss_until_log: float
    last_logged_step: int
    flops: float

    def weights(self) -> dict[str, Tensor]: ...

    def load_weights(self, weights: dict[str, Tensor]) -> None: ...


class RunCheckpoints:
    """The checkpoints of one training run."""

    def __init__(self, trainer: Resumable) -> None:
        self.trainer = trainer
        self.folder = Path(trainer.config.output_dir) / "checkpoints"
        self._best: Path | None = None
        self._resumed = False
        self._saved_step = -1
        self._saved_at = time.monotonic()
        self._interrupted = False

    # ---- saving

    def save_if_due(self) -> None:
        """Saves if the save strategy, the clock or Ctrl-C asks for it; after Ctrl-C raises KeyboardInterrupt."""
        trainer = self.trainer
        by_clock = trainer.config.save_strategy == "best" and time.monotonic() - self._saved_at > SECONDS_BETWEEN
        wishes = trainer.runtime.sum(torch.tensor([self._interrupted, by_clock], device=trainer.config.device).int())
        interrupted, due = (wish > 0 for wish in wishes.tolist())
        asked = trainer.control.should_save
        if (asked or interrupted or due) and self._saved_step != trainer.state.global_step:
            self._save()
        if asked:
            trainer.control = trainer.callbacks.on_save(trainer.config, trainer.state, trainer.control)
        if interrupted:
            step = trainer.state.global_step
            logger.info("Stopped after update %d: run the same command with --resume to continue.", step)
            raise KeyboardInterrupt

    def _save(self) -> None:
        """Writes a checkpoint on the main process. Raises CheckpointError on all if the disk refuses it."""
        trainer = self.trainer
        step = trainer.state.global_step
        check_finite(trainer.weights().items(), f"No checkpoint is written after update {step}")
        processes = trainer.runtime.gather(
            {"random": random_states(), "loss_since_log": trainer.loss_since_log.item(), "flops": trainer.flops}
        )
        failure: CheckpointError | None = None
        if trainer.runtime.is_main:
            if not self._resumed:  # a later --resume must not find the checkpoints of an earlier run
                remove_checkpoints(self.folder)
            best = trainer.state.best_global_step
            if best is not None and (best == step or is_checkpoint(self.folder / f"step-{best}")):
                self._best = self.folder / f"step-{best}"
            needs = [int(self._best.name[5:])] if self._best and self._best.parent == self.folder else []
            try:
                limit = trainer.config.save_total_limit
                earlier = [number for number in needs if number != step]
                save_checkpoint(self.folder, step, self._content(processes), keep=limit, needs=earlier)
            except CheckpointError as error:
                failure = error
        failures = [error for error in trainer.runtime.gather(failure) if error is not None]
        if failures:
            raise failures[0]
        self._best = trainer.runtime.gather(self._best)[0]
        self._resumed = True
        self._saved_step, self._saved_at = step, time.monotonic()

    def _content(self, processes: list[dict[str, Any]]) -> dict[str, Any]:
        trainer = self.trainer
        state = dataclasses.asdict(trainer.state)
        content: dict[str, Any] = {
            "weights": trainer.weights(),
            "flags": _as_json(trainer.run_flags),
            "progress": {name: value for name, value in state.items() if name != "stateful_callbacks"},
            "best": self._best.name if self._best else None,
        }
        if trainer.config.save_only_model:
            return content
        return content | {
            "optimizer": trainer.optimizer.state_dict(),
            "scheduler": trainer.scheduler.state_dict(),
            "loss_until_log": trainer.loss_until_log,
            "last_logged_step": trainer.last_logged_step,
            "processes": processes,
        }

    # ---- resuming

    def resume(self) -> list[dict[str, Any]] | None:
        """Restores the run that the configuration names; returns what `set_random` takes, None for a fresh run.

        Raises CheckpointError if it is a run with other flags.
        """
        found = self._find()
        if found is None:
            return None
        trainer, content = self.trainer, found.state
        if "optimizer" not in content:
            raise CheckpointError(
                f"'{found.path}' holds only a model (--save_only_model): a run cannot continue from it."
            )
        trainer.load_weights(content["weights"])
        trainer.optimizer.load_state_dict(content["optimizer"])
        trainer.scheduler.load_state_dict(content["scheduler"])
        trainer.state = TrainerState(**content["progress"])
        trainer.state.is_local_process_zero = trainer.config.local_process_index == 0
        trainer.state.is_world_process_zero = trainer.runtime.is_main
        process = content["processes"][trainer.runtime.rank % len(content["processes"])]
        trainer.loss_since_log.fill_(process["loss_since_log"])
        trainer.flops = process["flops"]
        trainer.loss_until_log, trainer.last_logged_step = content["loss_until_log"], content["last_logged_step"]
        if content["best"] and is_checkpoint(found.path.with_name(content["best"])):
            self._best = found.path.with_name(content["best"])
        self._resumed = True
        self._saved_step = found.step if found.path.parent == self.folder else -1
        return content["processes"]

    def set_random(self, processes: list[dict[str, Any]]) -> None:
        """Restores the random states of this process."""
        set_random_states(processes[self.trainer.runtime.rank % len(processes)]["random"])

    def _find(self) -> Checkpoint | None:
        config = self.trainer.config
        if config.resume_from_checkpoint:
            return read_checkpoint(Path(config.resume_from_checkpoint))
        if not config.resume:
            return None
        found = latest_checkpoint(self.folder)
        if found is None:
            logger.info("There is no complete checkpoint in %s: starting from the beginning.", self.folder)
            return None
        changed = changed_flags(found.state["flags"], _as_json(self.trainer.run_flags), free=RESUME_MAY_CHANGE)
        if changed:
            raise CheckpointError(
                f"The run in {self.folder} cannot be resumed with other flags: {changed}. Give those it began with, or"
                " leave out --resume to start from the beginning."
            )
        logger.info("Resuming from %s.", found.path)
        return found

    def load_best(self) -> None:
        """Puts the best evaluated weights into the model, if they were saved."""
        if self._best is not None:
            self.trainer.load_weights(read_checkpoint(self._best, keys=["weights"]).state["weights"])

    # ---- Ctrl-C

    @contextmanager
    def saved_on_interrupt(self) -> Iterator[None]:
        """The first Ctrl-C is noted, for `save_if_due`; a second one stops at once.

        Raises KeyboardInterrupt at the end if it came after the last update.
        """
        handler = signal.getsignal(signal.SIGINT)
        in_main_thread = threading.current_thread() is threading.main_thread()
        if self.trainer.config.save_strategy == "no" or not in_main_thread or handler is not signal.default_int_handler:
            yield  # nothing to save, or the caller's own handler
            return

        def note(*_: Any) -> None:
            self._interrupted = True
            signal.signal(signal.SIGINT, signal.default_int_handler)

        signal.signal(signal.SIGINT, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, handler)
        if self._interrupted:
            raise KeyboardInterrupt


def fingerprint(examples: Sequence[Mapping[str, Any]]) -> str:
    """The number of examples and a digest of all their values, for the flags of a run."""
    digest = hashlib.sha256()
    for example in examples:
        for name, value in sorted(example.items()):
            for item in value if isinstance(value, list) else [value]:
                content = item.numpy().tobytes() if isinstance(item, Tensor) else repr(item).encode()
                digest.update(name.encode() + content)
    return f"{len(examples)} with digest {digest.hexdigest()[:12]}"


def _as_json(flags: dict[str, Any]) -> dict[str, Any]:
    """As they are read back from a checkpoint: a tuple is a list there."""
    return json.loads(json.dumps(flags))
