"""Gold questions: comparisons with a known answer, which measure how reliable annotators are."""

from pathlib import Path
from typing import Any

from deep_rlhf.data.readers import BadRow, read_table
from deep_rlhf.errors import DataError
from deep_rlhf.feedback.records import MU, Choice, Comparison


def read_gold(path: str | Path) -> list[Comparison]:
    """Reads gold questions from a file with the columns prompt, a, b and expected (a, b or tie).

    Raises DataError if there is no such file, and for the first row that is not a gold question.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"There is no file of gold questions '{path}'.")
    found = []
    for where, row in read_table(path):
        problem = row if isinstance(row, BadRow) else _problem_of(row)
        if problem:
            raise DataError(f"{path}, {where}: {problem}; a gold question has prompt, a, b and expected.")
        assert isinstance(row, dict)
        choice: Choice = row["expected"]
        found.append(
            Comparison(prompt=row["prompt"], responses=(row["a"], row["b"]), why_selected="gold", expected=choice)
        )
    return found


def _problem_of(row: dict[str, Any]) -> str | None:
    for name in ("prompt", "a", "b"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            return f"'{name}' is missing or empty"
    choices = [choice for choice, mu in MU.items() if mu is not None]
    return None if row.get("expected") in choices else f"'expected' must be one of {', '.join(choices)}"
