"""Imports labels: from exports of a store, and from any preferences that `reward_modeling.py` reads."""

import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast, get_args

from deep_rlhf.data.chat import get_template
from deep_rlhf.data.layouts import columns_of, detect_layout, text_of
from deep_rlhf.data.readers import BadRow
from deep_rlhf.data.sources import SourceRow, Tally, read_rows, split_names
from deep_rlhf.errors import DataError, StoreError
from deep_rlhf.feedback.exchange.foreign_rows import UNNAMED_ANNOTATOR, ForeignRows
from deep_rlhf.feedback.records import CHOICES, Choice, Comparison, Label, Reason
from deep_rlhf.feedback.store import PortableLabel, Store
from deep_rlhf.feedback.store.schema import LARGEST
from deep_rlhf.types import RowReport

EXPORT_COLUMNS = ("prompt", "a", "b", "mu", "question", "token")  # a file with all of them is an export
BOUNDS = f"from 0 to {LARGEST}"
MOST_SHOWN = 80  # characters of a value in a message
BATCH = 50  # labels imported in one transaction, so that people who label meanwhile wait only briefly


def read_labels(
    source: str | Path, *, template: str = "hh", on_bad_rows: str = "error"
) -> tuple[list[PortableLabel], RowReport]:
    """Reads the labels of an export or of a foreign file; returns them and a report about the rows.

    All splits of the source are read. `template` renders the prompts of a foreign file; an export contains them as they
    were shown. A row with `votes` is one label per vote. Raises DataError for a malformed row, unless
    on_bad_rows="skip".
    """
    name = str(source)
    tally = Tally(on_bad_rows)
    splits = split_names(name)
    rows = [row for split in splits for row in read_rows(name, split=split, tally=tally)]
    labels = _labels_of(rows, name, template, tally)
    return labels, tally.report(name, "+".join(splits), tally.read - sum(tally.dropped.values()))


def import_labels(store: Store, labels: Sequence[PortableLabel]) -> int:
    """Adds labels to the store; returns how many were new. An interrupted import can be repeated.

    Raises StoreError, before it adds any, for a question that the store has with other texts.
    """
    store.check_import(labels)
    return sum(store.import_labels(labels[i : i + BATCH]) for i in range(0, len(labels), BATCH))


def _labels_of(rows: Sequence[SourceRow], name: str, template: str, tally: Tally) -> list[PortableLabel]:
    """The labels of all rows; malformed rows go to the tally."""
    if not rows:
        return []
    read = _reader(rows, name, template)
    labels: dict[str, PortableLabel] = {}  # by token: a ranking has several rows
    questions: dict[str, PortableLabel] = {}  # the first label of each question
    for row in rows:
        try:
            found = read(row)
            for one in [] if isinstance(found, str) else found:
                _check_repeated(one, labels.get(one.token), questions.get(one.question))
        except BadRow as problem:
            tally.bad(row.where, problem)
            continue
        except StoreError as problem:
            tally.bad(row.where, BadRow("wrong value", str(problem)))
            continue
        if isinstance(found, str):
            tally.dropped[found] += 1
        else:
            for one in found:
                labels.setdefault(one.token, one)
                questions.setdefault(one.question, one)
    return list(labels.values())


def _check_repeated(label: PortableLabel, known: PortableLabel | None, same: PortableLabel | None) -> None:
    """Raises BadRow for a second label with the same token, and for a second question with the same key."""
    if known is not None and known != label:
        raise BadRow("repeated id", f"column 'token' is that of another label, in {known.where}")
    if same is not None and same.texts != label.texts:
        raise BadRow("repeated id", f"column 'question' is that of other texts, in {same.where}")


def _reader(rows: Sequence[SourceRow], name: str, template: str) -> Callable[[SourceRow], list[PortableLabel] | str]:
    if set(EXPORT_COLUMNS) <= set(columns_of(rows)):
        return lambda row: [_exported_label(row)]
    return ForeignRows(detect_layout(rows, name), get_template(template), name, datetime.now(UTC)).labels_of


