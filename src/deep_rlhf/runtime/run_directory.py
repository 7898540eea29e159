"""The folder of a run: metrics and samples as JSON lines, and a summary that is replaced as a whole."""

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deep_rlhf.runtime.checkpoint import sync


class RunDirectory:
    """`<output_dir>/{metrics.jsonl, samples.jsonl}`; a new run removes the files of an earlier one.

    With `resume_from` it is the same run: lines up to that step stay, and later ones are removed, since the resumed run
    writes them again.
    """

    def __init__(self, path: str | Path, *, resume_from: int | None = None) -> None:
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        for name in ("metrics.jsonl", "samples.jsonl"):
            if resume_from is None:
                (self.path / name).unlink(missing_ok=True)
            elif (self.path / name).exists():
                _keep_until(self.path / name, resume_from)
        for name in ("summary.json", "report.html"):
            (self.path / name).unlink(missing_ok=True)

    def add_metrics(self, metrics: dict[str, Any]) -> None:
        """Appends one line to metrics.jsonl."""
        self._append("metrics.jsonl", [metrics])

    def add_samples(self, samples: list[dict[str, Any]]) -> None:
        """Appends lines to samples.jsonl."""
        self._append("samples.jsonl", samples)

    def _append(self, name: str, rows: list[dict[str, Any]]) -> None:
        with (self.path / name).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(_finite(row), ensure_ascii=False) + "\n" for row in rows)


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


def _keep_until(path: Path, step: int) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    complete = [line.decode() for line in lines if line.endswith(b"\n")]  # a kill may have cut the last one
    _replace(path, "".join(line for line in complete if json.loads(line)["step"] <= step))


def _replace(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _finite(value: Any) -> Any:
    """`value` with None for NaN and infinity, which JSON lacks."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
