"""Memory: how much there is, how much this process has used, signs of its end, and batches that fit a budget."""

import os
import re
import resource
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

# Messages of PyTorch, of C++, and of oneDNN for a failed allocation.
_FAILED_ALLOCATION = ("can't allocate memory", "bad_alloc", "could not create a primitive", "could not create a memory")
_STATUS = Path("/proc/self/status")
_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def usable_memory() -> int:
    """The main memory of this machine in bytes, or the part of it that a container may use."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in _CGROUP_LIMITS:
        try:
            with open(path) as file:
                memory = min(memory, int(file.read()))
        except (OSError, ValueError):  # no such group, or no limit
            continue
    return memory


def resident_peak() -> int:
    """The peak resident memory of this process in bytes."""
    if _STATUS.exists():  # getrusage would report the parent's peak if that was higher (Linux)
        high_water = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text())
        if high_water:
            return int(high_water[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes there
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or in main memory, so that smaller passes may succeed."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _FAILED_ALLOCATION)


def token_budget_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Cuts the indices of `lengths`, longest first, into batches with count × longest ≤ `budget`, each at least one.

    Batches of similar lengths waste little on padding, and the one that needs the most memory comes first.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= budget:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
