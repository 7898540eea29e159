"""How the C library deals with the memory that tensors on a CPU come from."""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Options of glibc's mallopt, and what they are at first.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
FIRST = 128 * 1024
LARGEST = 2**31 - 1


@contextmanager
def kept_memory() -> Iterator[None]:
    """While it lasts, freed memory stays with the process for the next tensor, where the C library is glibc.

    By default every large tensor is memory that the system gives and zeroes anew, page by page, in a tenth of the time
    of a training.
    """
    _set_thresholds(LARGEST)
    try:
        yield
    finally:
        _set_thresholds(FIRST)
        release_freed_memory()


def release_freed_memory() -> None:
    """Gives freed memory back to the system, where that is glibc."""
    trim = _function("malloc_trim")
    if trim is not None:
        trim(0)


def _set_thresholds(size: int) -> None:
    """From which size on a tensor gets pages of its own, and how much may lie unused."""
    option = _function("mallopt")
    if option is not None:
        option(MMAP_THRESHOLD, size)
        option(TRIM_THRESHOLD, size)


def _function(name: str) -> Any:
    """A function of the C library, or None where there is none of the name."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
