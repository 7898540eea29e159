"""The `ppo` command: prompts and a reward in; a tuned policy, its metrics and a report out."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console

from deep_rlhf.algorithms.ppo import PPOTrainer
from deep_rlhf.algorithms.ppo_config import PPOConfig
from deep_rlhf.cli.flags import output_folder, parse_flags, print_config, save_config
from deep_rlhf.data.prompts import load_prompts
from deep_rlhf.evaluation.comparison import build_samples
from deep_rlhf.evaluation.report import write_report
from deep_rlhf.models.reward import RewardModel, load_scorer
from deep_rlhf.runtime.run_directory import RunDirectory, write_summary
from deep_rlhf.types import RowReport, Scorer

SHOWN_PROMPTS = 16  # answered before and after, for the report
SAMPLES_PER_UPDATE = 4  # lines in samples.jsonl

console = Console()


def main(argv: list[str] | None = None) -> None:
    """Runs PPO as the flags say."""
    (config,) = parse_flags(argv, PPOConfig, prog="ppo.py", description=__doc__.split("\n")[0])
    start = time.perf_counter()
    output_dir = output_folder(config.output_dir or f"outputs/{config.exp_name}")
    scorer = load_scorer(config.reward_model, trust_remote_code=config.trust_remote_code)
    template = _template(config, scorer)
    prompts, rows = load_prompts(
        config.query_dataset,
        split=config.query_split,
        config=config.query_config,
        column=config.query_column,
        template=template,
        on_bad_rows=config.on_bad_rows,
    )
    trainer = PPOTrainer(config, prompts=prompts, reward=scorer)
    is_main = trainer.runtime.is_main
    if is_main:
        print_config(config)
        console.print(f"Prompts: {rows}.{_too_long(trainer.prompt_report)} Template: {template}.", highlight=False)
    run = RunDirectory(output_dir) if is_main else None
    if run:
        resolved = dataclasses.replace(
            config,
            output_dir=str(output_dir),
            template=template,
            steps=trainer.updates * config.batch_size,
            mini_batch_size=config.mini_batch_size or config.batch_size,
        )
        save_config(run.path / "config.yaml", resolved)
    shown = trainer.prompts[:SHOWN_PROMPTS]
    before = trainer.generate(shown, seed=config.seed)
    try:
        trainer.train(on_update=_recorder(trainer, run))
    finally:  # whatever ends the training, what was learned so far is kept
        trainer.save(output_dir / "model")
    after = trainer.generate(shown, seed=config.seed)
    if run is None:
        return

    scores_before, scores_after = (scorer.score(shown, texts).mean(1).tolist() for texts in (before, after))
    summary = {
        "seconds": time.perf_counter() - start,
        "updates": trainer.updates,
        "first": trainer.history[0],
        "last": trainer.history[-1],
        "prompts": dataclasses.asdict(rows),
        "prompts_in_tokens": dataclasses.asdict(trainer.prompt_report),
    }
    write_summary(run.path / "summary.json", summary)
    report = write_report(
        run.path / "report.html",
        title=f"PPO: {config.exp_name}",
        summary={"seconds": summary["seconds"]},
        history=trainer.history,
        samples=build_samples(shown, after, before=before, scores_after=scores_after, scores_before=scores_before),
        score_name="reward",
        config=dataclasses.asdict(config),
    )
    files = {"Policy": output_dir / "model", "Report": report, "Metrics": run.path / "metrics.jsonl"}
    for name, path in files.items():
        console.print(f"{name}: {path}", highlight=False, markup=False, soft_wrap=True)


def _template(config: PPOConfig, scorer: Scorer) -> str:
    """The prompts' template: as told, or the one the reward model was trained with, or none."""
    if config.template != "auto":
        return config.template
    known = scorer.template if isinstance(scorer, RewardModel) else None
    return known or "plain"


def _too_long(report: RowReport) -> str:
    return f" In tokens: {report}." if report.dropped else ""


def _recorder(trainer: PPOTrainer, run: RunDirectory | None) -> Callable[[dict[str, float]], None]:
    def on_update(metrics: dict[str, float]) -> None:
        rollout = trainer.last_rollout
        if run is None or rollout is None:
            return
        run.add_metrics(metrics)
        texts = zip(rollout.prompts, rollout.responses, rollout.scores.tolist(), strict=True)
        rows: list[dict[str, Any]] = [
            {"step": metrics["step"], "prompt": prompt, "response": response, "score": score}
            for prompt, response, score in texts
        ]
        run.add_samples(rows[:SAMPLES_PER_UPDATE])

    return on_update
