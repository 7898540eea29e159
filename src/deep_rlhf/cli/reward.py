"""`deep-rlhf reward`, also `python reward_modeling.py`: trains a reward model on preference pairs."""

import hashlib
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from deep_rlhf.algorithms.supervised.reward import RewardConfig, RewardResult, train_reward_model
from deep_rlhf.cli.flags import output_folder, parse_flags, save_config
from deep_rlhf.data.preferences import load_preferences
from deep_rlhf.data.sources import split_names
from deep_rlhf.errors import DataError
from deep_rlhf.models.saving import saving
from deep_rlhf.runtime.run_directory import RunDirectory, write_summary
from deep_rlhf.runtime.trackers import usable_trackers
from deep_rlhf.settings import check_settings
from deep_rlhf.types import Preference, RowReport

logger = logging.getLogger(__name__)

HELD_OUT_SHARE = 0.05  # of the prompts, where the data set has no test split


@dataclass(frozen=True)
class RewardArguments:
    """The model and its data."""

    model_name_or_path: str = field(
        default="distilbert/distilbert-base-uncased",
        metadata={"help": "Encoder, decoder or classifier: Hub name or folder."},
    )
    dataset_name: str = field(
        default="Anthropic/hh-rlhf", metadata={"help": "Preference pairs: Hub name, file or folder."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a data set on the Hub."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = field(
        default="test",
        metadata={"help": "Split to evaluate on; 5 % of the prompts are held out if there is only one split."},
    )
    data_dir: str | None = field(default=None, metadata={"help": "Folder inside the data set."})
    on_bad_rows: Literal["error", "skip"] = field(default="error", metadata={"help": "Treatment of malformed rows."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run Python code from the model's repository."})

    def __post_init__(self) -> None:
        check_settings(self)


def main(argv: list[str] | None = None) -> None:
    """Trains, evaluates and saves a reward model. Raises UserError for whatever the user can correct."""
    start = time.perf_counter()
    arguments, config = parse_flags(
        argv, RewardArguments, RewardConfig, prog="reward_modeling.py", description=__doc__.split("\n")[0]
    )
    folder = output_folder(config.output_dir)
    is_main = config.process_index == 0
    console = Console(quiet=not is_main)
    train, train_rows, held_out, test_rows = load_splits(arguments, config.template)
    console.print(f"training pairs: {train_rows}\nheld-out pairs: {test_rows}", highlight=False, soft_wrap=True)
    config.report_to = usable_trackers(config.report_to, run_name=config.run_name or Path(config.output_dir).name)
    result = train_reward_model(
        config,
        arguments.model_name_or_path,
        None,
        train,
        held_out,
        trust_remote_code=arguments.trust_remote_code,
        run_flags=asdict(arguments),
    )
    if not is_main:
        return
    rows = {"train": after_training(train_rows, result.train_rows), "test": after_training(test_rows, result.eval_rows)}
    summary = {
        **result.metrics,
        "seconds": time.perf_counter() - start,
        "rows": {name: {"read": row.read, "kept": row.kept, "dropped": row.dropped} for name, row in rows.items()},
        "model_name_or_path": arguments.model_name_or_path,
        "dataset_name": arguments.dataset_name,
    }
    write(result, summary, arguments, config, folder)
    console.print(table(summary, rows))
    console.print(f"Reward model: {folder}", highlight=False, markup=False, soft_wrap=True)


def load_splits(
    arguments: RewardArguments, template: str
) -> tuple[list[Preference], RowReport, list[Preference], RowReport]:
    """Training and held-out pairs, each with the report of its rows; the log says if no test split exists."""
    name, train_split = arguments.dataset_name, arguments.dataset_train_split
    source = {"config": arguments.dataset_config, "data_dir": arguments.data_dir}
    options: dict[str, Any] = {**source, "template": template, "on_bad_rows": arguments.on_bad_rows}
    train, train_rows = load_preferences(name, split=train_split, **options)
    wanted = arguments.dataset_test_split
    if wanted != RewardArguments.dataset_test_split or split_names(name, **source) != [train_split]:
        held_out, test_rows = load_preferences(name, split=wanted, **options)
        return train, train_rows, held_out, test_rows
    logger.info("'%s' has only the split '%s': 5 %% of its prompts are held out for testing.", name, train_split)
    train, held_out = hold_out(train)
    dropped = train_rows.dropped | {"held out for testing": len(held_out)}
    return train, RowReport(train_rows.read, len(train), dropped), held_out, RowReport(len(held_out), len(held_out))


def hold_out(preferences: Sequence[Preference]) -> tuple[list[Preference], list[Preference]]:
    """Training and held-out pairs: 5 % of the prompts, at least one, chosen by their hash, are held out.

    No prompt is on both sides. Raises DataError if all pairs share one prompt.
    """
    prompts = sorted({pair.prompt for pair in preferences}, key=lambda text: hashlib.sha256(text.encode()).digest())
    if len(prompts) < 2:
        raise DataError("All pairs have the same prompt, so none can be held out: give a data set with a test split.")
    chosen = set(prompts[: max(1, round(HELD_OUT_SHARE * len(prompts)))])
    return [p for p in preferences if p.prompt not in chosen], [p for p in preferences if p.prompt in chosen]


def after_training(read: RowReport, trained: RowReport) -> RowReport:
    """The report of a split's rows from the file to the pairs that were used."""
    return RowReport(read.read, trained.kept, read.dropped | trained.dropped)


def write(
    result: RewardResult, summary: dict[str, Any], arguments: RewardArguments, config: RewardConfig, folder: Path
) -> None:
    """Writes the model to `folder` and, beside it, the resolved flags, the log and the summary."""
    result.model.save(folder)
    with saving("results", folder):
        run = RunDirectory(folder)
        run.write_metrics(result.history)
        save_config(run.path / "config.yaml", arguments, config)
        write_summary(run.path / "summary.json", summary)


def table(summary: dict[str, Any], rows: dict[str, RowReport]) -> Table:
    """The final figures of a run."""
    shown = Table(title="Reward model", title_justify="left", show_header=False)
    shown.add_row("held-out accuracy", f"{summary['accuracy']:.3f}")
    shown.add_row("longer response wins", f"{summary['accuracy_length_baseline']:.3f}")
    shown.add_row("held-out loss", f"{summary['loss']:.4f}")
    if "oob_accuracy" in summary:
        shown.add_row("out-of-bag accuracy", "  ".join(f"{accuracy:.3f}" for accuracy in summary["oob_accuracy"]))
    for name, row in rows.items():
        shown.add_row(f"{name} pairs", str(row))
    shown.add_row("seconds", f"{summary['seconds']:.0f}")
    return shown
