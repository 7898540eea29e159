"""`deep-rlhf store export|import|show`: exports and imports labels, and shows what a store holds."""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from typing import NoReturn

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from deep_rlhf.errors import ConfigError
from deep_rlhf.feedback.exchange.export import export_labels
from deep_rlhf.feedback.exchange.import_ import import_labels, read_labels
from deep_rlhf.feedback.records import Label
from deep_rlhf.feedback.store import Store

USAGE = """usage: deep-rlhf store export STORE FILE [--all]
       deep-rlhf store import STORE FILE [--template=hh] [--on_bad_rows=error]
       deep-rlhf store show STORE

STORE: a file (SQLite), or postgresql+psycopg://user@host/database.
FILE: .jsonl, .jsonl.gz, .parquet, or a folder as `datasets` writes it. reward_modeling.py reads exported files as they
are. Any file that reward_modeling.py reads can be imported; importing it again adds nothing.

  --all          also export "can't tell" and the labels of gold and repeated questions: complete, but not for training
  --template     renders the prompts of a file that is not an export: hh (the default) or plain
  --on_bad_rows  what to do with malformed rows: error (the default) or skip
"""

TRUTHS = ("true", "false")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raises ConfigError instead of printing the usage."""
        raise ConfigError(f"{message[0].upper()}{message[1:]}. Run deep-rlhf store --help.")


def main(argv: list[str] | None = None) -> None:
    """Exports, imports or shows labels. Raises ConfigError for wrong arguments."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or {"-h", "--help"} & set(argv):
        sys.stdout.write(USAGE)
        return
    given = _parser().parse_args(_with_values(argv))
    console = Console(highlight=False, soft_wrap=True)
    if given.what == "import":
        labels, rows = read_labels(given.file, template=given.template, on_bad_rows=given.on_bad_rows)
        with Store(given.store) as store:  # after reading, so that a mistyped file name creates no store
            added = import_labels(store, labels)
        console.print(escape(f"{rows}"))
        console.print(f"{len(labels):,} labels, of which {added:,} are new to the store.")
        return
    with Store(given.store, read_only=True) as store:
        if given.what == "show":
            _show(store, console)
            return
        written = export_labels(store, given.file, everything=given.all)
    console.print(escape(f"{written.labels:,} labels in {written.rows:,} rows: {given.file}"))
    for reason, count in written.left_out.items():
        console.print(f"left out: {count:,} {reason}")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="deep-rlhf store", add_help=False, allow_abbrev=False)
    commands = parser.add_subparsers(dest="what", required=True, parser_class=_Parser)
    for what in ("export", "import", "show"):
        command = commands.add_parser(what, add_help=False, allow_abbrev=False)
        command.add_argument("store", metavar="STORE")
        if what != "show":
            command.add_argument("file", metavar="FILE")
        if what == "export":
            command.add_argument("--all", default=False, type=_truth)
        if what == "import":
            command.add_argument("--template", default="hh")
            command.add_argument("--on_bad_rows", default="error", choices=("error", "skip"))
    return parser


def _with_values(argv: Sequence[str]) -> list[str]:
    """Replaces a bare --all by --all=True, because argparse would read the next word, STORE or FILE, as its value."""
    behind = [*argv[1:], ""]
    return [
        "--all=True" if word == "--all" and after.lower() not in TRUTHS else word
        for word, after in zip(argv, behind, strict=True)
    ]


def _truth(text: str) -> bool:
    if text.lower() not in TRUTHS:
        raise argparse.ArgumentTypeError(f"expected True or False, not {text}")
    return text.lower() == "true"


def _show(store: Store, console: Console) -> None:
    labels = store.labels()
    console.print(escape(f"{store}"))
    console.print(f"waiting questions: {store.waiting():,}")
    console.print(f"labels: {len(labels):,}, for training: {store.label_count():,}")
    for title, values in (
        ("annotator", [label.annotator for label in labels]),
        ("reason for asking", [label.comparison.why_selected for label in labels]),
        ("label", [_shown(label) for label in labels]),
        ("policy version", [str(label.comparison.policy_version) for label in labels]),
        ("reward model version", [str(label.comparison.reward_version) for label in labels]),
    ):
        if values:
            console.print(_counts(title, values))


def _shown(label: Label) -> str:
    return "a ranking" if label.ranks is not None else (label.choice or "").replace("cant_tell", "can't tell")


def _counts(title: str, values: Sequence[str]) -> Table:
    table = Table("", "labels", title=title, title_justify="left")
    table.columns[1].justify = "right"
    counts = Counter(values)
    # Version numbers are sorted as numbers, everything else by frequency.
    number = all(value.isdecimal() for value in counts)
    for value, count in sorted(counts.items(), key=lambda item: (int(item[0]) if number else -item[1], item[0])):
        table.add_row(escape(value), f"{count:,}")
    return table
