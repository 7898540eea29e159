"""A transformers.Trainer that can be killed at any moment and goes on exactly where its newest checkpoint was made.

Where it departs from transformers: a checkpoint counts once a manifest with the digest of every file stands in it, and
older ones go only then; the loss summed since the last log is kept; what ends an epoch is logged before it is saved;
under `save_strategy="best"` there is a checkpoint every ten minutes too, whether the model improved or not.
"""

import json
import logging
import os
import re
import shutil
import signal
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from deep_rlhf.errors import UserError
from deep_rlhf.runtime.checkpoint import cannot_write, changed_flags, file_digest, sync

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
SECONDS_BETWEEN = 600.0  # checkpoints under save_strategy="best"

# Flags that change where and how a run is shown, kept or sped up, and no figure of it.
# fmt: off
FREE = frozenset({
    "output_dir", "resume", "resume_from_checkpoint", "report_to", "run_name", "logging_dir", "project",
    "disable_tqdm", "log_level", "log_level_replica", "log_on_each_node", "local_rank", "save_total_limit",
    "skip_memory_metrics", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "push_to_hub",
    "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision",
    "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor",
    "ddp_timeout",
})
# fmt: on


class ResumableTrainer(Trainer):
    """`train(resume_from_checkpoint=True)` goes on from the newest whole checkpoint in `output_dir`, if there is one.

    `run_flags` is what the run depends on, saved with every checkpoint; it may be added to before `train`. Ctrl-C saves
    after the update at hand and raises KeyboardInterrupt. Raises UserError when the disk refuses a checkpoint, and when
    a flag differs from those of the run that is resumed.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.run_flags: dict[str, Any] = {**self.args.to_dict(), "number of processes": self.args.world_size}
        self._run = uuid.uuid4().hex
        self._resumed: Path | None = None
        self._sealed_step = -1
        self._sealed_at = time.monotonic()
        self._stop = False  # Ctrl-C was typed
        self._postponed = False  # a checkpoint waits for the end of its epoch
        self._epoch_is_over = False
        self.add_callback(_Moments(self))

    def train(self, resume_from_checkpoint: str | bool | None = None, **options: Any) -> Any:
        """As transformers' Trainer.train; True means the newest whole checkpoint, or the beginning without one."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self._newest_checkpoint()
        self._resumed = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        self._sealed_at = time.monotonic()
        with self._stopping_after_an_update():
            output = super().train(resume_from_checkpoint=resume_from_checkpoint or None, **options)
        if self._stop:  # too late to stop an update
            raise KeyboardInterrupt
        return output

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        """As transformers', but `train_loss` is the mean of all updates, those before a resume included."""
        if "train_loss" in logs and self._resumed:
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 1)
        super().log(logs, *args, **options)

    def _newest_checkpoint(self) -> str | None:
        folder = Path(self.args.output_dir)
        for _, path in _checkpoints(folder):
            try:
                manifest = _read_whole(path)
                if manifest["best"]:
                    _read_whole(folder / manifest["best"])
            except (OSError, ValueError, LookupError, TypeError) as error:
                logger.warning("The checkpoint %s is skipped: it is torn (%s).", path, error)
                continue
            changed = changed_flags(manifest["flags"], _as_json(self.run_flags), free=FREE)
            if changed:
                raise UserError(
                    f"The run in {folder} cannot go on with other flags: {changed}; give those it began with, or leave"
                    " out --resume to start from the beginning."
                )
            logger.info("Going on from %s.", path)
            return str(path)
        logger.info("There is no whole checkpoint in %s: the run starts from the beginning.", folder)
        return None

    def _restore_progress(self) -> None:
        """What transformers forgets: the losses since the last log and in all, and where a moved folder's best is."""
        if self._resumed is None:
            return
        best = self._resumed.parent / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        if best.is_dir():
            self.state.best_model_checkpoint = str(best)
        self.args.eval_on_start = False  # it was done
        if not (self._resumed / MANIFEST).exists():
            return  # of an older version
        manifest = json.loads((self._resumed / MANIFEST).read_text(encoding="utf-8"))
        self._run = manifest["run"]
        self._sealed_step = self.state.global_step
        self._tr_loss.fill_(manifest["loss_since_log"])
        self._total_loss_scalar = manifest["loss_until_log"]
        self._globalstep_last_logged = manifest["last_logged"]

    def _run_epoch(self, *args: Any, **options: Any) -> None:
        if self.state.global_step < self.state.max_steps:  # else transformers would make one update too many
            super()._run_epoch(*args, **options)

    def _maybe_log_save_evaluate(self, *args: Any, **options: Any) -> None:
        super()._maybe_log_save_evaluate(*args, **options)
        best_only = self.args.save_strategy == "best"
        wishes = torch.tensor([self._stop, best_only and time.monotonic() - self._sealed_at > SECONDS_BETWEEN]).int()
        if self.args.world_size > 1:
            wishes = self.accelerator.reduce(wishes.to(self.args.device))
        stop, due = wishes.tolist()
        if self._epoch_ends_next() or not (stop or due or self._postponed):
            return
        if self._sealed_step != self.state.global_step:
            self._save_checkpoint(self.model, None)
        if stop:
            step = self.state.global_step
            logger.info("Stopped after update %d: the same command with --resume goes on from there.", step)
            raise KeyboardInterrupt

    def _epoch_ends_next(self) -> bool:
        """Whether the epoch's own evaluation and logging, of which a checkpoint must know, are still to come."""
        ends = self.control.should_epoch_stop or self.control.should_training_stop or self.state.epoch % 1 == 0
        return bool(ends and not self._epoch_is_over)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """As transformers', then sealed; at the last update of an epoch both are done again when the epoch is over."""
        run_folder = Path(self._get_output_dir(trial=trial))
        folder = run_folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # transformers would remove too early
        try:
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            self._postponed = self._epoch_ends_next()
            if self._postponed:
                return
            loss_since_log = self.accelerator.gather(self._tr_loss).mean().item()
            if self.args.should_save:
                self._seal(folder, limit, loss_since_log)
        except (OSError, SafetensorError, RuntimeError) as error:
            reason: Exception = error
            if isinstance(error, RuntimeError):
                if "inline_container" not in str(error):  # by which torch.save's own are known
                    raise
                reason = OSError("the disk did not take a whole file")
            shutil.rmtree(folder, ignore_errors=True)
            what = f"The checkpoint of update {self.state.global_step}"
            raise UserError(cannot_write(what, run_folder, reason, _newest_whole(run_folder))) from error
        finally:
            self.args.save_total_limit = limit
        self._sealed_step, self._sealed_at = self.state.global_step, time.monotonic()

    def _seal(self, folder: Path, limit: int | None, loss_since_log: float) -> None:
        """Makes the checkpoint count, then removes all but the `limit` newest and the best that those refer to."""
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        for path in [*files, *(path for path in folder.rglob("*") if path.is_dir()), folder]:
            sync(path)
        best = self.state.best_model_checkpoint
        manifest = {
            "run": self._run,
            "best": best and Path(best).name,
            "loss_since_log": loss_since_log,
            "loss_until_log": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
            "flags": self.run_flags,
            "files": {str(path.relative_to(folder)): file_digest(path) for path in files},
        }
        own, foreign = [folder], list[Path]()
        for step, path in _checkpoints(folder.parent):
            if path != folder:
                (own if step < self.state.global_step and _run_of(path) == self._run else foreign).append(path)
        _remove(path for path in foreign if str(path) != best)  # a later --resume must not find another run's
        temporary = folder / f"{MANIFEST}.tmp"
        temporary.write_text(json.dumps(manifest), encoding="utf-8")
        sync(temporary)
        os.replace(temporary, folder / MANIFEST)
        sync(folder)
        sync(folder.parent)
        if limit is not None and limit > 0:
            kept = own[:limit]
            bests = {json.loads((path / MANIFEST).read_text(encoding="utf-8"))["best"] for path in kept}
            _remove(path for path in own[limit:] if path.name not in bests)

    @contextmanager
    def _stopping_after_an_update(self) -> Iterator[None]:
        """While it lasts the first Ctrl-C is noted, to stop after the update at hand; a second one stops at once."""
        handler = signal.getsignal(signal.SIGINT)
        in_main_thread = threading.current_thread() is threading.main_thread()
        if self.args.save_strategy == "no" or not in_main_thread or handler is not signal.default_int_handler:
            yield  # nothing to save, or the caller's own handler
            return

        def note(*_: Any) -> None:
            self._stop = True
            signal.signal(signal.SIGINT, signal.default_int_handler)

        signal.signal(signal.SIGINT, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, handler)


