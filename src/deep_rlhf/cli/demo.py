"""`deep-rlhf demo`: the whole way in a few minutes, in the embedded world, with the code of the real commands.

A small GPT-2 learns the world's English and to answer (well or badly), simulated annotators compare its answers, a
reward-model ensemble is fitted to what they said, PPO tunes the policy against it; then once more, with comparisons of
what the tuned policy says (labels of the first policy alone teach the reward model nothing about the mistakes of the
later one: Christiano et al. 2017, section 3.3). A hidden judge measures. It is the annotators' taste; reward model and
PPO see nothing but the annotators' noisy answers.
"""

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from deep_rlhf.algorithms.ppo import PPOConfig, PPOTrainer
from deep_rlhf.algorithms.supervised.reward import RewardConfig, RewardResult, train_reward_model
from deep_rlhf.cli.flags import output_folder, parse_flags, save_config
from deep_rlhf.cli.training_bar import show_training_bar
from deep_rlhf.cli.world_policy import QUIET, PolicyScale, build_tokenizer, pretrain
from deep_rlhf.data.chat import HH
from deep_rlhf.data.synthetic import generate_prompts, judge
from deep_rlhf.evaluation.comparison import build_samples, win_rate
from deep_rlhf.evaluation.report import write_report
from deep_rlhf.evaluation.reward_quality import calibration
from deep_rlhf.feedback.annotators.simulated import SimulatedAnnotators
from deep_rlhf.models.policy import Policy
from deep_rlhf.rollout.generate import generate_text
from deep_rlhf.runtime.run_directory import RunDirectory, write_summary
from deep_rlhf.types import Preference, RowReport, check_seed

ANSWER_TOKENS = 64
PROMPTS_AT_ONCE = 400
SHOWN_SAMPLES = 4  # lines in samples.jsonl each time the judge looks
MEMBERS = 4  # of the reward-model ensemble (Coste et al. 2023: 4 to 5 suffice)
console = Console()


@dataclass(frozen=True)
class DemoConfig:
    """The flags of the demo."""

    seed: int = field(default=1, metadata={"help": "seed of everything that is drawn"})
    output_dir: str = field(
        default="outputs/demo", metadata={"help": "folder of the report, the summary and the models"}
    )

    def __post_init__(self) -> None:
        check_seed(self.seed)


@dataclass(frozen=True)
class Scale(PolicyScale):
    """How much of everything; the defaults fit in four minutes on two cores."""

    rounds: int = 2  # of comparing, fitting the reward model, and PPO
    comparisons: int = 1_200  # in each round
    updates: int = 26  # in all rounds together
    batch_size: int = 128
    gold_every: int = 5  # updates between two measurements by the judge
    held_out_prompts: int = 128


def main(argv: list[str] | None = None) -> None:
    """Runs the demo and prints its closing table."""
    show_training_bar()
    (config,) = parse_flags(argv, DemoConfig, prog="deep-rlhf demo", description=__doc__.split("\n")[0])
    output_folder(config.output_dir)
    run_demo(config, Scale())


