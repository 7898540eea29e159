"""Silences the output of libraries that would break up our own lines and progress bars."""

import logging
import os
import warnings

from huggingface_hub.utils import logging as hub_logging
from huggingface_hub.utils.tqdm import enable_progress_bars
from transformers.utils import logging as transformers_logging


def silence_libraries() -> None:
    """Keeps, of the libraries' output, the progress bars of downloads and warnings that a user can act on."""
    os.environ.setdefault("WANDB_QUIET", "true")  # its summary repeats metrics.jsonl
    transformers_logging.disable_progress_bar()  # the bars of reading and writing files …
    enable_progress_bars()  # … which also disables those of downloads
    # A table of new and unused weights, which a new reward head always triggers.
    logging.getLogger("transformers.modeling_utils").addFilter(_is_no_load_report)
    hub_logging.disable_propagation()  # it has a handler of its own, so each line would be printed twice
    logging.getLogger("huggingface_hub.utils._http").addFilter(_FIRST_FAILURE)
    # The old name still works, and the new one exists only in the newest transformers.
    warnings.filterwarnings("ignore", message="`(is_)?gradient_checkpointing", category=FutureWarning)
    warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true", category=UserWarning)
    # peft imports bitsandbytes where it is installed, which then asks for an optional package on CPUs with bf16.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


class _FirstFailure(logging.Filter):
    """Passes the message of a request's first failure and drops those of the retries, which repeat it.

    Dropping all of them would leave half a minute without output.
    """

    def __init__(self) -> None:
        super().__init__()
        self._failure = ""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is not a repetition."""
        message = record.getMessage()
        if message.startswith("Retrying in "):
            return "[Retry 1/" in message
        is_new = message != self._failure
        self._failure = message
        return is_new


_FIRST_FAILURE = _FirstFailure()


def _is_no_load_report(record: logging.LogRecord) -> bool:
    return "LOAD REPORT" not in record.getMessage()
