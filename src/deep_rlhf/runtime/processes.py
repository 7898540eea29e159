"""The processes of a run: device, rank, and the collective operations. Only this module imports accelerate."""

import inspect
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, gather_object
from torch import Tensor, nn

from deep_rlhf.errors import ConfigError, UserError
from deep_rlhf.runtime.memory import resident_peak

logger = logging.getLogger(__name__)

T = TypeVar("T")

# The arguments of an Accelerator that affect this training loop: it moves, shares out and sums tensors itself, and
# hands no model to Accelerator.prepare.
_SUPPORTED = ("cpu", "kwargs_handlers", "project_dir")
# Settings of this project that do what another argument would do.
_INSTEAD = {
    "mixed_precision": "precision",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "log_with": "log_with",
    "project_config": "project_kwargs",
}


class Runtime:
    """The processes of a distributed run: this one has number `rank` of `processes`, and computes on `device`."""

    def __init__(
        self,
        trackers: list[str] | None = None,
        *,
        project_kwargs: dict[str, Any] | None = None,
        accelerator_kwargs: dict[str, Any] | None = None,
    ) -> None:
        """`trackers` is a result of `trackers.usable_trackers`.

        `project_kwargs` are arguments of accelerate's ProjectConfiguration; its `logging_dir` defaults to `runs`,
        tensorboard's own default. `accelerator_kwargs` are arguments of Accelerator, of which cpu, kwargs_handlers and
        project_dir are supported. Raises ConfigError for another argument, or a value that accelerate refuses.
        """
        project_kwargs, accelerator_kwargs = dict(project_kwargs or {}), accelerator_kwargs or {}
        if not {"project_dir", "logging_dir"} & {*project_kwargs, *accelerator_kwargs}:
            project_kwargs["logging_dir"] = "runs"
        known = list(inspect.signature(ProjectConfiguration).parameters)
        _refuse_unknown("project_kwargs", project_kwargs, known)
        _refuse_unknown("accelerator_kwargs", accelerator_kwargs, _SUPPORTED)
        project = _accepted(ProjectConfiguration, "project_kwargs", project_kwargs)
        self._accelerator = _accepted(
            Accelerator, "accelerator_kwargs", accelerator_kwargs, log_with=trackers or None, project_config=project
        )
        self.device: torch.device = self._accelerator.device
        self.rank: int = self._accelerator.process_index
        self.processes: int = self._accelerator.num_processes
        self.is_main: bool = self._accelerator.is_main_process
        self._tracked = False  # whether the trackers were opened

    @property
    def accelerator(self) -> Accelerator:
        """The Accelerator, for scripts written around one (`compat.trl`); everything else uses this class."""
        return self._accelerator

    def share(self, items: T) -> T:
        """This process's contiguous part of a list or tensor that all processes hold; lengths differ by at most one."""
        base, extra = divmod(len(items), self.processes)  # type: ignore[arg-type]
        start = self.rank * base + min(self.rank, extra)
        return items[start : start + base + (self.rank < extra)]  # type: ignore[index]

    def gather(self, part: T) -> list[T]:
        """The parts of all processes in order of rank, on every process."""
        return [part] if self.processes == 1 else gather_object([part])

    def sum(self, value: Tensor) -> Tensor:
        """The sum of `value` over the processes, on every process."""
        return self._accelerator.reduce(value, reduction="sum")

    def any(self, flag: bool) -> bool:
        """Whether `flag` is True on at least one process."""
        return any(self.gather(flag))

    def from_main(self, value: T) -> T:
        """The value of the main process, on every process."""
        return self.gather(value)[0]

    def raise_first(self, failure: Exception | None) -> None:
        """Raises the first process's failure on every process, so that none waits for those that failed."""
        failures = [error for error in self.gather(failure) if error is not None]
        if failures:
            raise failures[0]

    def on_main(self, act: Callable[[], T]) -> T:
        """Calls `act` on the main process and returns its result on all; a UserError is raised on all, too."""
        result: Any = None
        failure: UserError | None = None
        if self.is_main:
            try:
                result = act()
            except UserError as error:
                failure = error
        self.raise_first(failure)
        return self.from_main(result)

    def wait(self) -> None:
        """Waits until every process has called it."""
        self._accelerator.wait_for_everyone()

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sums gradients over the processes, so that losses divided by global counts give global gradients.

        Unlike DistributedDataParallel it allows each process its own number of backward passes.
        """
        if self.processes == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter, dtype=parameter.grad_dtype)
            parameter.grad = self.sum(parameter.grad)

    def start_trackers(
        self, project: str, config: dict[str, Any], tracker_kwargs: dict[str, dict[str, Any]] | None = None
    ) -> None:
        """Opens a run of `project` in every tracker, with that tracker's arguments from `tracker_kwargs`.

        A run is opened once: further calls before `finish` do nothing. Raises ConfigError for arguments that a tracker
        refuses; any other failure of a tracker is only a warning.
        """
        if self._tracked:
            return
        self._tracked = True
        simple = {name: value for name, value in config.items() if isinstance(value, int | float | str | bool)}
        try:
            self._accelerator.init_trackers(project, config=simple, init_kwargs=tracker_kwargs)
        except Exception as error:  # a failing tracker must not end a training run
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            if tracker_kwargs and isinstance(error, TypeError):
                raise ConfigError(f"A tracker refuses its part of tracker_kwargs: {reason}.") from error
            logger.warning("The tracker could not start (%s): training goes on without it.", reason)
            self._accelerator.trackers.clear()

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Sends the metrics of a step to every tracker."""
        self._accelerator.log(metrics, step=step)

    def finish(self) -> None:
        """Closes the trackers; unlike Accelerator.end_training it keeps the process group for the next run."""
        for tracker in self._accelerator.trackers:
            tracker.finish()
        self._tracked = False

    def peak_memory_gb(self) -> float:
        """The peak memory of this process in 1e9 bytes: allocated on the GPU, or resident on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 1e9
        return resident_peak() / 1e9


def leave_processes() -> None:
    """Destroys the process group after a barrier: a process that leaves earlier can end the others."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def _refuse_unknown(option: str, given: dict[str, Any], known: Sequence[str]) -> None:
    """Raises ConfigError for a name in `given` that is not one of the `known` arguments."""
    unknown = sorted(given.keys() - set(known))
    if unknown:
        hints = [f"use the setting {_INSTEAD[name]} for {name}" for name in unknown if name in _INSTEAD]
        advice = ", ".join(["leave it out", *hints])
        raise ConfigError(f"{option} takes no {' and no '.join(unknown)}: {advice}, or give {', '.join(known)}.")


def _accepted(kind: Callable[..., T], option: str, given: dict[str, Any], **own: Any) -> T:
    """Calls `kind(**given, **own)`. Raises ConfigError for a value of the user's `option` that `kind` refuses."""
    try:
        return kind(**given, **own)
    except (TypeError, ValueError) as error:
        if not given:
            raise
        raise ConfigError(f"accelerate refuses {option}: {' '.join(str(error).split())}") from error
