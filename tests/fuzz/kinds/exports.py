"""Exports of labels: where they are written, and exports that were damaged before they are imported."""

import json
import random
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from fuzz.case import Case, Workshop
from fuzz.kinds.data_files import exported_again
from fuzz.kinds.mutations import VALUES, damage, damage_json

TARGETS = (
    "x.jsonl",
    "x.jsonl.gz",
    "x.parquet",
    "x",
    "x/y.jsonl",
    "x.csv",
    "folder",
    "labels.db",
    ".",
    "x.gz",
    "",
    "é/ü.jsonl",
    "x.jsonl/",
    "fifo.jsonl",
)
NUMBERS = (2**31, 2**62, 2**63, -(2**63) - 1, -1, 0, 1.5, 1e308, 10**30, True, "3", None)


def make(shop: Workshop) -> Case:
    """An export to an odd place, or an import of a damaged export."""
    rng = shop.random
    shop.take("labels.db", "labels.jsonl", "labels.parquet")
    if rng.random() < 0.3:
        return odd_target(shop)
    name = rng.choice(("labels.jsonl", "labels.jsonl", "labels.parquet"))
    path = shop.folder / name
    how = rng.random()
    if how < 0.35:
        what = damage(rng, path)[0]
    elif name == "labels.jsonl" and how < 0.6:
        what = damage_json(rng, path)
    else:
        what = odd_column(rng, path)
    store = rng.choice(("labels.db", "new.db"))
    flags = rng.choice(([], ["--on_bad_rows=skip"], ["--template=plain"]))
    writes = ("labels.db",) if store == "labels.db" else ("new.db",)
    return Case(
        ["store", "import", store, name, *flags],
        f"import into {store}: {what}",
        writes,
        check=exported_again if store == "new.db" else lambda folder: None,
    )


def odd_column(rng: random.Random, path: Path) -> str:
    """Values of one column."""
    columns = (
        "policy_version",
        "reward_version",
        "seconds",
        "strength",
        "question",
        "repeats",
        "weight",
        "mu",
        "created",
        "annotator",
    )
    columns += (
        "id",
        "token",
        "ranks",
        "answers",
        "writers",
        "predicted",
        "shown_order",
        "why_selected",
        "expected",
        "prompt",
        "a",
    )
    column = rng.choice(columns)
    rows: list[dict[str, Any]]
    if path.suffix == ".parquet":
        rows = pyarrow.parquet.read_table(path).to_pylist()
    else:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    value = rng.choice((*NUMBERS, *NUMBERS, *VALUES))
    for row in rows if rng.random() < 0.5 else rng.sample(rows, 1):
        row[column] = value
    if path.suffix == ".parquet":
        try:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        except (pyarrow.ArrowException, OverflowError, ValueError, TypeError):
            return "nothing"
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"{column} = {value!r:.40}"


def odd_target(shop: Workshop) -> Case:
    """An export whose file is an odd one."""
    import os

    rng = shop.random
    target = rng.choice(TARGETS)
    if target == "folder":
        (shop.folder / "folder").mkdir()
        (shop.folder / "folder" / "mine.txt").write_text("kept")
    elif target == "fifo.jsonl":
        os.mkfifo(shop.folder / target)
    elif target.startswith("x") and rng.random() < 0.3:
        (shop.folder / target.split("/")[0]).mkdir()
    writes = [target.split("/")[0]] if target not in ("", ".", "labels.db", "folder", "fifo.jsonl") else []
    flags = rng.choice(([], ["--all"]))
    return Case(
        ["store", "export", "labels.db", target, *flags],
        f"export to {target!r}",
        writes,
        refused=target in ("", ".", "labels.db", "x.csv", "folder"),
        seconds=30,
    )
