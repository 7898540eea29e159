"""How many labels it takes: `make curves` (45 minutes on two cores; stopped, it goes on where it was).

In the demo's world, with its simulated annotators, the policy of `deep-rlhf teach` learns from 50 to 800 labels.
Online, questions are about the policy as it is, chosen at random, by variance or by information gain; offline, all are
about the start policy, at random. The judge then scores answers to held-out questions. Writes results/curves.json and
docs/images/curves.png.

Equal for all at an equal number of labels: the annotators, the number of refits of the reward model and of labels at
each, the number of PPO updates and every setting of theirs. Online these updates went along with the refits; offline
they all come after the last of them, against the finished reward model, from the start policy anew for each point.

`--quick` is a small one for the tests. `--jobs=2` runs as many processes of one thread.
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
    """How much of everything."""

    counts: tuple[int, ...] = (50, 100, 200, 400, 800)  # labels at which the judge looks
    refits: tuple[int, ...] = (25, 50, 75, 100, 150, 200, 300, 400, 600, 800)
    updates: int = 4  # of PPO after each refit
    seeds: tuple[int, ...] = (1, 2, 3)
    judged: int = 128  # held-out questions
    policy: dict[str, int] = field(default_factory=dict)  # of the world's policy, where it is another than teach's
    session: dict[str, Any] = field(default_factory=dict)

    def updates_at(self, count: int) -> int:
        """PPO updates that are done when the judge looks at `count` labels."""
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
    """The label schedule of the curves: the next number of `refits` before each round of updates."""

    scale: Scale

    def due(self, step: float, steps: float) -> int:
        """As LabelSchedule.due."""
        return self.scale.refits[min(int(step) // self.scale.updates, len(self.scale.refits) - 1)]


def main() -> None:
    """All runs that are not there yet, then the picture."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--run", nargs=2, metavar=("NAME", "SEED"), help="one run, in this process")
    parser.add_argument("--parts", type=Path, default=PARTS, help="folder of what is done already")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--image", type=Path, default=IMAGE)
    given = parser.parse_args()
    scale = QUICK if given.quick else Scale()
    if given.run:
        name, seed = given.run[0], int(given.run[1])
        write(given.parts / part(name, seed), one_run(name, seed, scale))
        return
    given.parts.mkdir(parents=True, exist_ok=True)
    start_policy(scale)  # made once, before two processes want it
    missing = [(name, seed) for seed in scale.seeds for name in RUNS if not (given.parts / part(name, seed)).exists()]
    options = [f"--parts={given.parts}", *(["--quick"] if given.quick else [])]
    with ThreadPoolExecutor(given.jobs) as pool:
        list(pool.map(lambda one: in_a_process(*one, options), missing))
    runs = [json.loads((given.parts / part(name, seed)).read_text()) for name in RUNS for seed in scale.seeds]
    write(given.results, {"scale": asdict(scale), "runs": runs})
    draw(runs, scale, given.image)
    sys.stdout.write(table(runs, scale))


def part(name: str, seed: int) -> str:
    """The file of one run."""
    return f"{name.replace(', ', '-')}-{seed}.json"


def in_a_process(name: str, seed: int, options: Sequence[str]) -> None:
    """One run with one thread, in a process of its own."""
    start = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--run", name, str(seed), *options]
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    sys.stderr.write(f"{name}, seed {seed}: {time.perf_counter() - start:.0f} s\n")


# ---- one run


def one_run(name: str, seed: int, scale: Scale) -> dict[str, Any]:
    """The judge's score of the start and at each number of labels."""
    from deep_rlhf.cli.console import silence_libraries

    silence_libraries()
    where, way = name.split(", ")
    start = time.perf_counter()
    points = (online if where == "online" else offline)(way, seed, scale)
    return {"name": name, "seed": seed, "points": points, "seconds": time.perf_counter() - start}


