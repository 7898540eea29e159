"""Signals that end a run: Ctrl-C (SIGINT), and SIGTERM and SIGHUP, which schedulers and closed terminals send.

The first one asks for a stop at the next good moment, where everything is saved; the second one ends the process at
once. A run that was stopped by signal n exits with 128 + n, as shells count: 130, 143 or 129.
"""

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_DEFAULTS = (signal.SIG_DFL, signal.default_int_handler)


class Stopped(KeyboardInterrupt):
    """Raised when a run that was asked to stop by a signal has saved everything."""

    def __init__(self, number: int = signal.SIGINT) -> None:
        """`number`: of the signal."""
        super().__init__()
        self.number = number


@contextmanager
def first_signal_deferred(act: Callable[[int], None], *, stops: str = "after this update") -> Iterator[None]:
    """Within this context the first signal calls `act` with its number; the second one does what it did before.

    `stops` completes the message "Stopping …". Signals that are ignored (as `nohup` ignores SIGHUP) stay ignored, and
    handlers of the caller stay in place. Without effect outside the main thread, where Python handles no signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    taken = {number: handler for number, handler in before.items() if handler in _DEFAULTS}

    def give_back() -> None:
        for number, handler in taken.items():
            signal.signal(number, handler)

    def first(number: int, frame: FrameType | None) -> None:
        give_back()
        act(number)
        if number == signal.SIGINT:
            logger.warning("Stopping %s; press Ctrl-C again to stop at once.", stops)
        else:
            logger.warning("%s: stopping %s; a second signal stops at once.", signal.Signals(number).name, stops)

    for number in taken:
        signal.signal(number, first)
    try:
        yield
    finally:
        give_back()


@contextmanager
def signals_raise_stopped() -> Iterator[None]:
    """Within this context the first SIGTERM or SIGHUP raises Stopped, as Ctrl-C raises KeyboardInterrupt."""

    def stop(number: int, frame: FrameType | None) -> None:
        for each in taken:
            signal.signal(each, signal.SIG_DFL)
        raise Stopped(number)

    in_main_thread = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGTERM, signal.SIGHUP) if in_main_thread else ()
    taken = [each for each in numbers if signal.getsignal(each) is signal.SIG_DFL]
    for each in taken:
        signal.signal(each, stop)
    try:
        yield
    finally:
        for each in taken:
            signal.signal(each, signal.SIG_DFL)
