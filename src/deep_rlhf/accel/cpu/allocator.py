"""How the C library deals with the memory that tensors on a CPU come from."""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Options of glibc's mallopt. By default it raises both thresholds as large blocks are freed, up to the ones below; any
# call of mallopt ends that for good, so afterwards they are what it would have come to.
TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4
AFTERWARDS = {MMAP_MAX: 65_536, MMAP_THRESHOLD: 32 * 2**20, TRIM_THRESHOLD: 64 * 2**20}
MEANWHILE = {MMAP_MAX: 0, TRIM_THRESHOLD: 2**31 - 1}  # no block gets pages of its own, and none go back


@contextmanager
def kept_memory() -> Iterator[None]:
    """While it lasts, freed memory stays with the process for the next tensor, where the C library is glibc.

    By default every large tensor is memory that the system gives and zeroes anew, page by page, in a tenth of the time
    of a training.
    """
    _set(MEANWHILE)
    try:
        yield
    finally:
        _set(AFTERWARDS)
        release_freed_memory()


def release_freed_memory() -> None:
    """Gives freed memory back to the system, where the C library is glibc."""
    trim = _function("malloc_trim")
    if trim is not None:
        trim(0)


def _set(options: dict[int, int]) -> None:
    mallopt = _function("mallopt")
    if mallopt is not None:
        for option, value in options.items():
            mallopt(option, value)


def _function(name: str) -> Any:
    """A function of the C library, or None where there is none of the name."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
