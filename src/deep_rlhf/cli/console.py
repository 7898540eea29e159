"""A calm console: what the libraries would print over our own lines and bars is switched off here, and only here."""

import logging
import os
import warnings

from huggingface_hub.utils.tqdm import enable_progress_bars
from transformers.utils import logging as transformers_logging


def calm_libraries() -> None:
    """Leaves of the libraries' output the bars of downloads and of training, and warnings a user can act on."""
    os.environ.setdefault("WANDB_QUIET", "true")  # its summary repeats, line by line, what metrics.jsonl holds
    transformers_logging.disable_progress_bar()  # of reading and writing files …
    enable_progress_bars()  # … which switched off those of downloads too
    # A table of the weights that are new or unused: a fresh reward head always is.
    logging.getLogger("transformers.modeling_utils").addFilter(_is_no_load_report)
    # Users type it and it means what it did; its new name exists only in the newest transformers.
    warnings.filterwarnings("ignore", message="`(is_)?gradient_checkpointing", category=FutureWarning)
    warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true", category=UserWarning)
    # With bitsandbytes installed peft imports it, and it misses an optional package on CPUs that multiply bf16.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def _is_no_load_report(record: logging.LogRecord) -> bool:
    return "LOAD REPORT" not in record.getMessage()
