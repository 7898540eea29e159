"""`deep-rlhf ppo`, trpo, rloo, grpo and reinforce_plus_plus: train a policy against a reward, and write a report."""

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from rich.console import Console

from deep_rlhf.algorithms.online.config import OnlineConfig
from deep_rlhf.algorithms.online.metrics import sample_rows
from deep_rlhf.algorithms.online.trainer import OnlineTrainer
from deep_rlhf.cli.commands import ALGORITHMS, COMMANDS
from deep_rlhf.cli.flags import output_folder, parse_flags, print_config, save_config
from deep_rlhf.data.prompts import load_prompts
from deep_rlhf.errors import ResourceError, UserError
from deep_rlhf.evaluation.comparison import build_samples
from deep_rlhf.evaluation.report import write_report_if_installed
from deep_rlhf.models.reward import RewardModel, load_scorer
from deep_rlhf.runtime.run_directory import RunDirectory, write_summary
from deep_rlhf.runtime.signals import Stopped
from deep_rlhf.types import RowReport, Scorer

REPORT_PROMPTS = 16  # prompts whose responses before and after training are in the report

console = Console()
logger = logging.getLogger(__name__)


def main(command: str, argv: list[str] | None = None) -> None:
    """Trains with the algorithm `command`. After a signal to stop, a checkpoint and the policy as it is are saved."""
    config_class, trainer_class = algorithm(command)
    prog = "ppo.py" if command == "ppo" else f"deep-rlhf {command}"
    (config,) = parse_flags(argv, config_class, prog=prog, description=COMMANDS[command])
    start = time.perf_counter()
    config = dataclasses.replace(config, output_dir=config.output_dir or f"outputs/{config.exp_name}")
    output_dir = output_folder(str(config.output_dir))
    scorer = load_scorer(config.reward_model, trust_remote_code=config.trust_remote_code, timeout=config.reward_timeout)
    template = _template(config, scorer)
    prompts, rows = load_prompts(
        config.query_dataset,
        split=config.query_split,
        config=config.query_config,
        column=config.query_column,
        template=template,
        on_bad_rows=config.on_bad_rows,
        num_proc=config.dataset_num_proc,
    )
    trainer = trainer_class(config, prompts=prompts, reward=scorer)
    scorer = trainer.scorer  # a copy in the run's precision; the loaded one can be freed
    is_main = trainer.runtime.is_main
    if is_main:
        print_config(_public(config))
        console.print(f"Prompts: {rows}.{_dropped(trainer.prompt_report)} Template: {template}.", highlight=False)
    report_prompts = trainer.prompts[:REPORT_PROMPTS]
    before = trainer.generate(report_prompts, seed=config.seed, reference=True)
    run = RunDirectory(output_dir) if is_main else None
    if run:
        with _disk_errors(output_dir):
            if trainer.history:
                run.resume(trainer.logged)
            else:
                run.start(inputs=(config.model_name, config.reward_model, config.query_dataset))
            save_config(run.path / "config.yaml", _resolved(config, template, trainer))
    _train(trainer, run, output_dir / "model")
    after = trainer.generate(report_prompts, seed=config.seed)
    if run is None:
        return
    scores_before = scorer.score(report_prompts, before).mean(1).tolist()
    scores_after = scorer.score(report_prompts, after).mean(1).tolist()
    summary = {
        "seconds": time.perf_counter() - start,
        "updates": trainer.updates,
        "first": trainer.history[0],
        "last": trainer.history[-1],
        "prompts": dataclasses.asdict(rows),
        "prompts_in_tokens": dataclasses.asdict(trainer.prompt_report),
    }
    with _disk_errors(output_dir):
        write_summary(run.path / "summary.json", summary)
        report = write_report_if_installed(
            run.path / "report.html",
            title=f"{command}: {config.exp_name}",
            summary={"seconds": summary["seconds"]},
            history=trainer.history,
            samples=build_samples(
                report_prompts, after, before=before, scores_after=scores_after, scores_before=scores_before
            ),
            score_name="reward",
            config=dataclasses.asdict(_public(config)),
        )
    files = {"Policy": output_dir / "model", "Metrics": run.path / "metrics.jsonl"} | (
        {"Report": report} if report else {}
    )
    for name, path in files.items():
        console.print(f"{name}: {path}", highlight=False, markup=False, soft_wrap=True)


def algorithm(command: str) -> tuple[type[OnlineConfig], type[OnlineTrainer]]:
    """The settings and trainer classes of a command."""
    module = import_module(f"deep_rlhf.algorithms.{command}")
    name = ALGORITHMS[command]
    return getattr(module, f"{name}Config"), getattr(module, f"{name}Trainer")


def _train(trainer: OnlineTrainer, run: RunDirectory | None, folder: Path) -> None:
    """Trains and saves the policy, also when an error or a signal ends the training."""
    try:
        trainer.train(on_update=_recorder(trainer, run))
    except Stopped:
        done = len(trainer.history)
        logger.info("Stopped after update %d: the same command with --resume continues from there.", done)
        trainer.save(folder)
        raise
    except Exception:
        try:
            trainer.save(folder)
        except UserError as error:  # it must not hide the error that ended the training
            logger.warning("%s", error)
        raise
    trainer.save(folder)


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """Raises ResourceError where the block cannot write a file."""
    try:
        yield
    except OSError as error:
        raise ResourceError(
            f"The results could not be written to '{folder}' ({error.strerror}): make room and continue with --resume."
        ) from error


def _public(config: OnlineConfig) -> OnlineConfig:
    """The settings without the Hub token."""
    push = config.push_to_hub_if_best_kwargs or {}
    shown = {name: value for name, value in push.items() if name != "token"}
    return dataclasses.replace(config, push_to_hub_if_best_kwargs=shown or None)


def _resolved(config: OnlineConfig, template: Any, trainer: OnlineTrainer) -> OnlineConfig:
    """The settings with `template` and `steps` resolved, to repeat the run."""
    steps = trainer.updates * config.batch_size
    return dataclasses.replace(_public(config), template=template, steps=steps, resume=False)


def _template(config: OnlineConfig, scorer: Scorer) -> str:
    """The prompts' template: as set, or the one that the reward model was trained with, or plain."""
    if config.template != "auto":
        return config.template
    known = scorer.template if isinstance(scorer, RewardModel) else None
    return known or "plain"


def _dropped(report: RowReport) -> str:
    return f" In tokens: {report}." if report.dropped else ""


def _recorder(trainer: OnlineTrainer, run: RunDirectory | None) -> Callable[[dict[str, float]], None]:
    def on_update(metrics: dict[str, float]) -> None:
        rollout = trainer.last_rollout
        if run is None or rollout is None:
            return
        with _disk_errors(run.path):
            run.add_metrics(metrics)
            run.add_samples(sample_rows(rollout, metrics["step"]))

    return on_update