def online(way: str, seed: int, scale: Scale) -> list[Point]:
    """One session through all numbers of labels."""
    points: list[Point] = []
    looks = {scale.updates_at(count): count for count in scale.counts}

    with tempfile.TemporaryDirectory() as folder:

        def on_update(row: dict[str, Any]) -> None:
            if row["step"] in looks:
                points.append(look(session.trainer, scale, seed, looks[row["step"]], row))

        session = make_session(way, seed, scale, Path(folder), on_update)
        points.append(look(session.trainer, scale, seed, 0, {}))
        session.run()
    return points


def offline(way: str, seed: int, scale: Scale) -> list[Point]:
    """All labels are about the start policy; a policy of its own for each number of them."""
    from deep_rlhf.feedback.reward_refit.versions import Refits
    from deep_rlhf.models.reward import RewardModel

    with tempfile.TemporaryDirectory() as folder:
        session = make_session(way, seed, scale, Path(folder), None)
        trainer = session.trainer
        points = [look(trainer, scale, seed, 0, {})]
        start = trainer.snapshot()
        session.begin()
        refits = Refits(session.refit_job, session.rewards, session.store, policy=session.start_policy)
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
            points.append(look(trainer, scale, seed, labels, metrics))
    return points


def look(trainer: Any, scale: Scale, seed: int, labels: int, metrics: dict[str, Any]) -> Point:
    """What the judge says of one answer to each held-out question."""
    from deep_rlhf.data.chat import HH
    from deep_rlhf.data.synthetic import generate_prompts, judge

    prompts = [HH.prompt(text) for text in generate_prompts(1, "test")][: scale.judged]
    answers = trainer.generate(prompts, seed=seed)
    scores = [judge.score(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    return {"labels": labels, "gold": sum(scores) / len(scores), "kl": metrics.get("kl", 0.0)}


def make_session(
    way: str, seed: int, scale: Scale, folder: Path, on_update: Callable[[dict[str, Any]], None] | None
) -> Any:
    """As `deep-rlhf loop --mode=batched` makes it, but that every question is for its label."""
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
        **{"mode": "batched", "seed": seed, "choose_by": way, "updates": updates, "batched_updates": scale.updates},
        **{"initial_labels": scale.refits[0], "labels": scale.refits[-1], "held_out_members": 0, "fixed_prompts": 1},
        **{"win_rate_share": 0.0, "repeat_share": 0.0, "overlap_share": 0.0, "version_every": updates + 1},
        alarms=["reward_sign=off"],  # a curve of few labels shows what a bad reward model does, too
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
    """The policy that everything starts from."""
    from deep_rlhf.cli.synthetic_policy import PolicyScale, cached_policy

    return cached_policy(1, PolicyScale(**scale.policy))


# ---- the figures


def table(runs: list[dict[str, Any]], scale: Scale) -> str:
    """Mean of the seeds, lowest and highest."""
    lines = ["| labels | " + " | ".join(map(str, scale.counts)) + " |", "|---" * (len(scale.counts) + 1) + "|"]
    for name in RUNS:
        cells = []
        for count in scale.counts:
            scores = gold(runs, name, count)
            cells.append(f"{sum(scores) / len(scores):.3f} ({min(scores):.3f}–{max(scores):.3f})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    starts = gold(runs, RUNS[0], 0)
    return "\n".join([*lines, "", f"The start: {sum(starts) / len(starts):.3f}", ""])


def gold(runs: list[dict[str, Any]], name: str, labels: int) -> list[float]:
    """The judge's score of each seed."""
    return [
        point["gold"] for run in runs if run["name"] == name for point in run["points"] if point["labels"] == labels
    ]


def draw(runs: list[dict[str, Any]], scale: Scale, image: Path) -> None:
    """Online against offline, and each way of choosing against random: lines are means, points are seeds."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from deep_rlhf.evaluation.plots import GREY, STYLE

    pairs = (("Where the answers come from", (RUNS[0], RUNS[3])), ("How questions are chosen", RUNS[:3]))
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
    """Whole or not at all, so that a stop leaves nothing that looks done."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


if __name__ == "__main__":
    main()