class _Moments(TrainerCallback):
    """Tells the trainer when training and its epochs begin and end."""

    def __init__(self, trainer: ResumableTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.trainer._restore_progress()

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        self.trainer._epoch_is_over = False

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        self.trainer._epoch_is_over = True


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Steps and folders, the newest first."""
    pattern = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
    found = [(match, path) for path in folder.glob("*") if (match := pattern.fullmatch(path.name))]
    return sorted(((int(match[1]), path) for match, path in found), reverse=True)


def _newest_whole(folder: Path) -> Path | None:
    for _, path in _checkpoints(folder):
        try:
            _read_whole(path)
        except (OSError, ValueError, LookupError, TypeError):
            continue
        return path
    return None


def _read_whole(path: Path) -> Any:
    """The manifest in `path`; raises OSError or ValueError if the checkpoint is not whole."""
    if not (path / MANIFEST).exists():
        raise ValueError(f"it has no {MANIFEST}")
    manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    for name, digest in manifest["files"].items():
        if file_digest(path / name) != digest:
            raise ValueError(f"{name} is not what was written")
    return manifest


def _run_of(path: Path) -> str | None:
    try:
        return json.loads((path / MANIFEST).read_text(encoding="utf-8"))["run"]
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _remove(paths: Iterable[Path]) -> None:
    """Manifests first, so that a folder half removed is none."""
    for path in paths:
        (path / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)


def _as_json(flags: dict[str, Any]) -> dict[str, Any]:
    """As they are read back from a manifest: a tuple is a list there."""
    return json.loads(json.dumps(flags))
