"""Processes for tests that kill, interrupt or limit what runs in them: each is new, and none can hang a test.

They are forked by multiprocessing's fork server, which has imported what they need and nothing else: no thread but its
main one runs in it, so no lock can be held for ever in what is forked from it. A child checks that.
"""

import faulthandler
import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

SECONDS = 180.0  # after which a process hangs: many times what one takes on a slow and busy machine

# Imported once, by the server. What lies in tests/ cannot be here: the server of Python 3.11 does not know its folder.
PRELOADED = [
    "deep_rlhf.cli.online",
    "deep_rlhf.cli.reward",
    "deep_rlhf.evaluation.report",
    "deep_rlhf.feedback.store",
    "deep_rlhf.web.app",
    "deep_rlhf.web.server",
    "matplotlib.figure",
    "peft",
    "transformers.models.gpt2.modeling_gpt2",
]


def fork_server() -> ForkServerContext:
    """The one server of this test session, which its first process starts."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def start(act: Callable[..., Any], *arguments: Any, log: Path, seconds: float = SECONDS) -> ForkServerProcess:
    """Calls a function of a module in a new process, whose output is appended to `log`."""
    process = fork_server().Process(target=_run, args=(act, arguments, log, seconds), daemon=True)
    process.start()
    return process


def ending(process: ForkServerProcess, log: Path, seconds: float = SECONDS) -> int:
    """Waits for its end; returns the exit code, or minus the signal that killed it."""
    process.join(seconds + 60)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise AssertionError(f"a process hung for {seconds + 60} s and had to be killed:\n{log.read_text()}")
    return process.exitcode


def run(act: Callable[..., Any], *arguments: Any, log: Path, seconds: float = SECONDS) -> int:
    """Calls a function of a module in a new process; returns how that ended.

    After `seconds` the process writes the stacks of its threads to `log` and ends with exit code 1.
    """
    return ending(start(act, *arguments, log=log, seconds=seconds), log, seconds)


def _run(act: Callable[..., Any], arguments: tuple[Any, ...], log: Path, seconds: float) -> None:
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    faulthandler.dump_traceback_later(seconds, exit=True, file=descriptor)
    if sys.platform == "linux":
        threads = [path.read_text().strip() for path in Path(f"/proc/{os.getppid()}/task").glob("*/comm")]
        assert len(threads) == 1, f"the fork server has threads: {threads}"
    act(*arguments)
