"""Data: preferences, prompts, votes and gold questions in every format, damaged."""

import gzip
import json
import os
import random
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from fuzz.case import Case, Workshop
from fuzz.kinds.flags import base_command
from fuzz.kinds.mutations import VALUES, damage, damage_json
from fuzz.world import OUT

Rows = list[dict[str, Any]]


def as_jsonl(rows: Rows, path: Path) -> None:
    path.write_text("".join(json.dumps(row, default=str) + "\n" for row in rows))


def as_json(rows: Rows, path: Path) -> None:
    path.write_text(json.dumps(rows, indent=1, default=str))


def as_gzip(rows: Rows, path: Path) -> None:
    path.write_bytes(gzip.compress("".join(json.dumps(row, default=str) + "\n" for row in rows).encode()))


def as_csv(rows: Rows, path: Path) -> None:
    import csv

    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0]])
        writer.writeheader()
        writer.writerows(rows)


def as_parquet(rows: Rows, path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def as_text(rows: Rows, path: Path) -> None:
    path.write_text("".join(f"{next(iter(row.values()), '')!r}\n" for row in rows))


WRITERS: dict[str, Callable[[Rows, Path], None]] = {
    ".jsonl": as_jsonl,
    ".json": as_json,
    ".jsonl.gz": as_gzip,
    ".csv": as_csv,
    ".parquet": as_parquet,
    ".txt": as_text,
}


def make(shop: Workshop) -> Case:
    """A command that reads a damaged file of rows."""
    rng = shop.random
    shop.take("policy", "encoder", "rewards.py", "pairs.jsonl", "prompts.jsonl", "votes.jsonl")
    command, flag, name = rng.choice(
        (
            ("reward", "--dataset_name", "pairs.jsonl"),
            ("reward", "--dataset_name", "pairs.jsonl"),
            ("dpo", "--dataset_name", "pairs.jsonl"),
            ("ppo", "--query_dataset", "prompts.jsonl"),
            ("rloo", "--query_dataset", "prompts.jsonl"),
            ("loop", "--labeler", "votes.jsonl"),
            ("store", "import", "pairs.jsonl"),
        )
    )
    rows = [json.loads(line) for line in (shop.folder / name).read_text().splitlines()]
    what = ["right"]
    if rng.random() < 0.6:
        change = rng.choice(ROW_CHANGES)
        rows, what = change(rng, rows), [change.__name__.replace("_", " ")]
    suffix = rng.choice([*WRITERS])
    path = shop.folder / f"data{suffix}"
    try:
        WRITERS[suffix](rows, path)
    except (pyarrow.ArrowException, ValueError, TypeError, OverflowError, IndexError):  # a value that the format lacks
        path = shop.folder / "data.jsonl"
        as_jsonl(rows, path)
    if what == ["right"] or rng.random() < 0.2:
        if path.suffix in (".jsonl", ".json") and rng.random() < 0.4:
            what.append(damage_json(rng, path))
        else:
            what.append(damage(rng, path)[0])
    if rng.random() < 0.1 and os.path.lexists(path):
        other = path.with_name(
            f"data{rng.choice(('.jsonl', '.csv', '.parquet', '.json', '.gz', '.arrow', '', '.zip'))}"
        )
        path = path.rename(other)
        what.append(f"called {other.name}")
    given = path.name
    if rng.random() < 0.1 and path.exists() and path.name != "data":
        (shop.folder / "data").mkdir(exist_ok=True)
        path.rename(shop.folder / "data" / f"train{''.join(path.suffixes)}")
        given = "data"
    flags = [f"--on_bad_rows={rng.choice(('skip', 'error'))}"] if command != "loop" and rng.random() < 0.5 else []
    text = f"{command}: {given}: {', '.join(what)}"
    if command == "store":
        return Case(["store", "import", "new.db", given, *flags], text, ("new.db",), check=exported_again)
    given = f"replay:{given}" if command == "loop" else given
    return Case([*base_command(command), f"{flag}={given}", *flags, OUT], text)


def exported_again(folder: Path) -> str | None:
    """A store that an import made can be read."""
    import sqlite3

    with sqlite3.connect(folder / "new.db") as database:
        if database.execute("pragma integrity_check").fetchone() != ("ok",):
            return "the new store is damaged"
    return None


# ---- changes of rows


def a_wrong_value(rng: random.Random, rows: Rows) -> Rows:
    row = rng.choice(rows)
    row[rng.choice([*row])] = rng.choice(VALUES)
    return rows


def a_column_of_wrong_values(rng: random.Random, rows: Rows) -> Rows:
    column, value = rng.choice([*rows[0]]), rng.choice(VALUES)
    return [{**row, column: value} for row in rows]


def a_column_renamed(rng: random.Random, rows: Rows) -> Rows:
    column, name = rng.choice([*rows[0]]), rng.choice(("x", "", "prompt", "chosen", "a", "label", "text", "\ud800"))
    return [{name if key == column else key: value for key, value in row.items()} for row in rows]


def a_column_more(rng: random.Random, rows: Rows) -> Rows:
    name = rng.choice(
        (
            "weight",
            "margin",
            "mu",
            "votes",
            "label",
            "id",
            "prompt",
            "a",
            "annotator",
            "policy_version",
            "seconds",
            "created",
        )
    )
    values = [
        *VALUES,
        1e308,
        "b",
        [["ann", "a"]],
        [["ann", "x"]],
        [["ann"]],
        datetime(9999, 12, 31),
        timedelta(days=10**8),
    ]
    some, other = rng.choice(values), rng.choice(values)
    return [{**row, name: some if i % 2 else other} for i, row in enumerate(rows)]


def a_time_column(rng: random.Random, rows: Rows) -> Rows:
    value = rng.choice((datetime(1, 1, 1), datetime(9999, 12, 31, 23, 59), timedelta(days=999_999_999), b"\xff\x00"))
    return [{**row, "created": value} for row in rows]


def few_rows(rng: random.Random, rows: Rows) -> Rows:
    return rows[: rng.choice((1, 1, 2, 3))]


def all_rows_the_same(rng: random.Random, rows: Rows) -> Rows:
    return [rows[0]] * rng.choice((1, 8, len(rows)))


def some_rows_twice(rng: random.Random, rows: Rows) -> Rows:
    return [*rows, *rng.choices(rows, k=5)]


def texts_with_odd_characters(rng: random.Random, rows: Rows) -> Rows:
    odd = rng.choice(
        ("\0", "\ud800", "\u2028", "\x1b[31m", "💥" * 50, "[bold]", "{x}", "%s", "\r", "<|endoftext|>", "\ufeff")
    )
    return [{key: odd + value if isinstance(value, str) else value for key, value in row.items()} for row in rows]


def empty_texts(rng: random.Random, rows: Rows) -> Rows:
    text = rng.choice(("", " ", "\n\nHuman:", "\n\nHuman: x\n\nAssistant:", "\n\nAssistant:"))
    return [{key: text if isinstance(value, str) else value for key, value in row.items()} for row in rows]


def long_texts(rng: random.Random, rows: Rows) -> Rows:
    return [{key: value * 200 if isinstance(value, str) else value for key, value in row.items()} for row in rows]


def ragged_rows(rng: random.Random, rows: Rows) -> Rows:
    return [{key: value for key, value in row.items() if rng.random() < 0.8} for row in rows]


ROW_CHANGES = (
    *(a_wrong_value, a_column_of_wrong_values, a_column_renamed, a_column_more, a_column_more, a_time_column, few_rows),
    *(all_rows_the_same, some_rows_twice, texts_with_odd_characters, empty_texts, long_texts, ragged_rows),
)
