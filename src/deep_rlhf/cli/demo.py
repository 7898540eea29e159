"""`deep-rlhf demo`: end-to-end RLHF in a few minutes on the built-in synthetic task, with the real commands' code.

A small GPT-2 is pre-trained and fine-tuned (SFT) on responses of mixed quality. Then, in each of two rounds, simulated
annotators compare its responses, a reward-model ensemble is fitted to their labels, and PPO fine-tunes the policy
against it. The second round labels responses of the tuned policy: labels of the initial policy alone teach a reward
model nothing about the later one's mistakes (Christiano et al. 2017, section 3.3). A hidden judge, whose scores are the
annotators' utility, evaluates the policy; reward model and PPO see only the noisy labels.
"""

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
from deep_rlhf.cli.synthetic_policy import QUIET, PolicyScale, build_tokenizer, pretrain
from deep_rlhf.data.chat import HH
from deep_rlhf.data.synthetic import generate_prompts, judge
from deep_rlhf.evaluation.comparison import build_samples, win_rate
from deep_rlhf.evaluation.report import write_report_if_installed
from deep_rlhf.evaluation.reward_quality import calibration
from deep_rlhf.feedback.annotators.simulated import SimulatedAnnotators
from deep_rlhf.models.policy import Policy
from deep_rlhf.rollout.generate import generate_text
from deep_rlhf.runtime.run_directory import RunDirectory, write_summary
from deep_rlhf.settings import check_settings, seed_setting, setting
from deep_rlhf.types import Preference, RowReport

RESPONSE_TOKENS = 64
PROMPTS_AT_ONCE = 400
SHOWN_SAMPLES = 4  # lines in samples.jsonl per evaluation by the judge
MEMBERS = 4  # size of the reward-model ensemble (Coste et al. 2023: 4 to 5 suffice)
console = Console()


@dataclass(frozen=True)
class DemoConfig:
    """The flags of the demo."""

    seed: int = seed_setting(1, "seed of all random draws")
    output_dir: str = setting("outputs/demo", "folder for the report, the summary and the models")

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True)
class Scale(PolicyScale):
    """The sizes of the demo; the defaults take about four minutes on two cores."""

    rounds: int = 2  # of labelling, reward modelling and PPO
    comparisons: int = 1_200  # in each round
    updates: int = 26  # in all rounds together
    batch_size: int = 128
    gold_every: int = 5  # updates between two evaluations by the judge
    held_out_prompts: int = 128


def main(argv: list[str] | None = None) -> None:
    """Runs the demo and prints the table of its stages."""
    (config,) = parse_flags(argv, DemoConfig, prog="deep-rlhf demo", description=__doc__.split("\n")[0])
    output_folder(config.output_dir)
    run_demo(config, Scale())


