"""Rows of a data set with their position: from the Hub, from files and folders, or from `save_to_disk`.

Files are read here and not by `datasets`, so that a bad row is named by file and line and the rows around it survive.
"""

import contextlib
import csv
import gzip
import io
import json
import os
import re
import sys
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher, get_close_matches
from pathlib import Path
from typing import Any, BinaryIO

from deep_rlhf.types import RowReport, UserError

HUB_NAMES = ("Anthropic/hh-rlhf", "wentingzhao/anthropic-hh-first-prompt")  # suggested when a name is mistyped
LISTED = 20  # names shown when a user mistypes one


@dataclass(frozen=True, slots=True)
class Row:
    """One row: its values by column, and where it stands ("train.jsonl, line 3")."""

    where: str
    values: dict[str, Any]
    subset: str = ""


class BadRow(Exception):
    """A row that cannot be used: a short reason, by which such rows are counted, and what was expected instead."""

    def __init__(self, reason: str, expected: str) -> None:
        super().__init__(expected)
        self.reason = reason


Item = tuple[str, dict[str, Any] | BadRow]  # position in its table, and the row


class Tally:
    """Counts rows read and dropped, and decides whether a bad row ends the reading."""

    def __init__(self, on_bad_rows: str) -> None:
        if on_bad_rows not in ("error", "skip"):
            raise UserError(f"on_bad_rows is 'error' or 'skip', not '{on_bad_rows}'")
        self.skip = on_bad_rows == "skip"
        self.read = 0
        self.dropped: Counter[str] = Counter()

    def bad(self, where: str, problem: BadRow) -> None:
        """Count a bad row, or raise UserError with its place if bad rows are errors."""
        if not self.skip:
            raise UserError(f"{where}: {problem} (on_bad_rows=skip passes over such rows)")
        self.dropped[problem.reason] += 1

    def report(self, name: str, split: str, kept: int) -> RowReport:
        """Return the counts; raises UserError if no row is left."""
        report = RowReport(self.read, kept, dict(self.dropped))
        if not self.read:
            raise UserError(f"{name} is empty: split '{split}' holds no rows")
        if not kept:
            raise UserError(f"no rows are left of {name}, split '{split}': {report}")
        return report


def closest_first(name: str, options: Iterable[str]) -> str:
    """Return the options as one string, those most like `name` first."""
    ordered = sorted(options, key=lambda option: -SequenceMatcher(None, name.lower(), option.lower()).ratio())
    return ", ".join(ordered[:LISTED]) + (", …" if len(ordered) > LISTED else "") if ordered else "(none)"


def split_names(dataset_name: str, *, config: str | None = None, data_dir: str | None = None) -> list[str]:
    """Return the splits of a data set; one file or saved table has only "train". Raises UserError as read_rows does."""
    path = _local_path(dataset_name)
    if path is not None:
        return list(_local_splits(path, config, data_dir))
    import datasets

    try:
        return list(datasets.get_dataset_split_names(dataset_name, config, data_dir=data_dir))
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(_explain(error, dataset_name, "", config, data_dir)) from error


def read_rows(
    dataset_name: str, *, split: str, tally: Tally, config: str | None = None, data_dir: str | None = None
) -> Iterator[Row]:
    """Yield the rows of one split; bad ones go to `tally`.

    `dataset_name` is a local file (.jsonl, .json, .csv, .parquet, .txt; each also .gz), a folder of files called after
    their split (train.jsonl.gz, train-00000-of-00002.parquet), also in sub-folders, of which `data_dir` selects one, a
    folder written by `save_to_disk`, or a name on the Hub. Raises UserError, with what exists, if there is none.
    """
    path = _local_path(dataset_name)
    if path is None:
        tables = [(f"{dataset_name} [{split}]", "", _hub_rows(dataset_name, split, config, data_dir))]
    else:
        splits = _local_splits(path, config, data_dir)
        if split not in splits:
            raise UserError(f"{dataset_name} has no split '{split}'; splits: {closest_first(split, splits)}")
        files = splits[split]
        several = len({file.parent for file in files}) > 1
        tables = [
            (str(file), file.parent.relative_to(path).as_posix() if several else "", _read_table(file))
            for file in files
        ]
    for table, subset, items in tables:
        for position, values in items:
            tally.read += 1
            if isinstance(values, BadRow):
                tally.bad(f"{table}, {position}", values)
            else:
                yield Row(f"{table}, {position}", values, subset)


# ---- local files and folders


def _local_path(name: str) -> Path | None:
    """Return the local path a name stands for, None if it must be a name on the Hub."""
    if not name.strip():
        raise UserError("the name of a data set is empty; give a file, a folder or a name on the Hugging Face Hub")
    path = Path(os.path.expanduser(name))
    if os.path.exists(path):  # unlike Path's methods these raise nothing, whatever the name
        return path
    parts = name.replace("\\", "/").split("/")
    if name.startswith((".", "/", "~")) or len(parts) > 2 or _file_type(path) in READERS:
        parent = path.parent
        held = (
            f"{parent} holds: {closest_first(path.name, _names_in(parent))}"
            if parent.is_dir()
            else f"there is no {parent} either"
        )
        raise UserError(f"there is no file or folder '{name}'; {held}")
    return None


