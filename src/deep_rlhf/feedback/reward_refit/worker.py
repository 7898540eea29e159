"""The process that refits the reward model: `python -m deep_rlhf.feedback.reward_refit.worker FOLDER`.

It reads its RefitJob from FOLDER/job.json and the store's address from the first line of standard input, and writes
versions to FOLDER. Models are passed between processes as files only. It ends when its standard input closes, which
happens however its parent ends.
"""

import contextlib
import json
import logging
import os
import sys
import threading
import time
from pathlib import Path

from transformers.utils import logging as transformers_logging

from deep_rlhf.errors import StoreUnavailable, UserError
from deep_rlhf.feedback.reward_refit.versions import FAILURE, JOB, RefitJob, Refits
from deep_rlhf.feedback.store import Store
from deep_rlhf.runtime.run_directory import write_summary

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5


def main(folder: Path, store_url: str) -> None:
    """Refits the reward model whenever a refit is due; never returns."""
    job = RefitJob(**json.loads((folder / JOB).read_text(encoding="utf-8")))
    with Store(store_url) as store:
        refits = Refits(job, folder, store)
        event = failed_event = -1
        while True:
            try:
                event = store.last_event()
                if event != failed_event and refits.due():
                    version = refits.run()
                    logger.info("Version %d, %d labels: %s.", version.number, version.labels, version.figures)
                    continue
            except StoreUnavailable as error:
                logger.warning("%s", error)
            except UserError as error:
                logger.warning("%s", error)
                with contextlib.suppress(OSError):
                    write_summary(folder / FAILURE, {"reason": str(error)})
                failed_event = event  # a refit may succeed once there are other labels
            time.sleep(POLL_SECONDS)


def _exit_with_parent() -> None:
    while os.read(0, 4096):
        pass
    os._exit(0)


if __name__ == "__main__":
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    transformers_logging.disable_progress_bar()
    address = sys.stdin.buffer.readline().decode().strip()
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    main(Path(sys.argv[1]), address)
