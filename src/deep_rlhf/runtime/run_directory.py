"""The folder of a run: metrics and samples as JSON lines, and a summary that is replaced as a whole."""

import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from deep_rlhf.runtime.checkpoint import sync
from deep_rlhf.runtime.run_files import check_names, set_aside_earlier_run

logger = logging.getLogger(__name__)


class RunDirectory:
    """`<output_dir>/{metrics.jsonl, samples.jsonl}`, for one run at a time."""

    def __init__(self, path: str | Path) -> None:
        """Creates the folder. Raises CheckpointError as `check_names`."""
        self.path = Path(path).absolute()
        self.path.mkdir(parents=True, exist_ok=True)
        check_names(self.path)

    def start(self, inputs: Iterable[str] = (), also: Iterable[str] = ()) -> None:
        """Makes room for a new run, as `set_aside_earlier_run`."""
        set_aside_earlier_run(self.path, inputs, also)

    def resume(self, logged: Sequence[Mapping[str, Any]]) -> None:
        """Writes metrics.jsonl and samples.jsonl anew from what the run's checkpoint holds (`metrics`, `samples`).

        Lines of later updates go, since the resumed run makes these updates again. Says so if a file was damaged.
        """
        for name in ("summary.json", "report.html"):
            (self.path / name).unlink(missing_ok=True)
        self._restore("metrics.jsonl", [row["metrics"] for row in logged])
        self._restore("samples.jsonl", [sample for row in logged for sample in row["samples"]])

    def write_metrics(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes the whole metrics.jsonl."""
        _replace(self.path / "metrics.jsonl", _lines(rows))

    def add_metrics(self, metrics: dict[str, Any]) -> None:
        """Appends one line to metrics.jsonl."""
        self._append("metrics.jsonl", [metrics])

    def add_samples(self, samples: list[dict[str, Any]]) -> None:
        """Appends lines to samples.jsonl."""
        self._append("samples.jsonl", samples)

    def _append(self, name: str, rows: list[dict[str, Any]]) -> None:
        with (self.path / name).open("a", encoding="utf-8") as file:
            file.write(_lines(rows))

    def _restore(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        path, text = self.path / name, _lines(rows)
        found = path.read_bytes() if path.exists() else b""
        if not found.startswith(text.encode()):
            logger.warning("'%s' is not as the run wrote it: it is written again from the checkpoint's history.", path)
        _replace(path, text)


def write_summary(path: str | Path, summary: dict[str, Any]) -> None:
    """Writes `path` as JSON under a temporary name, then renames it, so that readers see no partial file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path, json.dumps(_finite(summary), indent=2, ensure_ascii=False) + "\n")


def replace_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Calls `write` with a temporary folder and replaces `folder` with it once it is complete and synced.

    Raises OSError if the disk refuses the write, which leaves `folder` as it was.
    """
    temporary, old = folder.with_name(f".{folder.name}.tmp"), folder.with_name(f".{folder.name}.old")
    if old.exists() and not folder.exists():  # a kill between the two renames
        os.rename(old, folder)
    for rest in (temporary, old):
        shutil.rmtree(rest, ignore_errors=True)
    try:
        write(temporary)
        for path in (*temporary.rglob("*"), temporary):
            sync(path)
        if folder.exists():
            os.rename(folder, old)
        os.rename(temporary, folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _lines(rows: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(_finite(dict(row)), ensure_ascii=False) + "\n" for row in rows)


def _replace(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise


def _finite(value: Any) -> Any:
    """`value` with None for NaN and infinity, which JSON lacks."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