def _names_in(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir() if not entry.name.startswith(".")]


def _file_type(path: Path) -> str:
    """Return the suffix that tells a file's type, without .gz."""
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix


def _local_splits(path: Path, config: str | None, data_dir: str | None) -> dict[str, list[Path]]:
    """Return the tables (files, or folders of `save_to_disk`) of each split."""
    if config is not None:
        raise UserError(
            f"{path} is local and has no configurations; leave '{config}' out, or select a sub-folder by data_dir"
        )
    if path.is_file():
        if data_dir is not None:
            raise UserError(f"{path} is a file and has no sub-folder '{data_dir}'; leave data_dir out")
        return {"train": [path]}
    folder = path / data_dir if data_dir else path
    if not folder.is_dir() or not folder.resolve().is_relative_to(path.resolve()):
        folders = [entry.relative_to(path).as_posix() for entry in path.rglob("*") if entry.is_dir()]
        raise UserError(f"{path} has no sub-folder '{data_dir}'; sub-folders: {closest_first(str(data_dir), folders)}")
    if (folder / "dataset_dict.json").exists():
        return {entry.name: [entry] for entry in sorted(folder.iterdir()) if (entry / "state.json").exists()}
    if (folder / "state.json").exists():
        return {"train": [folder]}
    return _files_by_split(folder)


def _files_by_split(folder: Path) -> dict[str, list[Path]]:
    splits: dict[str, list[Path]] = defaultdict(list)
    names: dict[Path, Path] = {}
    for file in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if hidden or not file.is_file() or _file_type(file) not in READERS:
            continue
        name = file.name[: file.name.rindex(_file_type(file))]
        twin = names.setdefault(file.parent / name, file)
        if twin != file:
            raise UserError(
                f"{file.parent} holds '{name}' twice, as {twin.name} and {file.name}; keep one, or name the file"
            )
        splits[re.sub(r"-\d+-of-\d+$", "", name)].append(file)
    if not splits:
        raise UserError(f"{folder} holds no data files ({', '.join(READERS)}, each also .gz)")
    return dict(splits)


def _read_table(path: Path) -> Iterator[Item]:
    if path.is_dir():
        yield from _saved_rows(path)
        return
    reader = READERS.get(_file_type(path))
    if reader is None:
        raise UserError(f"{path} is of no known type; known are {', '.join(READERS)}, each also .gz")
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            yield from reader(path, file)  # type: ignore[arg-type]
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(
            f"{path} is not a complete gzip file ({error}); copy it again, or drop .gz from its name"
        ) from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def _saved_rows(path: Path) -> Iterator[Item]:
    import datasets

    try:
        data = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a complete save_to_disk folder: {_first_line(error)}") from error
    yield from _dataset_rows(data)


def _dataset_rows(data: Any) -> Iterator[Item]:
    number = 0
    for batch in data.with_format(None).iter(batch_size=1000):
        for values in zip(*batch.values(), strict=True):
            number += 1
            yield f"row {number}", dict(zip(batch, values, strict=True))


# ---- one reader for each type of file


def _json_object(value: Any) -> dict[str, Any] | BadRow:
    if isinstance(value, dict):
        return value
    return BadRow("wrong type", f"expected a JSON object of columns, found {type(value).__name__}")


def _bad_json(error: Exception) -> BadRow:
    return BadRow("bad JSON", f"expected one JSON object, found bad JSON: {_first_line(error)}")


def _not_utf8(error: UnicodeError) -> BadRow:
    return BadRow("not UTF-8", f"expected UTF-8 text, but it is not UTF-8: {error}")


def _jsonl_rows(path: Path, file: BinaryIO) -> Iterator[Item]:
    for number, raw in enumerate(file, 1):
        if not raw.strip():
            continue
        values: dict[str, Any] | BadRow
        try:
            values = _json_object(json.loads(raw.decode("utf-8-sig" if number == 1 else "utf-8")))
        except UnicodeDecodeError as error:
            values = _not_utf8(error)
        except (ValueError, RecursionError) as error:
            values = _bad_json(error)
        yield f"line {number}", values


