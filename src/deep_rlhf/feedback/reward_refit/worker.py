"""A process of its own that refits the reward model: `python -m deep_rlhf.feedback.reward_refit.worker FOLDER`.

It is told in FOLDER/job.json what to do and by the first line of its standard input where the store is, reads the
answers there and leaves versions in FOLDER: no model goes from process to process but through files. It ends when its
standard input does, that is, when whoever started it is gone, however that came about.
"""

import contextlib
import json
import logging
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

from transformers.utils import logging as transformers_logging

from deep_rlhf.errors import UserError
from deep_rlhf.feedback.reward_refit.versions import JOB, RefitJob, Refits, Refitted, newest_version
from deep_rlhf.feedback.store import Store, Unavailable
from deep_rlhf.runtime.run_directory import write_summary

logger = logging.getLogger(__name__)

LOOK_EVERY = 0.5  # seconds between two looks into the store
LOG = "refits.log"
PAUSES = (0.0, 5.0, 30.0)  # seconds before the process is started again, after as many deaths in a row


class RefitProcess:
    """Keeps a process running that refits."""

    def __init__(self, job: RefitJob, folder: Path, store_url: str, *, threads: int = 1) -> None:
        self.folder, self._store_url = folder, store_url
        self._threads = threads
        self._deaths_in_a_row = 0
        self._again_at = 0.0
        write_summary(folder / JOB, asdict(job))
        self._process: subprocess.Popen[bytes] | None = self._start()

    def poll(self, seen: int) -> Refitted | None:
        """The newest version, if its number is above `seen`.

        A process that has died is started again, and a line in the log says so. Raises UserError when it always dies.
        """
        found = newest_version(self.folder)
        if found is not None and found.number > seen:
            self._deaths_in_a_row = 0
            return found
        if self._process is not None and self._process.poll() is not None:
            if self._deaths_in_a_row == len(PAUSES):
                raise UserError(
                    f"The process that refits the reward model ended {len(PAUSES) + 1} times in a row, with code"
                    f" {self._process.returncode} now: '{self.folder / LOG}' tells why."
                )
            pause = PAUSES[self._deaths_in_a_row]
            self._deaths_in_a_row += 1
            self._again_at = time.monotonic() + pause
            logger.warning(
                "The process that refits the reward model ended with code %d and is started again%s; '%s' tells why.",
                self._process.returncode,
                f" in {pause:.0f} seconds" if pause else "",
                self.folder / LOG,
            )
            self._process = None
        if self._process is None and time.monotonic() >= self._again_at:
            self._process = self._start()
        return None

    def stop(self) -> None:
        """Ends the process at once: a version that is not whole is made again another time."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            if self._process.stdin is not None:
                self._process.stdin.close()
            self._process = None

    def _start(self) -> subprocess.Popen[bytes]:
        threads = {name: str(self._threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        with (self.folder / LOG).open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "deep_rlhf.feedback.reward_refit.worker", str(self.folder)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env={**os.environ, **threads},
                start_new_session=True,  # Ctrl-C is for the trainer, which ends this process
            )
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has died already, which the next poll finds
            process.stdin.write(self._store_url.encode() + b"\n")
            process.stdin.flush()
        return process


def main(folder: Path, store_url: str) -> None:
    """Refits whenever it is due, for ever."""
    job = RefitJob(**json.loads((folder / JOB).read_text(encoding="utf-8")))
    with Store(store_url) as store:
        refits = Refits(job, folder, store)
        event = failed = -1
        while True:
            try:
                event = store.last_event()
                if event != failed and refits.due():
                    version = refits.run()
                    logger.info("Version %d, %d labels: %s.", version.number, version.labels, version.figures)
                    continue
            except Unavailable as error:
                logger.warning("%s", error)
            except UserError as error:
                logger.warning("%s", error)
                failed = event  # with other answers it may work
            time.sleep(LOOK_EVERY)


def _end_with_parent() -> None:
    while os.read(0, 4096):
        pass
    os._exit(0)


if __name__ == "__main__":
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    transformers_logging.disable_progress_bar()
    address = sys.stdin.buffer.readline().decode().strip()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    main(Path(sys.argv[1]), address)
