"""Files to rows: one reader for each file type, which yields the position of every row.

Files are read here and not by `datasets`, so that errors name file and line, and one bad row spoils no other.
"""

import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from deep_rlhf.errors import DataError

LONGEST = 300  # characters of a message of a library, and of a list of names

# What pyarrow and datasets raise for a value that they can store and Python cannot hold (a date after the year 9999, an
# unknown time zone), and for damaged files; ArrowException is added where pyarrow is imported.
UNREADABLE = (OSError, ValueError, OverflowError, LookupError, TypeError, AttributeError, RuntimeError, ImportError)


class BadRow(Exception):
    """A malformed row: `reason` is the name under which such rows are counted, the message what was expected."""

    def __init__(self, reason: str, expected: str) -> None:
        super().__init__(expected)
        self.reason = reason


Item = tuple[str, dict[str, Any] | BadRow]  # position in its table, and the row


def read_table(path: Path) -> Iterator[Item]:
    """Yields (position, row) of one file, whose type follows from its suffix: one of READERS, each also .gz.

    Raises DataError if the file cannot be read, or is damaged so that the next row cannot be found.
    """
    reader = READERS.get(file_type(path))
    if reader is None:
        raise DataError(f"{path} has an unknown file type; known are {', '.join(READERS)}, each also .gz")
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            yield from reader(path, file)  # type: ignore[arg-type]
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"{path} is not a complete gzip file ({error}); copy it again, or drop .gz from its name"
        ) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def file_type(path: Path) -> str:
    """Returns the suffix of a file that gives its type, without .gz."""
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix


def first_line(error: Exception) -> str:
    """Returns the first line of the message of an error, or of its cause."""
    lines = str(error.__cause__ or error).strip().splitlines()
    return lines[0][:LONGEST] if lines else type(error).__name__


# ---- one reader for each file type


