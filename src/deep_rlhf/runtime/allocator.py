"""How the C library deals with the memory that tensors on a CPU come from."""

import ctypes
import sys
from typing import Any

# Options of glibc's mallopt.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
LARGEST = 2**31 - 1


def keep_freed_memory() -> None:
    """Freed memory stays with the process for the next tensor, until it is released; where the C library is glibc.

    By default every large tensor is memory that the system gives and zeroes anew, page by page, in a tenth of the time
    of a training.
    """
    option = _function("mallopt")
    if option is not None:
        option(MMAP_THRESHOLD, LARGEST)
        option(TRIM_THRESHOLD, LARGEST)


def release_freed_memory() -> None:
    """Gives freed memory back to the system, where that is glibc."""
    trim = _function("malloc_trim")
    if trim is not None:
        trim(0)


def _function(name: str) -> Any:
    """A function of the C library, or None where there is none of the name."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
