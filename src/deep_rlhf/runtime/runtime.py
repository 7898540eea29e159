"""The only place that knows accelerate: which device, how many processes, and how they agree."""

import resource
import sys
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

T = TypeVar("T")


class Runtime:
    """The processes that train together: `rank` of `processes`, each on its `device`."""

    def __init__(self, trackers: list[str] | None = None) -> None:
        """`trackers` as `trackers.usable_trackers` returns them."""
        self._accelerator = Accelerator(log_with=trackers or None)
        self.device: torch.device = self._accelerator.device
        self.rank: int = self._accelerator.process_index
        self.processes: int = self._accelerator.num_processes
        self.is_main: bool = self._accelerator.is_main_process

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

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Adds up gradients over the processes, so that losses divided by global counts give global gradients.

        Unlike DistributedDataParallel this does not ask that every process makes the same number of backward passes.
        """
        if self.processes == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad = self.sum(parameter.grad)

    def start_trackers(self, project: str, config: dict[str, Any]) -> None:
        """Opens a run of `project` in every tracker."""
        simple = {name: value for name, value in config.items() if isinstance(value, int | float | str | bool)}
        self._accelerator.init_trackers(project, config=simple)

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
        unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes there, kilobytes on Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