def _json_object(value: Any) -> dict[str, Any] | BadRow:
    if isinstance(value, dict):
        return value
    return BadRow("wrong type", f"expected a JSON object of columns, found {type(value).__name__}")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object with these keys. Raises ValueError if one is there twice: which of the values is meant is unknown."""
    if doubled := first_repeated([key for key, _ in pairs]):
        raise ValueError(f"an object has the key {doubled[0][:LONGEST]!r} twice")
    return dict(pairs)


def first_repeated(names: Sequence[str]) -> list[str]:
    """The first name that occurs twice, in a list; an empty list if all differ."""
    seen: set[str] = set()
    return [name for name in names if name in seen or seen.add(name)][:1]  # type: ignore[func-returns-value]


def _refuse_repeated(names: Sequence[str], where: str) -> None:
    """Raises DataError if two columns have the same name."""
    if doubled := first_repeated(names):
        raise DataError(f"{where} has two columns '{doubled[0][:LONGEST]}': rename or remove one of them")


def _bad_json(error: Exception) -> BadRow:
    return BadRow("bad JSON", f"expected one JSON object, found bad JSON: {first_line(error)}")


def _not_utf8(error: UnicodeError) -> BadRow:
    return BadRow("not UTF-8", f"expected UTF-8 text, but it is not UTF-8: {error}")


def _jsonl_rows(path: Path, file: BinaryIO) -> Iterator[Item]:
    for number, raw in enumerate(file, 1):
        if not raw.strip():
            continue
        values: dict[str, Any] | BadRow
        try:
            values = _json_object(_DECODER.decode(raw.decode("utf-8-sig" if number == 1 else "utf-8")))
        except UnicodeDecodeError as error:
            values = _not_utf8(error)
        except (ValueError, RecursionError) as error:
            values = _bad_json(error)
        yield f"line {number}", values


def _json_rows(path: Path, file: BinaryIO) -> Iterator[Item]:
    """Reads a list of objects, or lines as in .jsonl: both are called .json."""
    raw = file.read()
    if not raw.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        yield from _jsonl_rows(path, io.BytesIO(raw))
        return
    # After an error in a list the next row cannot be found, so it ends the reading.
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {line}: {_not_utf8(error)}") from error
    space = re.compile(r"\s*")
    at, line, counted = text.index("[") + 1, 1, 0
    while True:
        at = space.match(text, at).end()  # type: ignore[union-attr]
        line, counted = line + text.count("\n", counted, at), at
        if text[at : at + 1] == "]":
            if text[at + 1 :].strip():
                raise DataError(f"{path}, line {line}: expected nothing after the end of the JSON list")
            return
        try:
            value, at = _DECODER.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            line = getattr(error, "lineno", line)
            raise DataError(f"{path}, line {line}: {_bad_json(error)}") from error
        yield f"line {line}", _json_object(value)
        at = space.match(text, at).end()  # type: ignore[union-attr]
        if text[at : at + 1] not in (",", "]"):
            line += text.count("\n", counted, at)
            raise DataError(f"{path}, line {line}: expected ',' or ']' after a row of the JSON list: bad JSON")
        at += text[at] == ","


def _csv_rows(path: Path, file: BinaryIO) -> Iterator[Item]:
    csv.field_size_limit(sys.maxsize)  # a dialogue may be longer than the default of 131,072 characters
    reader = csv.reader(io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline=""), strict=True)
    columns: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
            "".join(cells).encode()  # bytes that are not UTF-8 were escaped to surrogates, which do not encode
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(f"{path}, line {line}: expected a row of CSV: {error}") from error
        except UnicodeEncodeError:
            if columns is None:
                raise DataError(f"{path}, line {line}: expected column names in UTF-8, but it is not UTF-8") from None
            yield f"line {line}", BadRow("not UTF-8", "expected UTF-8 text, but it is not UTF-8")
            continue
        if not cells:
            continue
        if columns is None:
            columns = cells
            _refuse_repeated(columns, f"{path}, line {line},")
        elif len(cells) != len(columns):
            expected = f"expected {len(columns)} cells ({', '.join(columns)[:LONGEST]}), found {len(cells)}"
            yield f"line {line}", BadRow("wrong number of cells", expected)
        else:
            yield f"line {line}", dict(zip(columns, cells, strict=True))


def _parquet_rows(path: Path, file: BinaryIO) -> Iterator[Item]:
    import pyarrow
    import pyarrow.parquet

    raw = file.read()
    if not raw:
        return
    try:
        _refuse_repeated(pyarrow.parquet.read_schema(pyarrow.BufferReader(raw)).names, str(path))
        table = pyarrow.parquet.read_table(pyarrow.BufferReader(raw))
        table.validate()
        columns = dict(zip(table.column_names, table.columns, strict=True))
    except (pyarrow.ArrowException, *UNREADABLE) as error:
        raise DataError(f"{path} is not a parquet file that can be read: {first_line(error)}") from error
    for number in range(table.num_rows):
        values: dict[str, Any] = {}
        problem: BadRow | None = None
        for name, cells in columns.items():
            try:
                values[name] = cells[number].as_py()
            except UnicodeDecodeError as error:
                problem = _not_utf8(error)
            except (pyarrow.ArrowException, *UNREADABLE) as error:
                problem = unreadable(f"column '{name}'", error)
        yield f"row {number + 1}", problem or values


def unreadable(what: str, error: Exception) -> BadRow:
    """A row with a value that Python cannot hold."""
    return BadRow("unreadable value", f"{what} holds a value that cannot be read: {first_line(error)}")


def _text_rows(path: Path, file: BinaryIO) -> Iterator[Item]:
    for number, raw in enumerate(file, 1):
        try:
            text = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            yield f"line {number}", _not_utf8(error)
            continue
        if text.strip():
            yield f"line {number}", {"text": text}


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys)

READERS: dict[str, Callable[[Path, BinaryIO], Iterator[Item]]] = {
    ".jsonl": _jsonl_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
    ".txt": _text_rows,
}
