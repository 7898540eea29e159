"""Answers to and from files that `reward_modeling.py` takes as they are."""

import gzip
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from deep_rlhf.data.chat import get_template
from deep_rlhf.data.layouts import columns_of, detect_layout
from deep_rlhf.data.readers import BadRow
from deep_rlhf.data.sources import SourceRow, Tally, read_rows, split_names
from deep_rlhf.errors import StoreError, UserError
from deep_rlhf.feedback.exchange.foreign_rows import MARKS, ForeignRows, answer_of, rows_of
from deep_rlhf.feedback.records import Label
from deep_rlhf.feedback.reward_refit.preferences import FOR_RELIABILITY
from deep_rlhf.feedback.store import PortableLabel, Store
from deep_rlhf.types import RowReport

TOGETHER = 50  # answers imported in one transaction: people who label meanwhile wait no longer than for that
FILES = (".jsonl", ".jsonl.gz", ".parquet")


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written: answers, the rows they make, and how many answers were left out, by reason."""

    answers: int
    rows: int
    left_out: dict[str, int] = field(default_factory=dict)


def export_labels(store: Store, target: str | Path, *, everything: bool = False) -> Exported:
    """Writes the answers that count to `target`: .jsonl, .jsonl.gz, .parquet, or a folder as `save_to_disk` writes it.

    Left out are "can't tell" and the answers to gold and repeated questions, unless `everything` is asked for; a file
    of everything is complete, and must be read with --on_bad_rows=skip to train on it. A file that exists is replaced
    as a whole. Raises UserError if there is no answer, or nothing can be written there.
    """
    path = Path(target)
    left_out: Counter[str] = Counter()
    answers: list[PortableLabel] = []
    for answer in store.given_answers():
        reason = "" if everything else _why_left_out(answer.label)
        if reason:
            left_out[reason] += 1
        else:
            answers.append(answer)
    if not answers:
        raise UserError(f"{store} holds no answers to export yet{_in_brackets(left_out)}.")
    rows = [row for answer in answers for row in rows_of(answer)]
    try:
        _write(path, rows)
    except OSError as error:
        raise UserError(f"The labels cannot be written to '{path}': {error.strerror or error}.") from error
    return Exported(len(answers), len(rows), dict(left_out))


def read_answers(
    source: str | Path, *, template: str = "hh", on_bad_rows: str = "error"
) -> tuple[list[PortableLabel], RowReport]:
    """The answers in an export, or in any preferences that `reward_modeling.py` reads, and what became of the rows.

    All splits of the source are read. `template` renders prompts of a foreign file; an export has them as they were
    shown. A row with `votes` is one answer for each vote. Raises UserError for a malformed row, unless
    on_bad_rows="skip".
    """
    name = str(source)
    tally = Tally(on_bad_rows)
    splits = split_names(name)
    rows = [row for split in splits for row in read_rows(name, split=split, tally=tally)]
    answers = _answers(rows, name, template, tally)
    return answers, tally.report(name, "+".join(splits), tally.read - sum(tally.dropped.values()))


def import_answers(store: Store, answers: Sequence[PortableLabel]) -> int:
    """Takes answers into the store; returns how many it did not have: an import that was interrupted is repeated."""
    return sum(store.take_in(answers[i : i + TOGETHER]) for i in range(0, len(answers), TOGETHER))


def _answers(rows: Sequence[SourceRow], name: str, template: str, tally: Tally) -> list[PortableLabel]:
    """The answers of all rows; what is malformed goes to the tally."""
    if not rows:
        return []
    read = _reader(rows, name, template)
    answers: dict[str, PortableLabel] = {}  # by token: a ranking has several rows
    for row in rows:
        try:
            found = read(row)
        except BadRow as problem:
            tally.bad(row.where, problem)
            continue
        except StoreError as problem:
            tally.bad(row.where, BadRow("wrong value", str(problem)))
            continue
        if isinstance(found, str):
            tally.dropped[found] += 1
        else:
            answers.update((answer.token, answer) for answer in found)
    return list(answers.values())


def _reader(rows: Sequence[SourceRow], name: str, template: str) -> Callable[[SourceRow], list[PortableLabel] | str]:
    if set(MARKS) <= set(columns_of(rows)):
        return lambda row: [answer_of(row)]
    return ForeignRows(detect_layout(rows, name), get_template(template), name, datetime.now(UTC)).answers_of


# ---- writing


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes under another name first: a reader never sees half a file."""
    kind = next((kind for kind in FILES if path.name.endswith(kind)), "")
    if not kind and (path.suffix or path.is_file()):
        raise UserError(f"'{path}' is no place for labels: give a name that ends in {', '.join(FILES)}, or a folder.")
    if path.is_dir() and (kind or not (path / "state.json").exists()) and any(path.iterdir()):
        raise UserError(f"'{path}' is a folder that holds something else: give another one.")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    if kind:
        (_write_parquet if kind == ".parquet" else _write_lines)(part, rows)
        with part.open("rb") as file:
            os.fsync(file.fileno())
    else:
        shutil.rmtree(part, ignore_errors=True)
        _write_folder(part, rows)
        shutil.rmtree(path, ignore_errors=True)
    os.replace(part, path)


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    # Without a time inside, so that the same labels are the same file.
    path.write_bytes(gzip.compress(text, mtime=0) if ".gz" in path.suffixes else text)


def _schema() -> Any:
    """Written down, since a column without a value has no type of its own."""
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


def _why_left_out(label: Label) -> str:
    if label.choice == "cant_tell":
        return "can't tell"
    return label.comparison.why_selected if label.comparison.why_selected in FOR_RELIABILITY else ""


def _in_brackets(counts: Counter[str]) -> str:
    return f" ({', '.join(f'{count} {reason}' for reason, count in counts.items())} left out)" if counts else ""
