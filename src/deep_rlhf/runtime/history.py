"""The rows that a run has logged, in one file beside its checkpoints that is only ever appended to.

Each checkpoint holds the length of the file and the digest of those bytes, so it says which rows belong to it, and a
change of any of them is found. What a killed run appended after its newest checkpoint is cut off by the next one.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

HISTORY = "history.jsonl"


class History:
    """JSON rows, one a line; `save` appends the new ones to `<folder>/history.jsonl`."""

    def __init__(self, rows: Iterable[Mapping[str, Any]] = ()) -> None:
        self._lines: list[bytes] = []
        self._saved = 0  # number of lines in the file
        self._bytes = 0  # of the lines in the file
        self._digest = hashlib.sha256()  # of the lines in the file
        for row in rows:
            self.add(row)

    def add(self, row: Mapping[str, Any]) -> None:
        """Adds a row as it is now; later changes of the object do not count."""
        self._lines.append(json.dumps(row, default=_plain).encode() + b"\n")

    def __len__(self) -> int:
        return len(self._lines)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All rows, saved or not."""
        return [json.loads(line) for line in self._lines]

    def save(self, folder: Path) -> dict[str, Any]:
        """Appends the rows that are not in the file yet, and returns what `read` needs to know about it.

        A file that somebody has cut or removed is written anew. Raises OSError if the disk refuses the write, which
        leaves the rows of earlier checkpoints intact.
        """
        path = folder / HISTORY
        if not path.exists() or path.stat().st_size < self._bytes:
            self._saved, self._bytes, self._digest = 0, 0, hashlib.sha256()
        new = b"".join(self._lines[self._saved :])
        with path.open("r+b" if self._bytes else "wb") as file:
            file.truncate(self._bytes)
            file.seek(self._bytes)
            try:
                file.write(new)
                file.flush()
            except OSError:
                os.truncate(path, self._bytes)
                raise
            os.fsync(file.fileno())
        self._saved, self._bytes = len(self._lines), self._bytes + len(new)
        self._digest.update(new)
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}

    @classmethod
    def read(cls, folder: Path, mark: Mapping[str, Any]) -> Self:
        """The rows up to what `save` returned. Raises ValueError or OSError if they are not all as they were."""
        refuse_pipes(folder / HISTORY)
        with (folder / HISTORY).open("rb") as file:
            content = file.read(mark["bytes"])
        history = cls()
        history._digest.update(content)
        if len(content) < mark["bytes"]:
            raise ValueError(f"{HISTORY} is cut: it has {len(content)} of {mark['bytes']} bytes")
        if history._digest.hexdigest() != mark["sha256"]:
            raise ValueError(f"{HISTORY} was changed: its first {mark['bytes']} bytes have another digest")
        history._lines = content.splitlines(keepends=True)
        history._saved, history._bytes = len(history._lines), len(content)
        return history


def refuse_pipes(path: Path) -> None:
    """Raises ValueError for what is neither a file nor a folder: reading a pipe would never end."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise ValueError(f"{path.name} is not a file")


def _plain(value: Any) -> Any:
    """Numbers and arrays of NumPy and torch as JSON has them."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"the history of a run cannot hold a {type(value).__name__}")