def run_demo(config: DemoConfig, scale: Scale) -> dict[str, Any]:
    """Runs all stages and returns the content of summary.json."""
    run = RunDirectory(config.output_dir)
    run.start(also=["reward_model"])
    save_config(run.path / "config.yaml", config)
    stages = Stages()
    train_prompts = [HH.prompt(text) for text in generate_prompts(config.seed, "train")]
    held_out = [HH.prompt(text) for text in generate_prompts(config.seed, "test")][: scale.held_out_prompts]

    with stages("language model and SFT") as stage:
        tokenizer = build_tokenizer(config.seed)
        model = pretrain(config.seed, scale, tokenizer)
        before = sample_responses(Policy(model), tokenizer, held_out, config.seed)
        gold_before = judge_scores(held_out, before)
        stage.finish(f"judge {mean(gold_before):.2f} on {len(held_out)} held-out prompts")
    sft_model = copy.deepcopy(model)
    ppo_config = ppo_settings(config, scale)
    preferences: list[Preference] = []
    reports: list[RowReport] = []
    trainer: PPOTrainer | None = None
    for round_ in range(1, scale.rounds + 1):
        with stages(f"people compare responses, round {round_}") as stage:
            labelled, rows = compare_responses(model, tokenizer, train_prompts, config.seed * 100 + round_, scale)
            preferences += labelled
            reports.append(rows)
            stage.finish(str(rows))
        with stages(f"reward model, round {round_}") as stage:
            reward = fit_reward_model(sft_model, tokenizer, preferences, config, run.path / "reward_model")
            accuracy, baseline = reward.metrics["accuracy"], reward.metrics["accuracy_length_baseline"]
            stage.finish(f"accuracy {accuracy:.2f} on held-out pairs; longer response wins: {baseline:.2f}")
        with stages(f"PPO, round {round_}") as stage:
            if trainer is None:
                trainer = PPOTrainer(
                    ppo_config, model=model, tokenizer=tokenizer, prompts=train_prompts, reward=reward.model
                )
                on_update = metrics_recorder(trainer, run, held_out, scale, mean(gold_before))
            trainer.scorer = reward.model
            first = len(trainer.history)
            trainer.train(on_update, updates=scale.updates // scale.rounds)
            begin, last = trainer.history[first], trainer.history[-1]
            stage.finish(f"reward {begin['score_mean']:.2f} → {last['score_mean']:.2f}, KL {last['kl']:.1f} nats")
    assert trainer is not None
    with stages("measure and save") as stage:
        after = sample_responses(Policy(model), tokenizer, held_out, config.seed)
        gold_after = judge_scores(held_out, after)
        wins = win_rate(gold_after, gold_before)
        trainer.save(run.path / "model")
        stage.finish(f"judge {mean(gold_before):.2f} → {mean(gold_after):.2f}, win rate {wins.rate:.2f}")

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
    report = write_report_if_installed(
        run.path / "report.html",
        title=f"Deep RLHF demo, seed {config.seed}",
        summary=summary,
        stages=stages.rows,
        history=[*trainer.history, {"step": scale.updates + 1, "gold": mean(gold_after)}],
        calibration=calibration(reward.rewards[:, 0], reward.rewards[:, 1], reward.mu),
        samples=build_samples(held_out, after, before=before, scores_after=gold_after, scores_before=gold_before),
        config=vars(ppo_config),
        notes=report_notes(scale),
    )
    console.print(stages.table())
    files = {"Report": report, "Model": run.path / "model", "Figures": run.path / "summary.json"}
    console.print("   ".join(f"{name}: {path}" for name, path in files.items() if path))
    return summary


def report_notes(scale: Scale) -> list[str]:
    """What a reader of the report must know before the figures."""
    return [
        "The judge's score is the utility of the simulated annotators. Reward model and PPO never see it: they learn"
        " from pairs of which a tenth are labelled at random.",
        f"After update {scale.updates // scale.rounds} the reward model is fitted again, with pairs of the tuned"
        " policy's responses too, so the scale of the reward changes there.",
    ]


def compare_responses(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, prompts: list[str], seed: int, scale: Scale
) -> tuple[list[Preference], RowReport]:
    """Samples two responses to each of `scale.comparisons` prompts and has simulated annotators label them."""
    batch = [prompts[i % len(prompts)] for i in range(scale.comparisons)]
    policy = Policy(model)
    first, second = (sample_responses(policy, tokenizer, batch, seed=seed * 100 + i) for i in (1, 2))
    annotators = SimulatedAnnotators(judge.score, seed=seed)
    return annotators.label_pairs(zip(batch, first, second, strict=True))


def fit_reward_model(
    model: GPT2LMHeadModel,
    tokenizer: PreTrainedTokenizerFast,
    preferences: list[Preference],
    config: DemoConfig,
    folder: Path,
) -> RewardResult:
    """Fits an ensemble of heads on a copy of the policy's trunk; the pairs of a sixth of the prompts are held out."""
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
    """The settings of PPO in the demo; the others are the defaults of `ppo.py`."""
    return PPOConfig(
        exp_name="demo",
        seed=config.seed,
        model_name="the demo's own SFT policy",
        reward_model=str(Path(config.output_dir) / "reward_model"),  # no output_dir: checkpoints could not be resumed
        max_new_tokens=RESPONSE_TOKENS,
        steps=scale.updates * scale.batch_size,
        batch_size=scale.batch_size,
        mini_batch_size=scale.batch_size // 4,
        ppo_epochs=2,
        learning_rate=3e-4,
        lr_scheduler_type="linear",
        lam=1.0,  # a linear critic on so small a trunk estimates worse than the sum of rewards
        init_kl_coef=0.05,
        adap_kl_ctrl=False,
    )


def metrics_recorder(
    trainer: PPOTrainer, run: RunDirectory, held_out: list[str], scale: Scale, gold_before: float
) -> Callable[[dict[str, float]], None]:
    """Returns a callback that writes the metrics of each update, with the judge's score every `gold_every` updates.

    Metrics describe the policy before an update, so the judge's score after an update is written with the next one.
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
            responses = trainer.generate(held_out, seed=1_000 + step)
            scores = judge_scores(held_out, responses)
            gold = mean(scores)
            rows = zip(held_out[:SHOWN_SAMPLES], responses, scores, strict=False)
            run.add_samples([{"step": step, "prompt": p, "response": r, "gold": g} for p, r, g in rows])

    return on_update


def sample_responses(policy: Policy, tokenizer: PreTrainedTokenizerFast, prompts: list[str], seed: int) -> list[str]:
    """Samples one response to each prompt."""
    responses: list[str] = []
    for start in tqdm(range(0, len(prompts), PROMPTS_AT_ONCE), desc="sampling", leave=False):
        part = prompts[start : start + PROMPTS_AT_ONCE]
        responses += generate_text(policy, tokenizer, part, max_new_tokens=RESPONSE_TOKENS, seed=seed * 1_000 + start)
    return responses


def judge_scores(prompts: list[str], responses: list[str]) -> list[float]:
    """The judge's score of each response, 0 to 1."""
    return [judge.score(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def mean_tokens(tokenizer: PreTrainedTokenizerFast, responses: list[str]) -> float:
    return mean([float(len(row)) for row in tokenizer(responses).input_ids])


class Stages:
    """Times the stages of the demo and collects the result of each in words."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, float, str]] = []
        self._result = ""

    @property
    def seconds(self) -> float:
        return sum(seconds for _, seconds, _ in self.rows)

    def finish(self, result: str) -> None:
        """Sets the result of the current stage, in words."""
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
        """The table of all stages."""
        table = Table(title="Deep RLHF demo", title_justify="left")
        for column in ("stage", "seconds", "result"):
            table.add_column(column, justify="right" if column == "seconds" else "left")
        for name, seconds, result in self.rows:
            table.add_row(name, f"{seconds:.0f}", result)
        table.add_row("all", f"{self.seconds:.0f}", "", style="bold")
        return table
