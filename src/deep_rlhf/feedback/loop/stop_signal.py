"""How a loop is stopped: by the red button on the page, or by Ctrl-C; seconds later, wherever it is."""

import logging
import signal
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

logger = logging.getLogger(__name__)

LOOK_EVERY = 0.5  # seconds between two looks at the button
BEAT_EVERY = 5.0  # seconds between two signs of life in the store


class Halted(Exception):
    """The loop ends here, with everything that it has learned."""

    def __init__(self, ending: Literal["stopped", "interrupted"]) -> None:
        super().__init__(ending)
        self.ending = ending


class Halter:
    """While it is entered, `check` and `wait` raise Halted once somebody has stopped the loop.

    So does the policy while it writes, token by token; an optimiser step is never cut in two. The first Ctrl-C is a
    wish like the button, the second one interrupts. `check` and `wait` belong to the thread that entered.
    """

    def __init__(self, store: Store, trunk: nn.Module) -> None:
        self._store, self._trunk = store, trunk
        self._ending: Literal["stopped", "interrupted"] | None = None
        self._asked = threading.Event()
        self._left = threading.Event()
        self._before: Any = None
        self._hook: Any = None

    def __enter__(self) -> Self:
        self._left.clear()
        self._thread = threading.Thread(target=self._look, name="red button", daemon=True)
        self._thread.start()
        own = threading.get_ident()

        def writing(*_: Any) -> None:
            if threading.get_ident() == own and not torch.is_grad_enabled():
                self.check()

        self._hook = self._trunk.register_forward_pre_hook(writing)
        if threading.current_thread() is threading.main_thread():
            handler = signal.getsignal(signal.SIGINT)
            if handler not in (None, signal.SIG_IGN):  # else Ctrl-C is for other programs of the terminal
                self._before = handler
                signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._hook.remove()
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None
        self._left.set()
        self._thread.join()

    def check(self) -> None:
        """Raises Halted once the loop was stopped."""
        if self._ending is not None:
            raise Halted(self._ending)

    def wait(self, seconds: float) -> None:
        """Waits, but not when the loop was stopped: then it raises Halted."""
        self._asked.wait(seconds)
        self.check()

    def halt(self, ending: Literal["stopped", "interrupted"] = "stopped") -> None:
        """Stops the loop, from any thread."""
        self._ending = self._ending or ending
        self._asked.set()

    def _interrupt(self, *_: Any) -> None:
        logger.warning("Stopping and saving; press Ctrl-C again to stop at once.")
        signal.signal(signal.SIGINT, self._before)
        self.halt("interrupted")

    def _look(self) -> None:
        beat = 0.0
        while not self._left.wait(LOOK_EVERY):
            try:
                if stop_requested(self._store):
                    self.halt("stopped")
                if time.monotonic() - beat > BEAT_EVERY:
                    beat = time.monotonic()
                    HEARTBEAT.write(self._store, datetime.now(UTC))
            except StoreError as error:  # the database is away for a moment; the button is looked at again
                logger.debug("%s", error)
