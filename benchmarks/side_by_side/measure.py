"""Measures the time and memory of a job in this process, and the matrix rate of the machine."""

import resource
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil

INTERVAL_SECONDS = 0.01  # between two samples of the memory
MATRIX_SIZE, REPEATS = 2048, 15
RUSAGE_BYTES = 1 if sys.platform == "darwin" else 1024  # the unit of ru_maxrss


@contextmanager
def watch() -> Iterator[dict[str, float]]:
    """Yields a dict and fills it: `seconds`, and resident memory at the start and at the peak, in 10⁹ bytes.

    The peak is the process's high-water mark if the job raised it, else the largest of the samples.
    """
    process, stop = psutil.Process(), threading.Event()
    samples = [process.memory_info().rss]

    def sample() -> None:
        while not stop.wait(INTERVAL_SECONDS):
            samples.append(process.memory_info().rss)

    measured = {"start_gb": samples[0] / 1e9}
    mark = _high_water_mark()
    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    start = time.perf_counter()
    try:
        yield measured
    finally:
        measured["seconds"] = time.perf_counter() - start
        stop.set()
        thread.join()
        raised = _high_water_mark()
        measured["peak_gb"] = max(*samples, raised if raised > mark else 0) / 1e9


class StepLosses:
    """A mixin for transformers.Trainer: records the loss of each step in `step_losses`."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.step_losses: list[float] = []
        super().__init__(*args, **options)

    def training_step(self, *args: Any, **options: Any) -> Any:
        loss = super().training_step(*args, **options)  # type: ignore[misc]
        self.step_losses.append(float(loss))
        return loss


def matrix_rate(precision: str, threads: int) -> float:
    """Operations per second of the fastest of several products of two 2048 × 2048 matrices."""
    import torch

    torch.set_num_threads(threads)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    a, b = (torch.rand(MATRIX_SIZE, MATRIX_SIZE).to(dtype) for _ in range(2))
    fastest = float("inf")
    for _ in range(REPEATS):
        start = time.perf_counter()
        torch.mm(a, b)
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * MATRIX_SIZE**3 / fastest


def _high_water_mark() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RUSAGE_BYTES
