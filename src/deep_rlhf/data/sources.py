"""Reads the rows of a data set with their positions: from the Hub, from files and folders, or from `save_to_disk`."""

import contextlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher, get_close_matches
from pathlib import Path
from typing import Any

from deep_rlhf.data.readers import READERS, UNREADABLE, BadRow, Item, file_type, first_line, read_table, unreadable
from deep_rlhf.errors import ConfigError, DataError
from deep_rlhf.types import RowReport

HUB_NAMES = ("Anthropic/hh-rlhf", "wentingzhao/anthropic-hh-first-prompt")  # suggested for a mistyped name
LISTED = 20  # most names that an error message lists


@dataclass(frozen=True, slots=True)
class SourceRow:
    """One row of a data set: its position ("train.jsonl, line 3"), its values by column, and its sub-folder."""

    where: str
    values: dict[str, Any]
    subset: str = ""


class Tally:
    """Counts the rows that were read and dropped, and decides whether a malformed row ends the reading."""

    def __init__(self, on_bad_rows: str) -> None:
        if on_bad_rows not in ("error", "skip"):
            raise ConfigError(f"on_bad_rows must be 'error' or 'skip', not '{on_bad_rows}'")
        self.skip = on_bad_rows == "skip"
        self.read = 0
        self.dropped: Counter[str] = Counter()

    def bad(self, where: str, problem: BadRow) -> None:
        """Counts a malformed row with "skip"; with "error" raises DataError that names its position."""
        if not self.skip:
            raise DataError(f"{where}: {problem} (on_bad_rows=skip drops such rows)")
        self.dropped[problem.reason] += 1

    def report(self, name: str, split: str, kept: int) -> RowReport:
        """Returns the counts. Raises DataError if no row is left."""
        report = RowReport(self.read, kept, dict(self.dropped))
        if not self.read:
            raise DataError(f"{name} is empty: split '{split}' holds no rows")
        if not kept:
            raise DataError(f"no rows are left of {name}, split '{split}': {report}")
        return report


def closest_first(name: str, options: Iterable[str]) -> str:
    """Returns the options as one string, those most similar to `name` first."""
    options = [option if len(option) <= 60 else f"{option[:60]}…" for option in options]
    ordered = sorted(options, key=lambda option: -SequenceMatcher(None, name.lower(), option.lower()).ratio())
    return ", ".join(ordered[:LISTED]) + (", …" if len(ordered) > LISTED else "") if ordered else "(none)"


def split_names(dataset_name: str, *, config: str | None = None, data_dir: str | None = None) -> list[str]:
    """Returns the splits of a data set; a single file or table has only "train". Raises DataError as read_rows does."""
    path = _local_path(dataset_name)
    if path is not None:
        return list(_local_splits(path, config, data_dir))
    import datasets

    try:
        return list(datasets.get_dataset_split_names(dataset_name, config, data_dir=data_dir))
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(_explain(error, dataset_name, "", config, data_dir)) from error


def read_rows(
    dataset_name: str,
    *,
    split: str,
    tally: Tally,
    config: str | None = None,
    data_dir: str | None = None,
    num_proc: int | None = None,
) -> Iterator[SourceRow]:
    """Yields the rows of one split; malformed ones go to `tally`.

    `dataset_name` is one of
    - a file: .jsonl, .json, .csv, .parquet or .txt, each also .gz;
    - a folder of files named after their split (train.jsonl.gz, train-00000-of-00002.parquet), also in sub-folders, of
      which `data_dir` selects one;
    - a folder written by `save_to_disk`;
    - a name on the Hub, downloaded and prepared by `num_proc` processes.

    Raises DataError, with the names that exist, if there is no such data set, split, configuration or sub-folder.
    """
    path = _local_path(dataset_name)
    if path is None:
        tables = [(f"{dataset_name} [{split}]", "", _hub_rows(dataset_name, split, config, data_dir, num_proc))]
    else:
        splits = _local_splits(path, config, data_dir)
        if split not in splits:
            raise DataError(f"{dataset_name} has no split '{split}'; splits: {closest_first(split, splits)}")
        files = splits[split]
        several = len({file.parent for file in files}) > 1
        tables = [
            (str(file), file.parent.relative_to(path).as_posix() if several else "", _table_rows(file))
            for file in files
        ]
    for table, subset, items in tables:
        for position, values in items:
            tally.read += 1
            if isinstance(values, BadRow):
                tally.bad(f"{table}, {position}", values)
            else:
                yield SourceRow(f"{table}, {position}", values, subset)


# ---- local files and folders


def _local_path(name: str) -> Path | None:
    """Returns the local path that `name` stands for, or None if it must be a name on the Hub."""
    if not name.strip():
        raise DataError("the name of a data set is empty; give a file, a folder or a name on the Hugging Face Hub")
    path = Path(os.path.expanduser(name))
    if os.path.exists(path):  # unlike Path.exists it raises nothing, whatever the name
        return path
    parts = name.replace("\\", "/").split("/")
    if name.startswith((".", "/", "~")) or len(parts) > 2 or file_type(path) in READERS:
        parent = path.parent
        held = (
            f"{'this folder' if parent == Path() else parent} holds: {closest_first(path.name, _names_in(parent))}"
            if os.path.isdir(parent)
            else f"there is no {parent} either"
        )
        raise DataError(f"there is no file or folder '{name}'; {held}")
    return None


