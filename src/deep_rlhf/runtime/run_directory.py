"""The folder of a run: metrics and samples as lines, a summary, written so that a reader never sees half a file."""

import json
import math
import os
from pathlib import Path
from typing import Any


class RunDirectory:
    """`<output_dir>/{metrics.jsonl, samples.jsonl}`; a new run removes an earlier one's figures and report."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        for name in ("metrics.jsonl", "samples.jsonl", "summary.json", "report.html"):
            (self.path / name).unlink(missing_ok=True)

    def add_metrics(self, metrics: dict[str, Any]) -> None:
        """One line in metrics.jsonl."""
        self._append("metrics.jsonl", [metrics])

    def add_samples(self, samples: list[dict[str, Any]]) -> None:
        """Lines in samples.jsonl."""
        self._append("samples.jsonl", samples)

    def _append(self, name: str, rows: list[dict[str, Any]]) -> None:
        with (self.path / name).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(_finite(row), ensure_ascii=False) + "\n" for row in rows)


def write_summary(path: str | Path, summary: dict[str, Any]) -> None:
    """Writes `path` as JSON under a temporary name first, then renames it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(_finite(summary), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _finite(value: Any) -> Any:
    """JSON has no NaN or infinity: they become null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
