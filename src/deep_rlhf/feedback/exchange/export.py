"""Exports labels to files that `reward_modeling.py` reads as they are.

A row has the columns that `reward_modeling.py` reads, and everything else that is known about the label. A pair is one
row. A ranking of K is one row for each two of its responses, each of weight 2/K (see `label_preferences`).
"""

import gzip
import json
import os
import shutil
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC
from pathlib import Path
from typing import Any

from deep_rlhf.errors import ConfigError, DataError, StoreError
from deep_rlhf.feedback.records import Label
from deep_rlhf.feedback.reward_refit.preferences import FOR_RELIABILITY, label_preferences, text_id
from deep_rlhf.feedback.store import PortableLabel, Store
from deep_rlhf.types import Preference

FILES = (".jsonl", ".jsonl.gz", ".parquet")


@dataclass(frozen=True, slots=True)
class Exported:
    """The number of labels written, the rows they make, and the number of labels left out, by reason."""

    labels: int
    rows: int
    left_out: dict[str, int] = field(default_factory=dict)


def export_labels(store: Store, target: str | Path, *, everything: bool = False) -> Exported:
    """Writes all labels to `target`: .jsonl, .jsonl.gz, .parquet, or a folder as `datasets` writes it.

    "Can't tell" and the labels of gold and repeated questions are left out, unless `everything` is true; such a
    complete file must be read with --on_bad_rows=skip for training. An existing file is replaced atomically. Raises
    StoreError if there are no labels, and ConfigError or DataError if nothing can be written there.
    """
    if "://" in str(target):
        raise ConfigError(f"Labels cannot be exported to '{target}': give the name of a file, not a URL.")
    path = Path(target)
    left_out: Counter[str] = Counter()
    labels: list[PortableLabel] = []
    for one in store.portable_labels():
        reason = "" if everything else _why_left_out(one.label)
        if reason:
            left_out[reason] += 1
        else:
            labels.append(one)
    if not labels:
        raise StoreError(f"{store} holds no labels to export yet{_in_brackets(left_out)}.")
    rows = [row for one in labels for row in _rows_of(one)]
    try:
        if store.is_kept_in(path):
            raise ConfigError(f"'{path}' is the store itself: give another file for the export.")
        _write(path, rows)
    except ConfigError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise DataError(
            f"The labels cannot be written to '{path}': {getattr(error, 'strerror', None) or error}."
        ) from error
    return Exported(len(labels), len(rows), dict(left_out))


def _rows_of(portable: PortableLabel) -> list[dict[str, Any]]:
    """The rows of a label. "Can't tell" has one row, without `mu`."""
    label = portable.label
    comparison = label.comparison
    is_pair = len(comparison.responses) == 2
    shared = {
        "strength": label.strength,
        "seconds": label.seconds,
        "shown_order": list(label.shown_order),
        "answers": None if is_pair else [_encodable(text) for text in comparison.responses],
        "ranks": None if label.ranks is None else list(label.ranks),
        "why_selected": comparison.why_selected,
        "expected": comparison.expected,
        "policy_version": comparison.policy_version,
        "reward_version": comparison.reward_version,
        "writers": list(comparison.writers),
        "predicted": comparison.predicted,
        "created": label.created.astimezone(UTC).isoformat(),
        "question": portable.question,
        "repeats": portable.repeats,
        "token": portable.token,
    }
    first, second = comparison.responses[:2]
    undecided = Preference(prompt=comparison.prompt, a=first, b=second, annotator=label.annotator)
    return [
        {
            "prompt": _encodable(pair.prompt),
            "a": _encodable(pair.a),
            "b": _encodable(pair.b),
            "mu": None if pair is undecided else pair.mu,
            "weight": pair.weight,
            "id": pair.id or text_id(comparison.prompt, comparison.responses),
            "annotator": pair.annotator,
            **shared,
        }
        for pair in label_preferences(label) or [undecided]
    ]


def _encodable(text: str) -> str:
    """Replaces half a surrogate pair, which UTF-8 cannot encode, with a question mark."""
    return text.encode(errors="replace").decode()


def _why_left_out(label: Label) -> str:
    if label.choice == "cant_tell":
        return "can't tell"
    return label.comparison.why_selected if label.comparison.why_selected in FOR_RELIABILITY else ""


def _in_brackets(counts: Counter[str]) -> str:
    return f" ({', '.join(f'{count} {reason}' for reason, count in counts.items())} left out)" if counts else ""


# ---- files


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes under a temporary name first, so that a reader never sees half a file."""
    kind = next((kind for kind in FILES if path.name.endswith(kind)), "")
    if not kind and (path.suffix or path.is_file()):
        names = ", ".join(FILES)
        raise ConfigError(f"Labels cannot be exported to '{path}': give a name that ends in {names}, or a folder.")
    if path.is_dir() and (kind or not (path / "state.json").exists()) and any(path.iterdir()):
        raise ConfigError(f"'{path}' is a folder that holds something else: give another one.")
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ConfigError(f"'{path}' is a device or a pipe, which an export would replace: give the name of a file.")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        if kind:
            (_write_parquet if kind == ".parquet" else _write_lines)(part, rows)
            with part.open("rb") as file:
                os.fsync(file.fileno())
        else:
            shutil.rmtree(part, ignore_errors=True)
            _write_folder(part, rows)
        _replace(part, path)
    except BaseException:  # a full disk, for example
        part.unlink(missing_ok=True) if kind else shutil.rmtree(part, ignore_errors=True)
        raise


def _replace(part: Path, path: Path) -> None:
    """Puts a file or folder in the place of an earlier one, which stays if that fails."""
    if not path.is_dir():
        os.replace(part, path)
        return
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    os.replace(path, old)
    try:
        os.replace(part, path)
    except OSError:
        os.replace(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    # Without a time in the header, so that the same labels make the same file.
    path.write_bytes(gzip.compress(text, mtime=0) if ".gz" in path.suffixes else text)


def _schema() -> Any:
    """The columns with their types, which cannot be inferred from a column without values."""
    import pyarrow as pa

    text, whole, number = pa.string(), pa.int64(), pa.float64()
    return pa.schema(
        {
            "prompt": text,
            "a": text,
            "b": text,
            "mu": number,
            "weight": number,
            "id": text,
            "annotator": text,
            "strength": whole,
            "seconds": number,
            "shown_order": pa.list_(whole),
            "answers": pa.list_(text),
            "ranks": pa.list_(whole),
            "why_selected": text,
            "expected": text,
            "policy_version": whole,
            "reward_version": whole,
            "writers": pa.list_(whole),
            "predicted": number,
            "created": text,
            "question": text,
            "repeats": text,
            "token": text,
        }
    )


def _write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    parquet.write_table(pa.Table.from_pylist(rows, schema=_schema()), path)


def _write_folder(path: Path, rows: list[dict[str, Any]]) -> None:
    import datasets

    data = datasets.Dataset.from_list(rows, features=datasets.Features.from_arrow_schema(_schema()))
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        data.save_to_disk(str(path))
    finally:
        if shown:
            datasets.enable_progress_bars()
