"""What a command prints: without the noise of libraries, and never at the cost of what the command does."""

import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from deep_rlhf.errors import ResourceError


@contextmanager
def lasting_output() -> Iterator["LastingStream"]:
    """Standard output and error that a command can write to though they are full, closed or without a reader.

    Characters that their encoding lacks are escaped. Yields the standard output.
    """
    _open_closed_descriptors()
    originals = sys.stdout, sys.stderr
    # A stream whose descriptor the caller has closed is None.
    out, err = (LastingStream(stream or io.StringIO()) for stream in originals)
    sys.stdout, sys.stderr = out, err
    try:
        yield out
    finally:
        out.flush()
        err.flush()
        sys.stdout, sys.stderr = originals


class LastingStream:
    """A text stream that drops what is written after the first failure, which it keeps."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.failure: Exception | None = None
        if isinstance(stream, io.TextIOWrapper) and not stream.closed and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        """As a stream's, but it raises nothing."""
        self._try(self._stream.write, text)
        return len(text)

    def writelines(self, lines: Any) -> None:
        """As a stream's, but it raises nothing."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """As a stream's, but it raises nothing."""
        self._try(self._stream.flush)

    def close(self) -> None:
        """Flushes it, and leaves it open: the command still writes, whatever a user's function closes."""
        self.flush()

    def check(self) -> None:
        """Raises ResourceError if something could not be written, though its reader wants more, unlike `head`."""
        self.flush()
        if self.failure is not None and not isinstance(self.failure, BrokenPipeError):
            reason = getattr(self.failure, "strerror", None) or self.failure
            raise ResourceError(f"The command is done, but its output could not be written ({reason}).")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _try(self, act: Callable[..., Any], *arguments: Any) -> None:
        if self.failure is not None:
            return
        try:
            act(*arguments)
        except (OSError, ValueError) as error:  # ValueError: it is closed
            self.failure = error
            with suppress(OSError, ValueError):  # the rest of its buffer is flushed when the interpreter ends
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)


def _open_closed_descriptors() -> None:
    """Opens 0, 1 and 2 where the caller has closed them, or the next file that is opened would get what is printed."""
    with suppress(OSError):
        while (descriptor := os.open(os.devnull, os.O_RDWR)) < 3:
            pass
        os.close(descriptor)


def silence_libraries() -> None:
    """Keeps, of the libraries' output, the progress bars of downloads and warnings that a user can act on."""
    from huggingface_hub.utils import logging as hub_logging
    from huggingface_hub.utils.tqdm import enable_progress_bars
    from transformers.utils import logging as transformers_logging

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
