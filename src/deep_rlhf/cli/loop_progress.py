"""One line on the terminal that tells how the loop is doing; of a log, a line whenever its state changes."""

import sys
import threading
from types import TracebackType
from typing import Any, Self

from deep_rlhf.errors import StoreError
from deep_rlhf.feedback.state import STATUS, Status
from deep_rlhf.feedback.store import Store

LOOK_EVERY = 1.0  # seconds
WIDTH = 110


class Progress:
    """While it is entered, the line is kept up to date from what the store says.

    Make it before the trainer begins: the status that it finds then is of an earlier run, and is not shown.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._earlier = STATUS.read(store)
        self._left = threading.Event()
        self._row: dict[str, Any] = {}
        self._shown = ""
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

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

    def _run(self) -> None:
        while not self._left.wait(LOOK_EVERY):
            try:
                self._show()
            except StoreError:  # it is away for a moment; the trainer tells of it
                continue

    def _show(self) -> None:
        status = STATUS.read(self._store)
        if status is None or status == self._earlier:
            status = Status(state="starting")
        for row in self._store.metrics(after=self._newest):
            self._newest, self._row = row["id"], row
        line = progress_line(status, self._row, self._store.label_count())
        if sys.stderr.isatty():
            sys.stderr.write("\r" + line[:WIDTH].ljust(WIDTH))
            sys.stderr.flush()
        elif status.state != self._shown:
            self._shown = status.state
            sys.stderr.write(line + "\n")


def progress_line(status: Status, row: dict[str, Any], labels: int) -> str:
    """What is known now, in one line."""
    parts = [status.state, f"{labels} answers"]
    if row:
        reward, kl = row["reward"], row["kl"]  # None: not finite
        parts += [f"update {row['step']}", f"reward {'–' if reward is None else f'{reward:+.2f}'}"]
        parts.append(f"KL {'–' if kl is None else f'{kl:.1f}'}")
        parts += [f"policy {row['policy_version']}", f"reward model {row['reward_version']}"]
    elif status.text:
        parts.append(status.text)
    return " · ".join(parts)
