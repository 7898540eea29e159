"""Freed memory is kept for the next tensor, and returned to the system on request."""

import subprocess
import sys

import pytest

PAGES = """
import resource, sys, torch
from deep_rlhf.accel.cpu.allocator import kept_memory, release_freed_memory
import psutil

def new_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(12_000_000)  # 48 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

held = lambda: psutil.Process().memory_info().rss
plain = new_pages()
with kept_memory():
    new_pages()
    kept, before = new_pages(), held()
    release_freed_memory()
    given_back = before - held()
print(plain, kept, given_back, new_pages())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="what is tested is glibc's")
def test_kept_memory_is_used_again_and_given_back_on_release() -> None:
    out = subprocess.run([sys.executable, "-c", PAGES], capture_output=True, text=True, check=True).stdout
    plain, kept, given_back, afterwards = map(int, out.split())
    assert kept < plain / 10  # pages that the system had to give
    assert afterwards > 10 * kept
    assert given_back > 45_000_000
