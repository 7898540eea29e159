"""Every algorithm on a task with a known optimum, and the cost of an update: `make algorithms` (fifteen minutes).

Writes results/algorithms.json and the two pictures of docs/algorithms.md. Tasks and settings are those of
tests/learning/optimum.py and optimum_runs.py; the cost is that of a 6-layer, 384-wide GPT-2 with random weights.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault("ACCELERATE_USE_CPU", "true")
sys.path += [str(ROOT / "tests"), str(ROOT / "tests" / "learning")]

import conftest  # noqa: E402
import matplotlib  # noqa: E402
import optimum  # noqa: E402
import optimum_runs  # noqa: E402
import torch  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "algorithms.json"
IMAGES = ROOT / "docs" / "images"
LENGTH, BOUND = 3, optimum.BOUNDS[3]
PPO_KINDS = [name for name in optimum_runs.RUNS if name.startswith("ppo")]
ALGORITHMS = ["ppo", "trpo", "rloo", "grpo", "reinforce++"]
COLOURS = dict(zip([*ALGORITHMS, *PPO_KINDS[1:]], matplotlib.color_sequences["tab10"], strict=False))
COST = {"batch_size": 32, "steps": 96, "max_new_tokens": 48}  # three updates; the first warms up

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the tables of the last results, measure nothing")
    parser.add_argument("--costs", action="store_true", help="measure the costs only, keep the other results")
    parser.add_argument("--cost", choices=ALGORITHMS, help="print the cost of one algorithm as JSON")
    options = parser.parse_args()
    if options.cost:
        sys.stdout.write(json.dumps(cost(options.cost)) + "\n")
        return
    if options.table:
        kept = json.loads(RESULTS.read_text())
        sys.stdout.write(table(kept["optimum"], kept["cost"]))
        return
    rows = json.loads(RESULTS.read_text())["optimum"] if options.costs else optimum_rows()
    costs = [measured_apart(name) for name in ALGORITHMS]
    RESULTS.write_text(json.dumps({"optimum": rows, "cost": costs}, indent=1) + "\n")
    sys.stdout.write(table(rows, costs))
    draw_ppo(rows)
    draw_algorithms(rows)


def optimum_rows() -> list[Row]:
    """KL(π ‖ π*) after every update of every run."""
    make_model = conftest.make_model.__wrapped__()
    tokenizer = conftest.make_tokenizer.__wrapped__()(optimum.WORDS)
    rows: list[Row] = []
    for name in optimum_runs.RUNS:
        for beta in optimum.SCALES:
            for seed in optimum.SEEDS:
                start = time.perf_counter()
                outcome = optimum_runs.train(
                    name, make_model, tokenizer, length=LENGTH, beta=beta, seed=seed, every_update=True
                )
                measuring = sum(outcome.seconds_measuring)
                rows.append(
                    {
                        **{"name": name, "beta": beta, "seed": seed, "batch_size": outcome.trainer.config.batch_size},
                        **{
                            "kl": [round(distance, 5) for distance in outcome.distances],
                            "seconds": time.perf_counter() - start - measuring,
                        },
                    }
                )
                sys.stderr.write(f"{name}, beta {beta}, seed {seed}: {outcome.distances[-1]:.4f}\n")
    return rows


def cost(name: str) -> Row:
    """Seconds per update and peak memory of this process."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    torch.set_num_threads(2)
    run = optimum_runs.RUNS[name]
    shared = {"adap_kl_ctrl": False, "init_kl_coef": 0.1, "learning_rate": 1e-5} | COST
    epochs = {"ppo": {"ppo_epochs": 4}, "trpo": {"value_epochs": 4}}.get(name, {})
    model = GPT2LMHeadModel(GPT2Config(vocab_size=4096, n_embd=384, n_layer=6, n_head=6, eos_token_id=1))
    words = [f"w{i}" for i in range(4000)]
    tokenizer = conftest.make_tokenizer.__wrapped__()(words)
    prompts = [" ".join(words[i : i + 24]) for i in range(0, 2000, 8)]
    trainer = run.trainer_class(
        run.config_class(**shared | epochs),
        model=model,
        tokenizer=tokenizer,
        prompts=prompts,
        reward=lambda prompts, responses: [len(set(response.split())) / 48 for response in responses],
    )
    trainer.train(updates=1)
    start = time.perf_counter()
    history = trainer.train()
    return {
        "name": name,
        "seconds_per_update": (time.perf_counter() - start) / (len(history) - 1),
        "memory_gb": history[-1]["memory_gb"],
    }


