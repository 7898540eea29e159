"""`deep-rlhf dpo`: tunes a policy on preference pairs without a reward model, the offline baseline of PPO."""

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from deep_rlhf.algorithms.supervised.dpo import DPOConfig, DPOResult, train_dpo
from deep_rlhf.cli.flags import output_folder, parse_flags, save_config
from deep_rlhf.cli.reward import RewardArguments, after_training, load_splits
from deep_rlhf.models.saving import save_model, saving
from deep_rlhf.runtime.run_directory import RunDirectory, write_summary
from deep_rlhf.runtime.trackers import usable_trackers
from deep_rlhf.types import RowReport


@dataclass(frozen=True)
class DPOArguments(RewardArguments):
    """The policy and its data."""

    model_name_or_path: str = field(default="gpt2", metadata={"help": "Language model: Hub name or folder."})


def main(argv: list[str] | None = None) -> None:
    """Trains, evaluates and saves a policy. Raises UserError for whatever the user can correct."""
    start = time.perf_counter()
    arguments, config = parse_flags(
        argv, DPOArguments, DPOConfig, prog="deep-rlhf dpo", description=__doc__.split("\n")[0]
    )
    folder = output_folder(config.output_dir)
    is_main = config.process_index == 0
    console = Console(quiet=not is_main)
    train, train_rows, held_out, test_rows = load_splits(arguments, config.template)
    console.print(f"training pairs: {train_rows}\nheld-out pairs: {test_rows}", highlight=False, soft_wrap=True)
    config.report_to = usable_trackers(config.report_to, run_name=config.run_name or Path(config.output_dir).name)
    result = train_dpo(
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
        "rows": {name: asdict(row) for name, row in rows.items()},
        "model_name_or_path": arguments.model_name_or_path,
        "dataset_name": arguments.dataset_name,
    }
    run = write(result, summary, arguments, config, folder)
    console.print(table(summary, rows))
    console.print(f"Policy: {run.path / 'model'}", highlight=False, markup=False, soft_wrap=True)


def write(
    result: DPOResult, summary: dict[str, Any], arguments: DPOArguments, config: DPOConfig, folder: Path
) -> RunDirectory:
    """Writes the policy to `<folder>/model` and the resolved flags, the log and the summary beside it.

    Raises ResourceError if the disk refuses a file.
    """
    save_model(result.model, result.tokenizer, folder / "model")
    with saving("results", folder):
        run = RunDirectory(folder)
        run.write_metrics(result.history)
        save_config(run.path / "config.yaml", arguments, config)
        write_summary(run.path / "summary.json", summary)
    return run


def table(summary: dict[str, Any], rows: dict[str, RowReport]) -> Table:
    """The final figures of a run."""
    shown = Table(title="DPO", title_justify="left", show_header=False)
    shown.add_row("held-out accuracy", f"{summary['accuracy']:.3f}")
    shown.add_row("held-out loss", f"{summary['loss']:.4f}")
    shown.add_row("reward of chosen responses", f"{summary['reward_chosen']:.3f}")
    shown.add_row("reward of rejected responses", f"{summary['reward_rejected']:.3f}")
    for name, row in rows.items():
        shown.add_row(f"{name} pairs", str(row))
    shown.add_row("seconds", f"{summary['seconds']:.0f}")
    return shown