def _names_in(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError:  # the names are only suggestions
        return []


def _local_splits(path: Path, config: str | None, data_dir: str | None) -> dict[str, list[Path]]:
    """Returns the tables (files, or folders of `save_to_disk`) of each split."""
    if config is not None:
        raise DataError(
            f"{path} is local and has no configurations; leave '{config}' out, or select a sub-folder by data_dir"
        )
    if path.is_file():
        if data_dir is not None:
            raise DataError(f"{path} is a file and has no sub-folder '{data_dir}'; leave data_dir out")
        return {"train": [path]}
    if not path.is_dir():
        raise DataError(f"{path} is a {_kind_of(path)}, not a file or folder: write its rows to a file, and give that")
    folder = path / data_dir if data_dir else path
    if not folder.is_dir() or not folder.resolve().is_relative_to(path.resolve()):
        folders = [entry.relative_to(path).as_posix() for entry in path.rglob("*") if entry.is_dir()]
        raise DataError(f"{path} has no sub-folder '{data_dir}'; sub-folders: {closest_first(str(data_dir), folders)}")
    if (folder / "dataset_dict.json").exists():
        return {entry.name: [entry] for entry in sorted(folder.iterdir()) if (entry / "state.json").exists()}
    if (folder / "state.json").exists():
        return {"train": [folder]}
    return _files_by_split(folder)


def _kind_of(path: Path) -> str:
    kinds = {"pipe": path.is_fifo(), "socket": path.is_socket()}
    return next((kind for kind, holds in kinds.items() if holds), "device")


def _files_by_split(folder: Path) -> dict[str, list[Path]]:
    splits: dict[str, list[Path]] = defaultdict(list)
    names: dict[Path, Path] = {}
    for file in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if hidden or not file.is_file() or file_type(file) not in READERS:
            continue
        name = file.name[: file.name.rindex(file_type(file))]
        twin = names.setdefault(file.parent / name, file)
        if twin != file:
            raise DataError(
                f"{file.parent} holds '{name}' twice, as {twin.name} and {file.name}; keep one, or name the file"
            )
        splits[re.sub(r"-\d+-of-\d+$", "", name)].append(file)
    if not splits:
        raise DataError(f"{folder} holds no data files ({', '.join(READERS)}, each also .gz)")
    return dict(splits)


def _table_rows(path: Path) -> Iterator[Item]:
    return _saved_rows(path) if path.is_dir() else read_table(path)


def _saved_rows(path: Path) -> Iterator[Item]:
    import datasets
    import pyarrow

    try:
        data = datasets.load_from_disk(str(path)).with_format(None)
        length = len(data)
    except (pyarrow.ArrowException, *UNREADABLE) as error:
        raise DataError(f"{path} is not a complete save_to_disk folder: {first_line(error)}") from error
    yield from _dataset_rows(data, length)


def _dataset_rows(data: Any, length: int) -> Iterator[Item]:
    """The rows of a data set, read a thousand at a time, and one at a time where one of them cannot be read."""
    import pyarrow

    for start in range(0, length, 1000):
        rows = range(start, min(start + 1000, length))
        try:
            batch = data[rows.start : rows.stop]
            values = [dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True)]
        except (pyarrow.ArrowException, *UNREADABLE):
            for row in rows:
                yield f"row {row + 1}", _dataset_row(data, row)
        else:
            yield from ((f"row {row + 1}", value) for row, value in zip(rows, values, strict=True))


def _dataset_row(data: Any, row: int) -> dict[str, Any] | BadRow:
    import pyarrow

    try:
        return dict(data[row])
    except (pyarrow.ArrowException, *UNREADABLE) as error:
        return unreadable("it", error)


# ---- the Hub


def _hub_rows(name: str, split: str, config: str | None, data_dir: str | None, num_proc: int | None) -> Iterator[Item]:
    import datasets

    try:
        data = datasets.load_dataset(name, config, split=split, data_dir=data_dir, num_proc=num_proc)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(_explain(error, name, split, config, data_dir)) from error
    yield from _dataset_rows(data.with_format(None), len(data))


def _explain(error: Exception, name: str, split: str, config: str | None, data_dir: str | None) -> str:
    """Returns one sentence: why a data set of the Hub could not be loaded, and what exists instead."""
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError

    if isinstance(error, ConnectionError):
        return (
            f"'{name}' is no local file or folder, and the Hugging Face Hub does not answer: {first_line(error)}; "
            "check the network, HF_ENDPOINT and HF_HUB_OFFLINE, or give a local copy"
        )
    gated = "gated" in str(error)
    if isinstance(error, (datasets.exceptions.DatasetNotFoundError, HFValidationError)) and not gated:
        close = get_close_matches(name, _known_names(name), n=5)
        hint = f"did you mean {', '.join(close)}?" if close else "check the name"
        return f"'{name}' is neither a local file or folder nor a data set of the Hugging Face Hub; {hint}"
    # The loader's messages differ between releases, so ask the Hub what exists and compare.
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
    return f"{name}, split '{split}', cannot be loaded from the Hugging Face Hub: {first_line(error)}"


def _known_names(name: str) -> set[str]:
    """Returns candidates for a mistyped name: local names, those of its author on the Hub, and HUB_NAMES."""
    from huggingface_hub import HfApi

    names = {*HUB_NAMES, *_names_in(Path())}
    if "/" in name:
        # A failed search for suggestions must not hide the error itself.
        with contextlib.suppress(Exception):
            names |= {found.id for found in HfApi().list_datasets(author=name.split("/")[0], limit=500)}
    return names
