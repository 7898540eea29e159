"""Label efficiency: `make curves` (45 minutes on two cores; a stopped run continues).

The policy of `deep-rlhf teach` learns the synthetic task from 50 to 800 labels of simulated annotators. Online,
questions are about the current policy and are selected at random, by variance or by information gain; offline, all are
about the start policy, at random. The judge then scores responses to held-out prompts. Writes results/curves.json and
docs/images/curves.png.

At an equal number of labels, all runs have the same annotators, refits of the reward model, labels at each refit, PPO
updates and settings. Online, updates and refits alternate; offline, all updates follow the last refit and use the final
reward model, anew from the start policy for each point.

`--quick` is a small version for the tests. `--jobs=2` runs two processes of one thread each.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault("ACCELERATE_USE_CPU", "true")

RESULTS = ROOT / "benchmarks" / "results" / "curves.json"
IMAGE = ROOT / "docs" / "images" / "curves.png"
PARTS = ROOT / "outputs" / "curves"
RUNS = ("online, random", "online, variance", "online, information", "offline, random")
COLOURS = dict(zip(RUNS, ("#0072B2", "#D55E00", "#009E73", "#6B6B6B"), strict=True))  # Okabe and Ito (2008)

Point = dict[str, float]


@dataclass(frozen=True)
class Scale:
    """The size of the benchmark."""

    counts: tuple[int, ...] = (50, 100, 200, 400, 800)  # labels at which the policy is evaluated
    refits: tuple[int, ...] = (25, 50, 75, 100, 150, 200, 300, 400, 600, 800)
    updates: int = 4  # PPO updates after each refit
    seeds: tuple[int, ...] = (1, 2, 3)
    judged: int = 128  # held-out prompts
    policy: dict[str, int] = field(default_factory=dict)  # changes to PolicyScale
    session: dict[str, Any] = field(default_factory=dict)

    def updates_at(self, count: int) -> int:
        """PPO updates that are done at `count` labels."""
        return self.updates * (self.refits.index(count) + 1)


QUICK = Scale(
    counts=(16, 24),
    refits=(8, 16, 24),
    updates=1,
    seeds=(1, 2),
    judged=8,
    policy={"layers": 1, "width": 32, "corpus_texts": 64, "sft_pairs": 256},
    session={"batch_size": 8, "mini_batch_size": 8, "max_new_tokens": 16},
)


@dataclass(frozen=True)
class InSteps:
    """A label schedule: the next number in `refits` before each round of updates."""

    scale: Scale

    def due(self, step: float, steps: float) -> int:
        """As LabelSchedule.due."""
        return self.scale.refits[min(int(step) // self.scale.updates, len(self.scale.refits) - 1)]


def main() -> None:
    """Runs what is missing, then draws the figure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--run", nargs=2, metavar=("NAME", "SEED"), help="a single run, in this process")
    parser.add_argument("--parts", type=Path, default=PARTS, help="folder of finished runs")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--image", type=Path, default=IMAGE)
    given = parser.parse_args()
    scale = QUICK if given.quick else Scale()
    if given.run:
        name, seed = given.run[0], int(given.run[1])
        write(given.parts / part(name, seed), one_run(name, seed, scale))
        return
    given.parts.mkdir(parents=True, exist_ok=True)
    start_policy(scale)  # pretrained once, before the processes start
    missing = [(name, seed) for seed in scale.seeds for name in RUNS if not (given.parts / part(name, seed)).exists()]
    options = [f"--parts={given.parts}", *(["--quick"] if given.quick else [])]
    with ThreadPoolExecutor(given.jobs) as pool:
        list(pool.map(lambda one: run_in_process(*one, options), missing))
    runs = [json.loads((given.parts / part(name, seed)).read_text()) for name in RUNS for seed in scale.seeds]
    write(given.results, {"scale": asdict(scale), "runs": runs})
    draw(runs, scale, given.image)
    sys.stdout.write(table(runs, scale))


