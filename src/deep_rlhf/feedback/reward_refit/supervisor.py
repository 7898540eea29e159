"""Starts the process that refits the reward model (`reward_refit.worker`), and restarts it when it dies."""

import contextlib
import json
import logging
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

from deep_rlhf.errors import ResourceError
from deep_rlhf.feedback.reward_refit.versions import FAILURE, JOB, RefitJob, Refitted, newest_version
from deep_rlhf.runtime.run_directory import write_summary

logger = logging.getLogger(__name__)

LOG = "refits.log"
PAUSES = (0.0, 5.0, 30.0)  # seconds before the first, second, … restart in a row


class RefitProcess:
    """A running process that refits the reward model."""

    def __init__(self, job: RefitJob, folder: Path, store_url: str, *, threads: int = 1) -> None:
        self.folder, self._store_url = folder, store_url
        self._threads = threads
        self._failures_in_a_row = 0
        self._restart_at = 0.0
        write_summary(folder / JOB, asdict(job))
        self._process: subprocess.Popen[bytes] | None = self._start()

    def poll(self, known: int) -> Refitted | None:
        """The newest version, if its number is above `known`; a refit that failed is only warned about.

        Restarts the process with a warning if it has died. Raises ResourceError when it has died too often in a row.
        """
        found = newest_version(self.folder)
        if found is not None and found.number > known:
            self._failures_in_a_row = 0
            return found
        self._tell_failure(known)
        if self._process is not None and self._process.poll() is not None:
            self._schedule_restart(self._process.returncode)
            self._process = None
        if self._process is None and time.monotonic() >= self._restart_at:
            self._process = self._start()
        return None

    def stop(self) -> None:
        """Kills the process; an unfinished version is fitted again next time."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            if self._process.stdin is not None:
                self._process.stdin.close()
            self._process = None

    def _tell_failure(self, known: int) -> None:
        """Warns once of a refit that the process gave up, after which the reward model stays as it is."""
        path = self.folder / FAILURE
        if not path.is_file():
            return
        try:
            reason = json.loads(path.read_text(encoding="utf-8"))["reason"]
        except (OSError, ValueError, LookupError, TypeError):  # damaged
            reason = f"The reason is in '{self.folder / LOG}'."
        path.unlink(missing_ok=True)
        stays = f"Version {known} of the reward model stays in use" if known else "There is no reward model yet"
        logger.warning("A refit ended without a version. %s %s; the next labels start another refit.", reason, stays)

    def _schedule_restart(self, code: int) -> None:
        if self._failures_in_a_row == len(PAUSES):
            raise ResourceError(
                f"The process that refits the reward model ended {len(PAUSES) + 1} times in a row, now with code"
                f" {code}; the reason is in '{self.folder / LOG}'."
            )
        pause = PAUSES[self._failures_in_a_row]
        self._failures_in_a_row += 1
        self._restart_at = time.monotonic() + pause
        logger.warning(
            "The process that refits the reward model ended with code %d and is restarted%s; the reason is in '%s'.",
            code,
            f" in {pause:.0f} seconds" if pause else "",
            self.folder / LOG,
        )

    def _start(self) -> subprocess.Popen[bytes]:
        threads = {name: str(self._threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        with (self.folder / LOG).open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "deep_rlhf.feedback.reward_refit.worker", str(self.folder)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env={**os.environ, **threads},
                start_new_session=True,  # Ctrl-C is handled by the trainer, which then ends this process
            )
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has died already; the next poll notices
            process.stdin.write(self._store_url.encode() + b"\n")
            process.stdin.flush()
        return process
