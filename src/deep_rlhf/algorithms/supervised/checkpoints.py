"""When a supervised run is saved, what a checkpoint holds, and how a run continues from one.

`<output_dir>/checkpoints/step-<N>` holds the trained weights, optimiser, schedule, progress and random states, so that
a resumed run ends as one that was never stopped, to the last bit. What was logged is in the history beside them.
Besides those of `save_strategy` there is a checkpoint every ten minutes under "best", whether the model improved or
not, and one when a signal stops the run.
"""

import dataclasses
import hashlib
import json
import logging
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
    has_checkpoints,
    is_checkpoint,
    latest_on_all,
    random_states,
    read_checkpoint,
    remove_checkpoints,
    save_checkpoint,
    set_random_states,
)
from deep_rlhf.runtime.finite import check_finite
from deep_rlhf.runtime.history import History
from deep_rlhf.runtime.processes import Runtime
from deep_rlhf.runtime.run_files import set_aside_damaged_checkpoints, set_aside_earlier_run
from deep_rlhf.runtime.signals import Stopped, first_signal_deferred

logger = logging.getLogger(__name__)

SECONDS_BETWEEN = 600.0  # checkpoints under save_strategy="best"

NOT_SAVED = ("stateful_callbacks", "log_history")  # fields of TrainerState; the latter is in the history

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
LENGTH = frozenset({"max_steps", "num_train_epochs"})  # may change where a longer run begins as a shorter one does


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
        self.folder = Path(trainer.config.output_dir).absolute() / "checkpoints"
        self._best: Path | None = None
        self._resumed = False
        self._saved_step = -1
        self._saved_at = time.monotonic()
        self._signal = 0  # that asked for a stop
        self._history = History()

    # ---- saving

    def save_if_due(self) -> None:
        """Saves if the save strategy, the clock or a signal asks for it; after a signal raises Stopped."""
        trainer = self.trainer
        by_clock = trainer.config.save_strategy == "best" and time.monotonic() - self._saved_at > SECONDS_BETWEEN
        wishes = trainer.runtime.sum(torch.tensor([self._signal > 0, by_clock], device=trainer.config.device).int())
        interrupted, due = (wish > 0 for wish in wishes.tolist())
        asked = trainer.control.should_save
        if (asked or interrupted or due) and self._saved_step != trainer.state.global_step:
            self._save()
        if asked:
            trainer.control = trainer.callbacks.on_save(trainer.config, trainer.state, trainer.control)
        if interrupted:
            step = trainer.state.global_step
            logger.info("Stopped after update %d: run the same command with --resume to continue.", step)
            raise Stopped(max(trainer.runtime.gather(self._signal)))

    def _save(self) -> None:
        """Writes a checkpoint on the main process. Raises CheckpointError on all if the disk refuses it."""
        trainer = self.trainer
        step = trainer.state.global_step
        check_finite(trainer.weights().items(), f"No checkpoint is written after update {step}")
        processes = trainer.runtime.gather(
            {"random": random_states(), "loss_since_log": trainer.loss_since_log.item(), "flops": trainer.flops}
        )
        logged = trainer.state.log_history
        for row in logged[len(self._history) :]:
            self._history.add({"metrics": row})
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
                content = self._content(processes)
                save_checkpoint(self.folder, step, content, keep=limit, needs=earlier, history=self._history)
            except CheckpointError as error:
                failure = error
        trainer.runtime.raise_first(failure)
        self._best = trainer.runtime.from_main(self._best)
        self._resumed = True
        self._saved_step, self._saved_at = step, time.monotonic()

    def _content(self, processes: list[dict[str, Any]]) -> dict[str, Any]:
        trainer = self.trainer
        state = dataclasses.asdict(trainer.state)
        content: dict[str, Any] = {
            "weights": trainer.weights(),
            "flags": _as_json(trainer.run_flags),
            "progress": {name: value for name, value in state.items() if name not in NOT_SAVED},
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

    def resume(self, max_steps: int) -> list[dict[str, Any]] | None:
        """Restores the run that the configuration names; returns what `set_random` takes, None for a fresh run.

        max_steps: updates of the whole run. The results of another run in the folder are set aside when a fresh run
        begins. Raises CheckpointError if it is a run with other flags.
        """
        found = self._find(max_steps)
        if found is None:
            if self.trainer.runtime.is_main:
                flags = self.trainer.run_flags.items()
                inputs = [value for name, value in flags if isinstance(value, str) and name != "output_dir"]
                set_aside_earlier_run(self.folder.parent, filter(None, inputs))
                if self.trainer.config.resume and has_checkpoints(self.folder):
                    set_aside_damaged_checkpoints(self.folder)
            return None
        trainer, content = self.trainer, found.state
        if "optimizer" not in content:
            raise CheckpointError(
                f"'{found.path}' holds only a model (--save_only_model): a run cannot continue from it."
            )
        trainer.load_weights(content["weights"])
        trainer.optimizer.load_state_dict(content["optimizer"])
        trainer.scheduler.load_state_dict(content["scheduler"])
        logged = [row["metrics"] for row in found.history.rows]
        trainer.state = TrainerState(**content["progress"], log_history=logged)
        trainer.state.is_local_process_zero = trainer.config.local_process_index == 0
        trainer.state.is_world_process_zero = trainer.runtime.is_main
        process = content["processes"][trainer.runtime.rank % len(content["processes"])]
        trainer.loss_since_log.fill_(process["loss_since_log"])
        trainer.flops = process["flops"]
        trainer.loss_until_log, trainer.last_logged_step = content["loss_until_log"], content["last_logged_step"]
        if content["best"] and is_checkpoint(found.path.with_name(content["best"])):
            self._best = found.path.with_name(content["best"])
        self._resumed = found.path.parent.resolve() == self.folder.resolve()
        self._history = found.history if self._resumed else History(found.history.rows)
        self._saved_step = found.step if self._resumed else -1
        return content["processes"]

    def set_random(self, processes: list[dict[str, Any]]) -> None:
        """Restores the random states of this process."""
        set_random_states(processes[self.trainer.runtime.rank % len(processes)]["random"])

    def _find(self, max_steps: int) -> Checkpoint | None:
        config = self.trainer.config
        if config.resume_from_checkpoint:
            return read_checkpoint(Path(config.resume_from_checkpoint))
        if not config.resume:
            return None
        found = latest_on_all(self.folder, self.trainer.runtime)
        if found is None:
            logger.info("There is no complete checkpoint in %s: starting from the beginning.", self.folder)
            return None
        if not {"flags", "progress"} <= found.state.keys():
            raise CheckpointError(f"{self.folder} holds the run of another command: give another output_dir.")
        before = found.state["progress"]["max_steps"]
        obstacle = self._cannot_be_longer(before, max_steps) if max_steps != before else None
        free = RESUME_MAY_CHANGE if obstacle else RESUME_MAY_CHANGE | LENGTH
        changed = changed_flags(found.state["flags"], _as_json(self.trainer.run_flags), free=free)
        if changed:
            raise CheckpointError(
                f"The run in {self.folder} cannot be resumed with other flags: {changed}. Give those it began with, or"
                f" leave out --resume to start from the beginning.{f' ({obstacle})' if obstacle else ''}"
            )
        if max_steps < found.step:
            raise CheckpointError(
                f"The run in {self.folder} has made {found.step} updates, more than the {max_steps} that are asked for:"
                " raise --max_steps or --num_train_epochs, or leave out --resume to start from the beginning."
            )
        logger.info("Resuming from %s.", found.path)
        return found

    def _cannot_be_longer(self, before: int, now: int) -> str | None:
        """Why a run of `before` updates does not begin as one of `now` updates does; None if it does."""
        config = self.trainer.config
        schedule = getattr(config.lr_scheduler_type, "value", config.lr_scheduler_type)
        if schedule not in ("constant", "constant_with_warmup"):
            return f"A run can be made longer only with a constant learning rate, not with {schedule}."
        if schedule != "constant" and config.get_warmup_steps(before) != config.get_warmup_steps(now):
            return "The warm-up is a share of the run: its length would change."
        shares = [
            name for name in ("logging_steps", "eval_steps", "save_steps") if 0 < (getattr(config, name) or 0) < 1
        ]
        return f"{shares[0]} is a share of the run: it would change." if shares else None

    def load_best(self) -> None:
        """Puts the best evaluated weights into the model, if they were saved."""
        if self._best is not None:
            self.trainer.load_weights(read_checkpoint(self._best, keys=["weights"]).state["weights"])

    # ---- signals

    @contextmanager
    def saved_on_signal(self) -> Iterator[None]:
        """The first Ctrl-C, SIGTERM or SIGHUP is noted, for `save_if_due`; a second one stops at once.

        Raises Stopped at the end if it came after the last update.
        """
        if self.trainer.config.save_strategy == "no":  # nothing to save
            yield
            return
        with first_signal_deferred(self._note):
            yield
        if self._signal:
            raise Stopped(self._signal)

    def _note(self, number: int) -> None:
        self._signal = number


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