def part(name: str, seed: int) -> str:
    """The file name of one run."""
    return f"{name.replace(', ', '-')}-{seed}.json"


def run_in_process(name: str, seed: int, options: Sequence[str]) -> None:
    """One run in a process of its own, with one thread."""
    start = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--run", name, str(seed), *options]
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    sys.stderr.write(f"{name}, seed {seed}: {time.perf_counter() - start:.0f} s\n")


# ---- one run


def one_run(name: str, seed: int, scale: Scale) -> dict[str, Any]:
    """The judge's mean score at the start and at each number of labels."""
    from deep_rlhf.cli.console import silence_libraries

    silence_libraries()
    setting, rule = name.split(", ")
    start = time.perf_counter()
    points = (online if setting == "online" else offline)(rule, seed, scale)
    return {"name": name, "seed": seed, "points": points, "seconds": time.perf_counter() - start}


def online(rule: str, seed: int, scale: Scale) -> list[Point]:
    """One session, evaluated at every number of labels."""
    points: list[Point] = []
    counts = {scale.updates_at(count): count for count in scale.counts}

    with tempfile.TemporaryDirectory() as folder:

        def on_update(row: dict[str, Any]) -> None:
            if row["step"] in counts:
                points.append(evaluate(session.trainer, scale, seed, counts[row["step"]], row))

        session = make_session(rule, seed, scale, Path(folder), on_update)
        points.append(evaluate(session.trainer, scale, seed, 0, {}))
        session.run()
    return points


def offline(rule: str, seed: int, scale: Scale) -> list[Point]:
    """All labels are about the start policy; each number of labels trains its own policy."""
    from deep_rlhf.feedback.loop.build import start_policy as start_policy_of
    from deep_rlhf.feedback.reward_refit.versions import Refits
    from deep_rlhf.models.reward import RewardModel

    with tempfile.TemporaryDirectory() as folder:
        session = make_session(rule, seed, scale, Path(folder), None)
        trainer = session.trainer
        points = [evaluate(trainer, scale, seed, 0, {})]
        start = trainer.snapshot()
        session.begin()
        refits = Refits(session.refit_job, session.rewards, session.store, policy=lambda: start_policy_of(trainer))
        rewards: dict[int, Any] = {}
        for labels in scale.refits:
            session.collect_labels(labels - session.store.label_count())
            refitted = refits.run()
            if labels in scale.counts:
                rewards[labels] = RewardModel.load(refitted.path)
        for labels, trainer.scorer in rewards.items():
            trainer.restore(start)
            for update in range(scale.updates_at(labels)):
                metrics = trainer.step(update)
            points.append(evaluate(trainer, scale, seed, labels, metrics))
    return points


