"""The only place that knows accelerate: which device, how many processes, and how they agree."""

import inspect
import logging
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, gather_object
from torch import Tensor, nn

from deep_rlhf.errors import UserError
from deep_rlhf.runtime.memory import resident_peak

logger = logging.getLogger(__name__)

T = TypeVar("T")

_IN_EFFECT = ("cpu", "kwargs_handlers", "project_dir")  # what the loop uses of the arguments of an Accelerator


class Runtime:
    """The processes that train together: `rank` of `processes`, each on its `device`."""

    def __init__(
        self,
        trackers: list[str] | None = None,
        *,
        project_kwargs: dict[str, Any] | None = None,
        accelerator_kwargs: dict[str, Any] | None = None,
    ) -> None:
        """`trackers` as `trackers.usable_trackers` returns them; the others are what accelerate takes under that name.

        Trackers that write to a folder write to `runs`, tensorboard's own default, unless `project_kwargs` names
        another. Raises UserError for an argument that accelerate does not know, or a value that it refuses.
        """
        project_kwargs, accelerator_kwargs = dict(project_kwargs or {}), accelerator_kwargs or {}
        if not {"project_dir", "logging_dir"} & {*project_kwargs, *accelerator_kwargs}:
            project_kwargs["logging_dir"] = "runs"
        project = _accepted(ProjectConfiguration, "project_kwargs", project_kwargs)
        self._accelerator = _accepted(
            Accelerator, "accelerator_kwargs", accelerator_kwargs, log_with=trackers or None, project_config=project
        )
        idle = sorted(accelerator_kwargs.keys() - _IN_EFFECT)
        if idle:  # the loop moves, shares out and adds up by itself, so nothing is handed to Accelerator.prepare
            logger.warning("accelerator_kwargs: %s has no effect on this training loop.", ", ".join(idle))
        self.device: torch.device = self._accelerator.device
        self.rank: int = self._accelerator.process_index
        self.processes: int = self._accelerator.num_processes
        self.is_main: bool = self._accelerator.is_main_process

    @property
    def accelerator(self) -> Accelerator:
        """What scripts written around an Accelerator ask for (`compat.trl`); everything else asks this class."""
        return self._accelerator

    def share(self, items: T) -> T:
        """This process's contiguous part of a list or tensor that all processes hold; parts differ by one at most."""
        base, extra = divmod(len(items), self.processes)  # type: ignore[arg-type]
        start = self.rank * base + min(self.rank, extra)
        return items[start : start + base + (self.rank < extra)]  # type: ignore[index]

    def gather(self, part: T) -> list[T]:
        """The parts of all processes, in order of rank, everywhere."""
        return [part] if self.processes == 1 else gather_object([part])

    def sum(self, value: Tensor) -> Tensor:
        """The sum of `value` over the processes."""
        return self._accelerator.reduce(value, reduction="sum")

    def any(self, flag: bool) -> bool:
        """Whether `flag` is True on at least one process."""
        return any(self.gather(flag))

    def wait(self) -> None:
        """Returns when every process is here."""
        self._accelerator.wait_for_everyone()

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Adds up gradients over the processes, so that losses divided by global counts give global gradients.

        Unlike DistributedDataParallel this does not ask that every process makes the same number of backward passes.
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
        """Opens a run of `project` in every tracker, which gets its own part of `tracker_kwargs`: {tracker: arguments}.

        Raises UserError for arguments that a tracker refuses.
        """
        simple = {name: value for name, value in config.items() if isinstance(value, int | float | str | bool)}
        try:
            self._accelerator.init_trackers(project, config=simple, init_kwargs=tracker_kwargs)
        except Exception as error:  # a tracker's trouble must not cost a training run
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            if tracker_kwargs and isinstance(error, TypeError):
                raise UserError(f"A tracker refuses its part of tracker_kwargs: {reason}.") from error
            logger.warning("The tracker could not start (%s): training goes on without it.", reason)
            self._accelerator.trackers.clear()

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Sends metrics to every tracker."""
        self._accelerator.log(metrics, step=step)

    def finish(self) -> None:
        """Closes the trackers; unlike Accelerator.end_training it leaves the processes together for the next run."""
        for tracker in self._accelerator.trackers:
            tracker.finish()

    def peak_memory_gb(self) -> float:
        """The most memory this process has held so far: the GPU's, or on a CPU its resident memory; 1e9 bytes."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 1e9
        return resident_peak() / 1e9


def leave_processes() -> None:
    """Ends the group of processes when all are here: one that goes earlier can take the others down with it."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def _accepted(kind: Callable[..., T], option: str, given: dict[str, Any], **own: Any) -> T:
    """`kind(**given, **own)`, where `given` is a user's `option`. Raises UserError for what `kind` does not accept."""
    names = [name for name in inspect.signature(kind).parameters if name not in own]
    unknown = sorted(given.keys() - set(names))
    if unknown:
        raise UserError(f"{option} takes no {' and no '.join(unknown)}: leave it out, or give {', '.join(names)}.")
    try:
        return kind(**given, **own)
    except (TypeError, ValueError) as error:
        if not given:
            raise
        raise UserError(f"accelerate refuses {option}: {' '.join(str(error).split())}") from error