def run_demo(config: DemoConfig, scale: Scale) -> dict[str, Any]:
    """All stages; returns what summary.json holds."""
    run = RunDirectory(config.output_dir)
    save_config(run.path / "config.yaml", config)
    stages = Stages()
    train_prompts = [HH.prompt(text) for text in generate_prompts(config.seed, "train")]
    held_out = [HH.prompt(text) for text in generate_prompts(config.seed, "test")][: scale.held_out_prompts]

    with stages("language model and SFT") as stage:
        tokenizer = build_tokenizer(config.seed)
        model = pretrain(config.seed, scale, tokenizer)
        before = write(Policy(model), tokenizer, held_out, config.seed)
        gold_before = judged(held_out, before)
        stage.says(f"judge {mean(gold_before):.2f} on {len(held_out)} held-out prompts")
    sft_model = copy.deepcopy(model)
    ppo_config = ppo_settings(config, scale)
    preferences: list[Preference] = []
    reports: list[RowReport] = []
    trainer: PPOTrainer | None = None
    for round_ in range(1, scale.rounds + 1):
        with stages(f"people compare answers, round {round_}") as stage:
            answered, rows = compare_answers(model, tokenizer, train_prompts, config.seed * 100 + round_, scale)
            preferences += answered
            reports.append(rows)
            stage.says(str(rows))
        with stages(f"reward model, round {round_}") as stage:
            reward = fit_reward_model(sft_model, tokenizer, preferences, config, run.path / "reward_model")
            accuracy, baseline = reward.metrics["accuracy"], reward.metrics["accuracy_length_baseline"]
            stage.says(f"accuracy {accuracy:.2f} on held-out pairs; longer answer wins: {baseline:.2f}")
        with stages(f"PPO, round {round_}") as stage:
            if trainer is None:
                trainer = PPOTrainer(
                    ppo_config, model=model, tokenizer=tokenizer, prompts=train_prompts, reward=reward.model
                )
                on_update = measured(trainer, run, held_out, scale, mean(gold_before))
            trainer.scorer = reward.model
            first = len(trainer.history)
            trainer.train(on_update, updates=scale.updates // scale.rounds)
            begin, last = trainer.history[first], trainer.history[-1]
            stage.says(f"reward {begin['score_mean']:.2f} → {last['score_mean']:.2f}, KL {last['kl']:.1f} nats")
    assert trainer is not None
    with stages("measure and save") as stage:
        after = write(Policy(model), tokenizer, held_out, config.seed)
        gold_after = judged(held_out, after)
        wins = win_rate(gold_after, gold_before)
        trainer.save(run.path / "model")
        stage.says(f"judge {mean(gold_before):.2f} → {mean(gold_after):.2f}, win rate {wins.rate:.2f}")

    summary = {
        "seed": config.seed,
        "seconds": stages.seconds,
        "gold_before": mean(gold_before),
        "gold_after": mean(gold_after),
        "win_rate": wins.rate,
        "win_rate_ci": [wins.low, wins.high],
        "kl": last["kl"],
        "reward_accuracy": accuracy,
        "reward_accuracy_length_baseline": baseline,
        "response_tokens_before": mean_tokens(tokenizer, before),
        "response_tokens_after": mean_tokens(tokenizer, after),
        "comparisons": [{"read": rows.read, "kept": rows.kept, "dropped": rows.dropped} for rows in reports],
        "stages": [{"name": name, "seconds": seconds, "result": result} for name, seconds, result in stages.rows],
    }
    write_summary(run.path / "summary.json", summary)
    report = write_report(
        run.path / "report.html",
        title=f"Deep RLHF demo, seed {config.seed}",
        summary=summary,
        stages=stages.rows,
        history=[*trainer.history, {"step": scale.updates + 1, "gold": mean(gold_after)}],
        calibration=calibration(reward.rewards[:, 0], reward.rewards[:, 1], reward.mu),
        samples=build_samples(held_out, after, before=before, scores_after=gold_after, scores_before=gold_before),
        config=vars(ppo_config),
        notes=[
            "The judge is the taste of the simulated annotators. Reward model and PPO never see it: they learn from"
            " comparisons of which a tenth are answered at random.",
            f"After update {scale.updates // scale.rounds} the reward model is fitted again, with comparisons of the"
            " tuned policy's answers too, so the scale of the reward changes there.",
        ],
    )
    console.print(stages.table())
    console.print(f"Report: {report}   Model: {run.path / 'model'}   Figures: {run.path / 'summary.json'}")
    return summary


def compare_answers(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, prompts: list[str], seed: int, scale: Scale
) -> tuple[list[Preference], RowReport]:
    """Two samples of the policy for each of `scale.comparisons` prompts, compared by simulated annotators."""
    asked = [prompts[i % len(prompts)] for i in range(scale.comparisons)]
    policy = Policy(model)
    first, second = (write(policy, tokenizer, asked, seed=seed * 100 + i) for i in (1, 2))
    annotators = SimulatedAnnotators(judge.score, seed=seed)
    return annotators.label_pairs(zip(asked, first, second, strict=True))


def fit_reward_model(
    model: GPT2LMHeadModel,
    tokenizer: PreTrainedTokenizerFast,
    preferences: list[Preference],
    config: DemoConfig,
    folder: Path,
) -> RewardResult:
    """An ensemble of heads on a copy of the policy's trunk; the comparisons of a sixth of the prompts are held out."""
    settings = model.config.to_dict() | {"id2label": {i: f"member {i}" for i in range(MEMBERS)}}
    classifier = GPT2ForSequenceClassification(GPT2Config(**settings | {"label2id": None}))
    classifier.transformer.load_state_dict(model.transformer.state_dict())
    held_out = set(sorted({pair.prompt for pair in preferences})[::6])
    result = train_reward_model(
        RewardConfig(
            output_dir=str(folder),
            ensemble_size=MEMBERS,
            label_noise=0.1,
            max_length=256,
            per_device_train_batch_size=16,
            num_train_epochs=1,
            learning_rate=5e-4,
            lr_scheduler_type="cosine",
            seed=config.seed,
            **QUIET,
        ),
        classifier,
        tokenizer,
        [pair for pair in preferences if pair.prompt not in held_out],
        [pair for pair in preferences if pair.prompt in held_out],
    )
    result.model.save(folder)
    return result


def ppo_settings(config: DemoConfig, scale: Scale) -> PPOConfig:
    """What PPO runs with here; everything else is the default of `ppo.py`."""
    return PPOConfig(
        exp_name="demo",
        seed=config.seed,
        model_name="the demo's own SFT policy",
        reward_model=str(Path(config.output_dir) / "reward_model"),
        output_dir=config.output_dir,
        max_new_tokens=ANSWER_TOKENS,
        steps=scale.updates * scale.batch_size,
        batch_size=scale.batch_size,
        mini_batch_size=scale.batch_size // 4,
        ppo_epochs=2,
        learning_rate=3e-4,
        lr_scheduler_type="linear",
        lam=1.0,  # a linear critic on so young a trunk is worth less than the plain sum of rewards
        init_kl_coef=0.05,
        adap_kl_ctrl=False,
    )


def measured(
    trainer: PPOTrainer, run: RunDirectory, held_out: list[str], scale: Scale, gold_before: float
) -> Callable[[dict[str, float]], None]:
    """Writes each update's metrics, and now and then lets the judge look at the policy from outside.

    Metrics tell of the policy that an update began with, so the judge's view after an update stands with the next.
    """
    gold: float | None = gold_before

    def on_update(metrics: dict[str, float]) -> None:
        nonlocal gold
        step = int(metrics["step"])
        if gold is not None:
            metrics["gold"] = gold
        run.add_metrics(metrics)
        gold = None
        if step % scale.gold_every == 0 and step < scale.updates:
            answers = trainer.generate(held_out, seed=1_000 + step)
            scores = judged(held_out, answers)
            gold = mean(scores)
            rows = zip(held_out[:SHOWN_SAMPLES], answers, scores, strict=False)
            run.add_samples([{"step": step, "prompt": p, "response": r, "gold": g} for p, r, g in rows])

    return on_update


def write(policy: Policy, tokenizer: PreTrainedTokenizerFast, prompts: list[str], seed: int) -> list[str]:
    """One sampled answer to each prompt."""
    answers: list[str] = []
    for start in tqdm(range(0, len(prompts), PROMPTS_AT_ONCE), desc="sampling", leave=False):
        part = prompts[start : start + PROMPTS_AT_ONCE]
        answers += generate_text(policy, tokenizer, part, max_new_tokens=ANSWER_TOKENS, seed=seed * 1_000 + start)
    return answers


def judged(prompts: list[str], answers: list[str]) -> list[float]:
    """The judge's score of each answer, 0 to 1."""
    return [judge.score(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def mean_tokens(tokenizer: PreTrainedTokenizerFast, answers: list[str]) -> float:
    return mean([float(len(row)) for row in tokenizer(answers).input_ids])


class Stages:
    """The stages of the demo with their seconds and what each has to say."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, float, str]] = []
        self._result = ""

    @property
    def seconds(self) -> float:
        return sum(seconds for _, seconds, _ in self.rows)

    def says(self, result: str) -> None:
        """The current stage's result in words."""
        self._result = result

    @contextmanager
    def __call__(self, name: str) -> Iterator["Stages"]:
        console.rule(f"[bold]{len(self.rows) + 1}. {name}", align="left")
        start = time.perf_counter()
        yield self
        seconds = time.perf_counter() - start
        self.rows.append((name, seconds, self._result))
        console.print(f"{self._result}  [dim]({seconds:.0f} s)")

    def table(self) -> Table:
        """All stages, for the end of the run."""
        table = Table(title="Deep RLHF demo", title_justify="left")
        for column in ("stage", "seconds", "result"):
            table.add_column(column, justify="right" if column == "seconds" else "left")
        for name, seconds, result in self.rows:
            table.add_row(name, f"{seconds:.0f}", result)
        table.add_row("all", f"{self.seconds:.0f}", "", style="bold")
        return table