def evaluate(trainer: Any, scale: Scale, seed: int, labels: int, metrics: dict[str, Any]) -> Point:
    """The judge's mean score of one response to each held-out prompt."""
    from deep_rlhf.data.chat import HH
    from deep_rlhf.data.synthetic import generate_prompts, judge

    prompts = [HH.prompt(text) for text in generate_prompts(1, "test")][: scale.judged]
    responses = trainer.generate(prompts, seed=seed)
    scores = [judge.score(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
    return {"labels": labels, "gold": sum(scores) / len(scores), "kl": metrics.get("kl", 0.0)}


def make_session(
    rule: str, seed: int, scale: Scale, folder: Path, on_update: Callable[[dict[str, Any]], None] | None
) -> Any:
    """The session of `deep-rlhf loop --mode=batched`, but every question is for its label."""
    import torch

    from deep_rlhf.data.chat import HH
    from deep_rlhf.data.synthetic import generate_prompts, judge
    from deep_rlhf.feedback.annotators.simulated import SimulatedLabeler
    from deep_rlhf.feedback.loop.config import SessionConfig
    from deep_rlhf.feedback.loop.session import Session
    from deep_rlhf.feedback.store import Store

    torch.set_num_threads(1)
    updates = scale.updates * len(scale.refits)
    config = SessionConfig(
        **{"mode": "batched", "seed": seed, "choose_by": rule, "updates": updates, "batched_updates": scale.updates},
        **{"initial_labels": scale.refits[0], "labels": scale.refits[-1], "held_out_members": 0, "fixed_prompts": 1},
        **{"win_rate_share": 0.0, "repeat_share": 0.0, "overlap_share": 0.0, "version_every": updates + 1},
        alarms=["reward_sign=off"],  # the effect of a bad reward model is part of the curve
        **scale.session,
    )
    return Session(
        config,
        store=Store(folder / "labels.db", seed=seed),
        output_dir=folder,
        model=str(start_policy(scale)),
        prompts=[HH.prompt(text) for text in generate_prompts(1, "train")],
        held_out_prompts=[HH.prompt(text) for text in generate_prompts(1, "test")][:2],
        labeler=SimulatedLabeler(judge.score, seed=seed),
        schedule=InSteps(scale),
        on_update=on_update,
    )


def start_policy(scale: Scale) -> Path:
    """The folder of the start policy."""
    from deep_rlhf.cli.synthetic_policy import PolicyScale, cached_policy

    return cached_policy(1, PolicyScale(**scale.policy))


# ---- the figures


def table(runs: list[dict[str, Any]], scale: Scale) -> str:
    """A Markdown table: mean, lowest and highest of the seeds."""
    lines = ["| labels | " + " | ".join(map(str, scale.counts)) + " |", "|---" * (len(scale.counts) + 1) + "|"]
    for name in RUNS:
        cells = []
        for count in scale.counts:
            scores = gold(runs, name, count)
            cells.append(f"{sum(scores) / len(scores):.3f} ({min(scores):.3f}–{max(scores):.3f})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    starts = gold(runs, RUNS[0], 0)
    return "\n".join([*lines, "", f"The start policy: {sum(starts) / len(starts):.3f}", ""])


def gold(runs: list[dict[str, Any]], name: str, labels: int) -> list[float]:
    """The judge's score of each seed."""
    return [
        point["gold"] for run in runs if run["name"] == name for point in run["points"] if point["labels"] == labels
    ]


def draw(runs: list[dict[str, Any]], scale: Scale, image: Path) -> None:
    """Online against offline, and the acquisition rules; lines are means, points are seeds."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from deep_rlhf.evaluation.plots import GREY, STYLE

    pairs = (("Which policy the questions are about", (RUNS[0], RUNS[3])), ("How questions are selected", RUNS[:3]))
    with rc_context(STYLE):
        figure = Figure(figsize=(9.0, 3.4), layout="constrained")
        for axes, (title, names) in zip(figure.subplots(1, 2, sharey=True), pairs, strict=True):
            for name in names:
                means = []
                for count in scale.counts:
                    scores = gold(runs, name, count)
                    means.append(sum(scores) / len(scores))
                    axes.plot([count] * len(scores), scores, ".", color=COLOURS[name], alpha=0.6, markersize=5)
                axes.plot(scale.counts, means, color=COLOURS[name], linewidth=1.8, label=name)
            starts = gold(runs, RUNS[0], 0)
            axes.axhline(sum(starts) / len(starts), color=GREY, linewidth=0.9, linestyle="--", label="the start policy")
            axes.set(title=title, xscale="log", xlabel="labels", xticks=scale.counts)
            axes.set_xticklabels([str(count) for count in scale.counts])
            axes.minorticks_off()
            axes.legend(frameon=False, loc="upper left", borderpad=0)
        figure.axes[0].set_ylabel("mean judge score (0 to 1)")
        image.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(image, dpi=150, metadata={"Software": None})


def write(path: Path, value: Any) -> None:
    """Writes the file completely or not at all, so that a stopped run leaves nothing that looks finished."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


if __name__ == "__main__":
    main()