def measured_apart(name: str) -> Row:
    """Runs `cost` in a separate process, so that its peak memory is that of the algorithm."""
    command = [sys.executable, __file__, "--cost", name]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def table(rows: list[Row], costs: list[Row]) -> str:
    """The final distances (the worst seed's) and the costs, as Markdown tables."""
    lines = ["| | β = " + " | β = ".join(map(str, optimum.SCALES)) + " |", "|---|---|---|---|"]
    for name in optimum_runs.RUNS:
        worst = [max(row["kl"][-1] for row in rows if (row["name"], row["beta"]) == (name, b)) for b in optimum.SCALES]
        lines.append(f"| {name} | " + " | ".join(f"{value:.3f}" for value in worst) + " |")
    lines += ["", "| | seconds per update | peak memory, GB |", "|---|---|---|"]
    lines += [f"| {row['name']} | {row['seconds_per_update']:.1f} | {row['memory_gb']:.1f} |" for row in costs]
    lines += ["", "| | responses until KL(π ‖ π*) stays within the target at β = 0.5 | seconds |", "|---|---|---|"]
    for name in ALGORITHMS:
        needed = [until_within(row) for row in rows if (row["name"], row["beta"]) == (name, 0.5)]
        samples, seconds = (sum(column) / len(needed) for column in zip(*needed, strict=True))
        lines.append(f"| {name} | {samples:,.0f} | {seconds:.1f} |")
    return "\n".join([*lines, "", *fixed_points()]) + "\n"


def until_within(row: Row) -> tuple[int, float]:
    """Responses and seconds until the policy stays within the target."""
    updates = 1 + max(update for update, distance in enumerate(row["kl"]) if distance > BOUND)
    return updates * row["batch_size"], updates * row["seconds"] / (len(row["kl"]) - 1)


def fixed_points() -> list[str]:
    """The distance of GRPO's fixed points from π* for responses of one token, in closed form, without training."""
    tokenizer = conftest.make_tokenizer.__wrapped__()(optimum.WORDS)
    lines = [
        "| GRPO with k3 in its loss | " + " | ".join(f"β = {beta}" for beta in optimum.SCALES) + " |",
        "|---|---|---|---|",
    ]
    for scale_rewards in (True, False):
        cells = []
        for beta in optimum.SCALES:
            model = optimum.reference_model(conftest.make_model.__wrapped__(), "gpt2", 1)
            best = optimum.Optimum(model, tokenizer, length=1, beta=beta)
            fixed = optimum.grpo_fixed_point(
                best.log_policy(model), best.log_optimum, beta, scale_rewards=scale_rewards
            )
            cells.append(f"{float((fixed.exp() * (fixed - best.log_optimum)).sum()):.2f}")
        lines.append(f"| scale_rewards={scale_rewards} | " + " | ".join(cells) + " |")
    return lines


def draw_ppo(rows: list[Row]) -> None:
    """PPO's distance from the optimum at each β, one line per seed."""
    figure = Figure(figsize=(9.5, 3.2), layout="constrained")
    for axes, beta in zip(figure.subplots(1, len(optimum.SCALES), sharey=True), optimum.SCALES, strict=True):
        for row in rows:
            if row["beta"] == beta and row["name"] in PPO_KINDS:
                label = row["name"] if row["seed"] == optimum.SEEDS[0] else None
                axes.plot(row["kl"], color=COLOURS[row["name"]], linewidth=1, label=label)
        axes.set(title=f"β = {beta}", xlabel="update", yscale="log")
        finish(axes)
    figure.axes[0].set_ylabel("KL(π ‖ π*), nats per response")
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(IMAGES / "optimum.png", dpi=150)


def draw_algorithms(rows: list[Row]) -> None:
    """Every algorithm's distance at β = 0.5, against sampled responses and against time."""
    figure = Figure(figsize=(9.5, 3.4), layout="constrained")
    by_samples, by_time = figure.subplots(1, 2, sharey=True)
    for row in rows:
        if row["beta"] != 0.5 or row["name"] not in ALGORITHMS:
            continue
        updates = torch.arange(len(row["kl"]))
        style = {"color": COLOURS[row["name"]], "linewidth": 1}
        label = row["name"] if row["seed"] == optimum.SEEDS[0] else None
        by_samples.plot(updates * row["batch_size"], row["kl"], label=label, **style)
        by_time.plot(updates * row["seconds"] / updates[-1], row["kl"], **style)
    by_samples.set(xlabel="responses sampled", ylabel="KL(π ‖ π*), nats per response", yscale="log")
    by_time.set(xlabel="seconds on one core", yscale="log")
    by_samples.legend(frameon=False, fontsize=8)
    for axes in (by_samples, by_time):
        finish(axes)
    figure.savefig(IMAGES / "algorithms.png", dpi=150)


def finish(axes: Any) -> None:
    axes.axhline(BOUND, color="grey", linewidth=0.8, linestyle="--")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#E4E4E4", linewidth=0.6)


if __name__ == "__main__":
    main()
