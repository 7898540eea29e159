"""Where an online run's checkpoints are, which run they belong to, and when one is continued."""

import logging
from pathlib import Path
from typing import Any

from deep_rlhf.algorithms.online.config import OnlineConfig
from deep_rlhf.errors import CheckpointError
from deep_rlhf.runtime.checkpoint import (
    Checkpoint,
    changed_flags,
    has_checkpoints,
    latest_on_all,
    newest_step,
    remove_checkpoints,
    save_checkpoint,
)
from deep_rlhf.runtime.history import History
from deep_rlhf.runtime.processes import Runtime
from deep_rlhf.runtime.run_files import set_aside_damaged_checkpoints

logger = logging.getLogger(__name__)


class OnlineCheckpoints:
    """The checkpoints in `<output_dir>/checkpoints`; without an output_dir there are none."""

    def __init__(self, config: OnlineConfig, runtime: Runtime, identity: dict[str, Any], *, updates: int) -> None:
        """`identity`: see `run_identity`; `updates`: of the whole run."""
        folder = config.output_dir
        self.folder = Path(folder).absolute() / "checkpoints" if folder is not None else None
        self.newest: Path | None = None  # that this run resumed from or wrote
        self.history = History()  # one row per update: its metrics and samples
        self._config, self._runtime, self._identity, self._updates = config, runtime, identity, updates
        self._started = False

    def find(self) -> Checkpoint | None:
        """The checkpoint to resume from; None for a run from the beginning.

        Raises CheckpointError for an unfinished run without `resume`, and for a checkpoint of another run.
        """
        if self.folder is None:
            return None
        if not self._config.resume:
            self._runtime.on_main(self._refuse_unfinished)
            return None
        found = latest_on_all(self.folder, self._runtime)
        if found is None:
            logger.info("There is no complete checkpoint in '%s': starting from the beginning.", self.folder)
            return None
        self._check_identity(found)
        self.newest, self.history, self._started = found.path, found.history, True
        if found.step == self._updates:
            logger.info("All %d updates are already done in '%s'.", found.step, found.path)
        else:
            logger.info("Resuming after update %d of %d from '%s'.", found.step, self._updates, found.path)
        return found

    def start(self) -> None:
        """Removes the checkpoints of an earlier run, at the beginning of a new one; damaged ones are set aside."""
        if self.folder is not None and not self._started and self._runtime.is_main:
            if self._config.resume and has_checkpoints(self.folder):
                set_aside_damaged_checkpoints(self.folder)
            remove_checkpoints(self.folder)
        self._started = True

    def add_update(self, metrics: dict[str, float], samples: list[dict[str, Any]]) -> None:
        """Notes an update, for the next checkpoint."""
        if self.folder is not None:
            self.history.add({"metrics": metrics, "samples": samples})

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Writes `step-<step>` on the main process. Raises CheckpointError on all if it cannot be written."""
        assert self.folder is not None
        self.start()
        content = {"identity": self._identity, "updates": self._updates, **state}
        folder = self.folder
        self.newest = self._runtime.on_main(lambda: save_checkpoint(folder, step, content, history=self.history))

    def _refuse_unfinished(self) -> None:
        """Raises CheckpointError if the folder may hold an unfinished run, which a new one would replace."""
        assert self.folder is not None
        try:
            found = newest_step(self.folder, "updates")
        except CheckpointError as error:
            raise CheckpointError(f"{error}: give another output_dir, or remove '{self.folder}'.") from error
        if found is not None and found[1] is None:
            raise CheckpointError(
                f"'{self._config.output_dir}' holds the run of another command: give another output_dir."
            )
        if found is not None and found[0] < found[1]:
            raise CheckpointError(
                f"'{self._config.output_dir}' holds a run that stopped after {found[0]} of"
                f" {found[1]} updates: add --resume to continue it, give another output_dir, or"
                f" remove '{self.folder}'."
            )

    def _check_identity(self, found: Checkpoint) -> None:
        """Raises CheckpointError if `found` is of another run; one with a constant learning rate may be longer."""
        where, schedule = self._config.output_dir, self._config.lr_scheduler_type
        if "identity" not in found.state:
            raise CheckpointError(f"'{where}' holds the run of another command: give another output_dir.")
        free = ("steps",) if schedule == "constant" else ()
        changed = changed_flags(found.state["identity"], self._identity, free=free)
        if changed:
            longer = not free and self._updates > found.state["updates"]
            why = (
                f" (lr_scheduler_type={schedule} ends with the run: only a constant rate can go on.)" if longer else ""
            )
            raise CheckpointError(f"This is not the run in '{where}': {changed}. Undo that, or start a new run.{why}")
        if found.step > self._updates:
            raise CheckpointError(
                f"The run in '{where}' has made {found.step} updates, but --steps asks for {self._updates}: raise"
                " it, or start a new run in another output_dir."
            )