def _json_rows(path: Path, file: BinaryIO) -> Iterator[Item]:
    """Read a list of objects, or lines as in .jsonl: both are called .json."""
    raw = file.read()
    if not raw.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        yield from _jsonl_rows(path, io.BytesIO(raw))
        return
    # A broken list cannot be read on: nothing tells where its next row begins.
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: {_not_utf8(error)}") from error
    decoder, space = json.JSONDecoder(), re.compile(r"\s*")
    at, line, counted = text.index("[") + 1, 1, 0
    while True:
        at = space.match(text, at).end()  # type: ignore[union-attr]
        line, counted = line + text.count("\n", counted, at), at
        if text[at : at + 1] == "]":
            if text[at + 1 :].strip():
                raise UserError(f"{path}, line {line}: expected nothing after the end of the JSON list")
            return
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            line = getattr(error, "lineno", line)
            raise UserError(f"{path}, line {line}: {_bad_json(error)}") from error
        yield f"line {line}", _json_object(value)
        at = space.match(text, at).end()  # type: ignore[union-attr]
        if text[at : at + 1] not in (",", "]"):
            line += text.count("\n", counted, at)
            raise UserError(f"{path}, line {line}: expected ',' or ']' after a row of the JSON list: bad JSON")
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
            raise UserError(f"{path}, line {line}: expected a row of CSV: {error}") from error
        except UnicodeEncodeError:
            if columns is None:
                raise UserError(f"{path}, line {line}: expected column names in UTF-8, but it is not UTF-8") from None
            yield f"line {line}", BadRow("not UTF-8", "expected UTF-8 text, but it is not UTF-8")
            continue
        if not cells:
            continue
        if columns is None:
            columns = cells
        elif len(cells) != len(columns):
            expected = f"expected {len(columns)} cells ({', '.join(columns)}), found {len(cells)}"
            yield f"line {line}", BadRow("wrong number of cells", expected)
        else:
            yield f"line {line}", dict(zip(columns, cells, strict=True))


def _parquet_rows(path: Path, file: BinaryIO) -> Iterator[Item]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    raw = file.read()
    if not raw:
        return
    try:
        table = pyarrow.parquet.read_table(pyarrow.BufferReader(raw))
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a parquet file: {_first_line(error)}") from error
    for number in range(table.num_rows):
        try:
            row = {name: cells[number].as_py() for name, cells in zip(table.column_names, table.columns, strict=True)}
            yield f"row {number + 1}", row
        except UnicodeDecodeError as error:
            yield f"row {number + 1}", _not_utf8(error)


def _text_rows(path: Path, file: BinaryIO) -> Iterator[Item]:
    for number, raw in enumerate(file, 1):
        try:
            text = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            yield f"line {number}", _not_utf8(error)
            continue
        if text.strip():
            yield f"line {number}", {"text": text}


READERS: dict[str, Callable[[Path, BinaryIO], Iterator[Item]]] = {
    ".jsonl": _jsonl_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
    ".txt": _text_rows,
}


# ---- the Hub


def _hub_rows(name: str, split: str, config: str | None, data_dir: str | None) -> Iterator[Item]:
    import datasets

    try:
        data = datasets.load_dataset(name, config, split=split, data_dir=data_dir)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(_explain(error, name, split, config, data_dir)) from error
    yield from _dataset_rows(data)


def _explain(error: Exception, name: str, split: str, config: str | None, data_dir: str | None) -> str:
    """Say in one sentence why a data set of the Hub could not be loaded, and what exists instead."""
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError

    if isinstance(error, ConnectionError):
        return (
            f"'{name}' is no local file or folder, and the Hugging Face Hub does not answer: {_first_line(error)}; "
            "check the network, HF_ENDPOINT and HF_HUB_OFFLINE, or give a local copy"
        )
    gated = "gated" in str(error)
    if isinstance(error, (datasets.exceptions.DatasetNotFoundError, HFValidationError)) and not gated:
        close = get_close_matches(name, _known_names(name), n=5)
        hint = f"did you mean {', '.join(close)}?" if close else "check the name"
        return f"'{name}' is neither a local file or folder nor a data set of the Hugging Face Hub; {hint}"
    # The loader's own words differ from release to release, so ask what exists and compare.
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        if data_dir is not None:
            files = HfApi().list_repo_files(name, repo_type="dataset")
            folders = {parent.as_posix() for file in files for parent in Path(file).parents} - {"."}
            if data_dir.strip("/") not in folders:
                return f"{name} has no sub-folder '{data_dir}'; sub-folders: {closest_first(data_dir, folders)}"
        configs = datasets.get_dataset_config_names(name)
        if (config or "default") not in configs and (config or len(configs) > 1):
            return (
                f"{name} has no configuration '{config or ''}'; configurations: {closest_first(config or '', configs)}"
            )
        splits = datasets.get_dataset_split_names(name, config, data_dir=data_dir)
        if split and re.split(r"[\[+]", split)[0] not in splits:
            return f"{name} has no split '{split}'; splits: {closest_first(split, splits)}"
    return f"{name}, split '{split}', cannot be loaded from the Hugging Face Hub: {_first_line(error)}"


def _known_names(name: str) -> set[str]:
    """Return names a mistyped one may have meant: local ones, the author's, and those of this project's commands."""
    from huggingface_hub import HfApi

    names = {*HUB_NAMES, *_names_in(Path())}
    if "/" in name:
        # A suggestion is a courtesy: whatever goes wrong with it must not hide the mistake itself.
        with contextlib.suppress(Exception):
            names |= {found.id for found in HfApi().list_datasets(author=name.split("/")[0], limit=500)}
    return names


def _first_line(error: Exception) -> str:
    lines = str(error.__cause__ or error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
