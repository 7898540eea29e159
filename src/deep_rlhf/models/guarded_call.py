"""Calls a user's function so that it can neither end, hang nor move the program.

It runs in a thread of its own, whatever it raises is one kind of error, and what it changes for the whole process is
put back. Two things cannot be prevented here: a function that ends the process (`os._exit`, a crash in native code),
and native code that never releases Python's global lock, which no time limit can interrupt.
"""

import ctypes
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

T = TypeVar("T")

LONGEST_REASON = 300  # characters of an exception's message


class CallFailed(Exception):
    """One call of a user's function failed: `reason` says how, and `row` for which response, if that is known.

    The exception that the function raised is the cause.
    """

    def __init__(self, reason: str, row: int | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.row = row


def call_guarded(seconds: float, call: Callable[[], T]) -> T:
    """Returns what `call` returns. Raises CallFailed if it raises anything, or takes more than `seconds`.

    It has the caller's gradient mode and CUDA device. A KeyboardInterrupt that it raises is a failure like any other; a
    real Ctrl-C reaches the main thread, and ends the wait there.
    """
    returned: list[T] = []
    raised: list[BaseException] = []
    # both are local to a thread, so the new one gets the caller's
    gradients = torch.is_grad_enabled()
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else -1

    ending, is_over = threading.Lock(), False

    def run() -> None:
        nonlocal is_over
        threads = torch.get_num_threads()
        try:
            try:
                with torch.set_grad_enabled(gradients), torch.cuda.device(device):
                    returned.append(call())
            except BaseException as error:  # also SystemExit, KeyboardInterrupt and GeneratorExit
                raised.append(error)
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)
            with ending:
                is_over = True
        except SystemExit:  # of `_stop`, just as the call ended
            pass

    thread = threading.Thread(target=run, daemon=True)  # which does not keep the program from ending
    with _process_settings_kept():
        try:
            thread.start()
        except RuntimeError as error:
            raise CallFailed(f"cannot be called: {describe(error)}") from error
        thread.join(min(seconds, threading.TIMEOUT_MAX))
        if not raised and not returned:
            with ending:  # a thread that ends by itself holds locks of `threading`, which it would never release
                if not is_over:
                    _stop(thread)
            raise CallFailed(f"did not return within {seconds:g} s")
    if raised:
        cause = raised[0]
        if isinstance(cause, CallFailed):
            raise cause
        raise CallFailed(f"raised {describe(cause)}") from cause
    return returned[0]


def describe(error: BaseException) -> str:
    """The type and the message of an exception, in one line; the message may itself raise."""
    try:
        text = one_line(str(error))
    except BaseException:
        text = ""
    return f"{type(error).__name__}: {cut(text, LONGEST_REASON)}" if text else type(error).__name__


def one_line(text: str) -> str:
    """The text with each stretch of white space as one space, and with control characters escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text.split()))


def cut(text: str, length: int = 60) -> str:
    """The text, at most `length` characters of it."""
    return text if len(text) <= length else f"{text[:length]}…"


def _stop(thread: threading.Thread) -> None:
    """Ends the thread at its next Python instruction, so that an endless loop does not fill the memory."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit))


def _umask() -> int:
    mask = os.umask(0o77)  # it cannot be read without being set
    os.umask(mask)
    return mask


# What a function may set for the whole process, and what later results depend on: how it is read, and set again.
_PROCESS_SETTINGS: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    (sys.getrecursionlimit, sys.setrecursionlimit),
    (_umask, os.umask),
    (lambda: sys.stdout, lambda stream: setattr(sys, "stdout", stream)),
    (lambda: sys.stderr, lambda stream: setattr(sys, "stderr", stream)),
)


@contextmanager
def _process_settings_kept() -> Iterator[None]:
    """Puts back the working directory and the settings of the process. Random states are left: a function may draw.

    Raises CallFailed if the working directory no longer exists, or standard output or error was closed.
    """
    directory = _working_directory()
    before = [read() for read, _ in _PROCESS_SETTINGS]
    filters, environment = list(warnings.filters), dict(os.environ)
    is_open = not _is_closed(sys.stdout) and not _is_closed(sys.stderr)
    try:
        yield
    finally:
        for (read, write), value in zip(_PROCESS_SETTINGS, before, strict=True):
            if read() != value:
                write(value)
        # filters that silence a library may stay, but a warning must not become an error in our code
        if added := [rule for rule in warnings.filters if rule[0] == "error" and rule not in filters]:
            warnings.filters[:] = [rule for rule in warnings.filters if rule not in added]  # type: ignore[index]
        for name, text in environment.items():
            os.environ.setdefault(name, text)
        if is_open and (_is_closed(sys.stdout) or _is_closed(sys.stderr)):
            raise CallFailed("closed the standard output or error")
        if directory is not None and _working_directory() != directory:
            try:
                os.chdir(directory)
            except OSError as error:
                raise CallFailed(f"left the working directory '{directory}', which cannot be entered again") from error


def _is_closed(stream: Any) -> bool:
    return bool(getattr(stream, "closed", False))


def _working_directory() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # it was removed
        return None
