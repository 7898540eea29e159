"""How much main memory this process took, and what running out of memory looks like."""

import re
import resource
import sys
from pathlib import Path

import torch

# Of PyTorch, of C++, and of oneDNN, which says no more than this.
_SIGNS = ("can't allocate memory", "bad_alloc", "could not create a primitive", "could not create a memory")
_STATUS = Path("/proc/self/status")


def resident_peak() -> int:
    """The most main memory that this process has held so far, in bytes."""
    if _STATUS.exists():  # getrusage would tell the parent's peak if that was higher (Linux)
        high_water = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text())
        if high_water:
            return int(high_water[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes there
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or in main memory, so that the same work in smaller parts may succeed."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)
