"""`deep-rlhf store export|import|show`: labels out of a store and into it, and what it holds."""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from typing import NoReturn

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from deep_rlhf.errors import UserError
from deep_rlhf.feedback.exchange.export import export_labels
from deep_rlhf.feedback.exchange.import_ import import_labels, read_labels
from deep_rlhf.feedback.records import Label
from deep_rlhf.feedback.store import Store

USAGE = """usage: deep-rlhf store export STORE FILE [--all]
       deep-rlhf store import STORE FILE [--template=hh] [--on_bad_rows=error]
       deep-rlhf store show STORE

STORE: a file (SQLite), or postgresql+psycopg://user@host/database.
FILE: .jsonl, .jsonl.gz, .parquet, or a folder as `datasets` writes it. What is exported, reward_modeling.py takes as
it is; what reward_modeling.py takes, can be imported, once or several times.

  --all          export also "can't tell" and the answers to gold and repeated questions: complete, but not for training
  --template     of the prompts of a file that is no export: hh or plain
  --on_bad_rows  error (the default) or skip
"""

TRUTHS = ("true", "false")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One sentence instead of a page of usage."""
        raise UserError(f"{message[0].upper()}{message[1:]}. Run deep-rlhf store --help.")


def main(argv: list[str] | None = None) -> None:
    """Does one of the three; raises UserError for a user's mistake."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or {"-h", "--help"} & set(argv):
        sys.stdout.write(USAGE)
        return
    given = _parser().parse_args(_with_values(argv))
    console = Console(highlight=False, soft_wrap=True)
    if given.what == "import":
        answers, rows = read_labels(given.file, template=given.template, on_bad_rows=given.on_bad_rows)
        with Store(given.store) as store:  # not before the file is read: a mistyped name makes no store
            added = import_labels(store, answers)
        console.print(escape(f"{rows}"))
        console.print(f"{len(answers):,} answers, of which {added:,} are new to the store.")
        return
    with Store(given.store, must_exist=True) as store:
        if given.what == "show":
            _show(store, console)
            return
        written = export_labels(store, given.file, everything=given.all)
    console.print(escape(f"{written.labels:,} answers in {written.rows:,} rows: {given.file}"))
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
    """Every bare --all becomes --all=True: argparse would take the word behind it, STORE or FILE, for its value."""
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
    console.print(f"questions that wait: {store.waiting():,}")
    console.print(f"answers that count: {len(labels):,}, for training: {store.label_count():,}")
    for title, values in (
        ("annotator", [label.annotator for label in labels]),
        ("why it was asked", [label.comparison.why_selected for label in labels]),
        ("answer", [_said(label) for label in labels]),
        ("version of the policy", [str(label.comparison.policy_version) for label in labels]),
        ("version of the reward model", [str(label.comparison.reward_version) for label in labels]),
    ):
        if values:
            console.print(_counts(title, values))


def _said(label: Label) -> str:
    return "a ranking" if label.ranks is not None else (label.choice or "").replace("cant_tell", "can't tell")


def _counts(title: str, values: Sequence[str]) -> Table:
    table = Table("", "answers", title=title, title_justify="left")
    table.columns[1].justify = "right"
    counts = Counter(values)
    # Versions are numbers, and come in their order; whatever else comes by how often it does.
    number = all(value.isdecimal() for value in counts)
    for value, count in sorted(counts.items(), key=lambda item: (int(item[0]) if number else -item[1], item[0])):
        table.add_row(escape(value), f"{count:,}")
    return table
