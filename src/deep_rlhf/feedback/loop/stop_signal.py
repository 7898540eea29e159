"""Stops the training loop within seconds, from the web page or by a signal: Ctrl-C, SIGTERM or SIGHUP."""

import logging
import threading
import time
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import nn

from deep_rlhf.errors import StoreError
from deep_rlhf.feedback.state import HEARTBEAT, stop_requested
from deep_rlhf.feedback.store import Store
from deep_rlhf.runtime.signals import first_signal_deferred

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5  # between two reads of the stop button
HEARTBEAT_SECONDS = 5.0


class StopRequested(Exception):
    """Ends the loop, which then saves everything that it has learned."""

    def __init__(self, ending: Literal["stopped", "interrupted"]) -> None:
        super().__init__(ending)
        self.ending = ending


class StopSignal:
    """Within its context, `check` and `wait` raise StopRequested once the loop is to stop, and a heartbeat is stored.

    Sampling raises it too, token by token, but only in the thread that entered; an optimiser step always completes.
    The first signal requests a stop, the second one ends the process at once.
    """

    def __init__(self, store: Store, trunk: nn.Module) -> None:
        """`trunk`: the policy's, whose forward passes without gradients check for a stop."""
        self._store, self._trunk = store, trunk
        self._ending: Literal["stopped", "interrupted"] | None = None
        self._stop_event = threading.Event()
        self._left = threading.Event()
        self._signals: Any = None
        self._hook: Any = None
        self.signal_number: int | None = None  # of the signal that requested the stop

    def __enter__(self) -> Self:
        self._left.clear()
        self._thread = threading.Thread(target=self._poll, name="stop signal", daemon=True)
        self._thread.start()
        owner = threading.get_ident()

        def check_while_sampling(*_: Any) -> None:
            if threading.get_ident() == owner and not torch.is_grad_enabled():
                self.check()

        self._hook = self._trunk.register_forward_pre_hook(check_while_sampling)
        self._signals = first_signal_deferred(self._interrupt, stops="and saving")
        self._signals.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._hook.remove()
        self._signals.__exit__(None, None, None)
        self._left.set()
        self._thread.join()

    def check(self) -> None:
        """Raises StopRequested if the loop is to stop."""
        if self._ending is not None:
            raise StopRequested(self._ending)

    def wait(self, seconds: float) -> None:
        """Sleeps, and raises StopRequested as soon as the loop is to stop."""
        self._stop_event.wait(seconds)
        self.check()

    def stop(self, ending: Literal["stopped", "interrupted"] = "stopped") -> None:
        """Requests a stop, from any thread."""
        self._ending = self._ending or ending
        self._stop_event.set()

    def _interrupt(self, number: int) -> None:
        self.signal_number = number
        self.stop("interrupted")

    def _poll(self) -> None:
        last_beat = 0.0
        while not self._left.wait(POLL_SECONDS):
            try:
                if stop_requested(self._store):
                    self.stop("stopped")
                if time.monotonic() - last_beat > HEARTBEAT_SECONDS:
                    last_beat = time.monotonic()
                    HEARTBEAT.write(self._store, datetime.now(UTC))
            except StoreError as error:  # the database is unavailable; try again
                logger.debug("%s", error)
