"""The status of the loop on the terminal: one line that is updated in place; in a log, one line per change of state."""

import sys
import threading
from types import TracebackType
from typing import Any, Self

from deep_rlhf.errors import StoreError
from deep_rlhf.feedback.state import STATUS, Status
from deep_rlhf.feedback.store import Store

POLL_SECONDS = 1.0
WIDTH = 110


class StatusLine:
    """Within its context, shows the status in the store on standard error.

    Create it before the trainer starts: the status in the store then is that of an earlier run, and is not shown.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._earlier = STATUS.read(store)
        self._left = threading.Event()
        self._row: dict[str, Any] = {}
        self._shown = ""
        self._thread = threading.Thread(target=self._run, name="status line", daemon=True)

    def __enter__(self) -> Self:
        self._newest = max((row["id"] for row in self._store.metrics()), default=0)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._left.set()
        self._thread.join()
        if sys.stderr.isatty():
            sys.stderr.write("\r" + " " * WIDTH + "\r")

    def update(self) -> None:
        """Reads the store and writes the line, if there is anything new to show."""
        status = STATUS.read(self._store)
        if status is None or status == self._earlier:
            status = Status(state="starting")
        for row in self._store.metrics(after=self._newest):
            self._newest, self._row = row["id"], row
        line = format_status(status, self._row, self._store.label_count())
        if sys.stderr.isatty():
            sys.stderr.write("\r" + line[:WIDTH].ljust(WIDTH))
            sys.stderr.flush()
        elif status.state != self._shown:
            self._shown = status.state
            sys.stderr.write(line + "\n")

    def _run(self) -> None:
        while not self._left.wait(POLL_SECONDS):
            try:
                self.update()
            except StoreError:  # unavailable; the trainer logs it
                continue


def format_status(status: Status, row: dict[str, Any], labels: int) -> str:
    """The line for a status, the newest row of metrics ({} before the first) and the number of labels."""
    parts = [status.state, f"{labels} labels"]
    if row:
        reward, kl = row["reward"], row["kl"]  # None if not finite
        parts += [f"update {row['step']}", f"reward {'–' if reward is None else f'{reward:+.2f}'}"]
        parts.append(f"KL {'–' if kl is None else f'{kl:.1f}'}")
        parts += [f"policy {row['policy_version']}", f"reward model {row['reward_version']}"]
    elif status.text:
        parts.append(status.text)
    return " · ".join(parts)
