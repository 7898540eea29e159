"""Main memory that was freed but is still counted as the process's."""

import ctypes
import sys


def release_freed_memory() -> None:
    """Gives the C library's freed memory back to the system, where that is glibc: micro-batches leave holes in it."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