def _exported_label(row: SourceRow) -> PortableLabel:
    """The label of an exported row; all rows of a ranking contain the same label. Raises BadRow."""
    values = row.values
    ranks = _integers(values, "ranks")
    texts = values.get("answers")
    if texts is None:
        texts = [text_of(values, "a"), text_of(values, "b")]
    elif not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise BadRow("wrong type", "column 'answers' must be a list of texts")
    try:
        comparison = Comparison(
            prompt=text_of(values, "prompt"),
            responses=tuple(texts),
            why_selected=cast(Reason, _one_of(values, "why_selected", get_args(Reason), "random")),
            policy_version=_integer(values, "policy_version") or 0,
            reward_version=_integer(values, "reward_version") or 0,
            writers=_integers(values, "writers") or (),
            predicted=_number(values, "predicted"),
            expected=cast(Choice | None, _one_of(values, "expected", get_args(Choice), None)),
        )
    except DataError as error:
        raise BadRow("wrong value", str(error)) from None
    label = Label(
        event_id=0,
        comparison_id=0,
        comparison=comparison,
        annotator=_text(values, "annotator") or UNNAMED_ANNOTATOR,
        choice=_choice(_number(values, "mu")) if ranks is None else None,
        ranks=ranks,
        strength=_integer(values, "strength"),
        shown_order=_integers(values, "shown_order") or tuple(range(len(texts))),
        seconds=_number(values, "seconds") or 0.0,
        created=_moment(values, "created"),
    )
    repeats = _text(values, "repeats") or None
    return PortableLabel(
        label=label,
        token=text_of(values, "token"),
        question=text_of(values, "question"),
        repeats=repeats,
        where=row.where,
    )


def _choice(mu: float | None) -> Choice:
    if mu not in CHOICES:
        raise BadRow("wrong value", f"column 'mu' must be 1, 0, 0.5 or null (can't tell), but is {mu}")
    return CHOICES[mu]


def _one_of(values: dict[str, Any], column: str, known: tuple[str, ...], default: str | None) -> str | None:
    value = values.get(column)
    if value is None or value == "":
        return default
    if value not in known:
        raise BadRow("wrong value", f"column '{column}' must be one of {', '.join(known)}, but is {_shown(value)}")
    return value


def _text(values: dict[str, Any], column: str) -> str:
    return "" if values.get(column) is None else text_of(values, column)


def _integer(values: dict[str, Any], column: str) -> int | None:
    value = values.get(column)
    if value is not None and not _is_whole(value):
        raise BadRow("wrong type", f"column '{column}' must be a whole number {BOUNDS}, but is {_shown(value)}")
    return value


def _integers(values: dict[str, Any], column: str) -> tuple[int, ...] | None:
    value = values.get(column)
    if value is None:
        return None
    if not isinstance(value, list) or not all(map(_is_whole, value)):
        raise BadRow(
            "wrong type", f"column '{column}' must be a list of whole numbers {BOUNDS}, but is {_shown(value)}"
        )
    return tuple(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST


def _shown(value: Any) -> str:
    """A value of a file, in a message."""
    try:
        words = repr(value)
    except ValueError:  # Python does not write whole numbers of more than 4,300 digits
        words = "a very large number"
    return words if len(words) <= MOST_SHOWN else f"{words[:MOST_SHOWN]}…"


def _number(values: dict[str, Any], column: str) -> float | None:
    value = values.get(column)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise BadRow("wrong type", f"column '{column}' must be a number, but is {_shown(value)}")
    return float(value)


def _moment(values: dict[str, Any], column: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text_of(values, column))
        return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
    except (ValueError, OverflowError):  # OverflowError: the first or last day of the calendar, in another zone
        raise BadRow("wrong type", f"column '{column}' must be a time, but is {_shown(values[column])}") from None
