"""A calm console: what the libraries would print over our own lines and bars is switched off here, and only here."""

import logging
import os
import warnings

from huggingface_hub.utils import logging as hub_logging
from huggingface_hub.utils.tqdm import enable_progress_bars
from transformers.utils import logging as transformers_logging


def calm_libraries() -> None:
    """Leaves of the libraries' output the bars of downloads and of training, and warnings a user can act on."""
    os.environ.setdefault("WANDB_QUIET", "true")  # its summary repeats, line by line, what metrics.jsonl holds
    transformers_logging.disable_progress_bar()  # of reading and writing files …
    enable_progress_bars()  # … which switched off those of downloads too
    # A table of the weights that are new or unused: a fresh reward head always is.
    logging.getLogger("transformers.modeling_utils").addFilter(_is_no_load_report)
    hub_logging.disable_propagation()  # it has a handler of its own: each line would come twice
    logging.getLogger("huggingface_hub.utils._http").addFilter(_FIRST_TRY)
    # Users type it and it means what it did; its new name exists only in the newest transformers.
    warnings.filterwarnings("ignore", message="`(is_)?gradient_checkpointing", category=FutureWarning)
    warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true", category=UserWarning)
    # With bitsandbytes installed peft imports it, and it misses an optional package on CPUs that multiply bf16.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


class _FirstTry(logging.Filter):
    """Passes what is said of a request's first failure, and not the ten lines that repeat it while it is tried again.

    None of them would leave half a minute of silence.
    """

    def __init__(self) -> None:
        super().__init__()
        self._failure = ""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record says something new."""
        message = record.getMessage()
        if message.startswith("Retrying in "):
            return "[Retry 1/" in message
        is_new = message != self._failure
        self._failure = message
        return is_new


_FIRST_TRY = _FirstTry()


def _is_no_load_report(record: logging.LogRecord) -> bool:
    return "LOAD REPORT" not in record.getMessage()
