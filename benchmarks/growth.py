"""Scaling of PPO's time and memory with batch size, response length and prompt length: `make growth` (six minutes).

Each is doubled three times from a base, and every size runs in a separate process: a 6-layer, 384-wide GPT-2 with
random weights, GPT-2's vocabulary, a reward model of the policy's size, prompts of exact length, and EOS disabled.
Writes results/growth.json and the picture of docs/growth.md.
"""

import argparse
import json
import math
import random
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import linear_regression, mean
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from side_by_side.arithmetic import ppo_operations
from side_by_side.jobs import THREADS, PPOJob, read_job, write_job
from side_by_side.measure import watch
from side_by_side.workplace import generated_dialogues, generated_tokenizer, write_policy_and_reward_model
from speed import machine, run_side
from transformers import PreTrainedTokenizerFast

from deep_rlhf.algorithms.ppo import PPOConfig, PPOTrainer
from deep_rlhf.models.reward import RewardModel

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "growth.json"
PICTURE = ROOT / "docs" / "images" / "growth.png"

BASE = PPOJob(
    name="growth",
    title="PPO",
    precision="fp32",
    prompt_tokens=32,
    response_tokens=32,
    batch_size=8,
    ppo_epochs=2,
    updates=3,  # the first warms up
)
AXES = {"batch_size": "batch size", "response_tokens": "response length", "prompt_tokens": "prompt length"}
FACTORS = (1, 2, 4, 8)

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the table of the last results, measure nothing")
    parser.add_argument("--measure", nargs=2, type=Path, metavar=("WORKPLACE", "RESULT"), help="measure one job")
    options = parser.parse_args()
    if options.measure:
        workplace, result = options.measure
        result.write_text(json.dumps(measure(workplace)))
        return
    if not options.table:
        RESULTS.write_text(json.dumps({"machine": machine(), "rows": measured_rows()}, indent=1) + "\n")
    rows = json.loads(RESULTS.read_text())["rows"]
    draw(rows)
    sys.stdout.write(table(rows))


def measured_rows() -> list[Row]:
    """Measures the base, and each axis at two, four and eight times its size."""
    jobs = [BASE] + [
        replace(BASE, **{axis: factor * getattr(BASE, axis)}) for axis in AXES for factor in FACTORS if factor > 1
    ]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        workplace = Path(folder)
        torch.manual_seed(0)
        tokenizer = generated_tokenizer(generated_dialogues(), BASE.vocabulary)
        tokenizer.save_pretrained(workplace / "tokenizer")
        write_policy_and_reward_model(BASE, tokenizer, workplace)
        for job in jobs:
            write_job(job, workplace)
            (workplace / "prompts.json").write_text(json.dumps(exact_prompts(tokenizer, job)))
            sizes = {axis: getattr(job, axis) for axis in AXES}
            operations = sum(ppo_operations(job, [job.prompt_tokens] * job.batch_size).values())
            measured = run_side([sys.executable, __file__, "--measure"], workplace)
            rows.append({**sizes, **measured, "operations": operations})
            sys.stderr.write(f"{sizes}: {measured['seconds']:.2f} s, {measured['memory_gb']:.2f} GB\n")
    return rows


def exact_prompts(tokenizer: PreTrainedTokenizerFast, job: PPOJob) -> list[str]:
    """A prompt for every episode: exactly `prompt_tokens` random tokens that survive decoding and encoding."""
    rng = random.Random(0)
    unused = sorted(token for text, token in tokenizer.get_vocab().items() if text.startswith("<unused-"))
    drawn = [rng.choices(unused, k=job.prompt_tokens) for _ in range(job.episodes)]
    texts = tokenizer.batch_decode(drawn)
    if tokenizer(texts).input_ids != drawn:
        raise SystemExit("The generated prompts have other tokens than intended.")
    return texts


def measure(workplace: Path) -> Row:
    """Seconds of the fastest update, the share of collecting in it, and memory, in this process."""
    torch.set_num_threads(THREADS)
    job: PPOJob = read_job(workplace)
    config = PPOConfig(
        precision=job.precision,
        batch_size=job.batch_size,
        max_prompt_length=job.prompt_tokens,
        max_new_tokens=job.response_tokens,
        ppo_epochs=job.ppo_epochs,
        learning_rate=1e-6,
    )
    trainer = PPOTrainer(
        config,
        prompts=json.loads((workplace / "prompts.json").read_text()),
        reward=RewardModel.load(workplace / "reward"),
        model=str(workplace / "policy"),
        tokenizer=str(workplace / "tokenizer"),
    )
    trainer.sampler.eos_ids = trainer.sampler.eos_ids[:0]
    with watch() as memory:
        warm = trainer.train()[1:]
    return {
        "seconds": min(row["response_tokens"] * job.batch_size / row["tokens_per_second"] for row in warm),
        "collecting_share": mean(row["sampling_share_of_time"] for row in warm),
        "start_gb": memory["start_gb"],
        "memory_gb": memory["peak_gb"] - memory["start_gb"],
    }


def along(rows: list[Row], axis: str) -> list[Row]:
    """The rows that differ from the base in `axis` only, smallest first."""
    others = [other for other in AXES if other != axis]
    found = [row for row in rows if all(row[other] == getattr(BASE, other) for other in others)]
    return sorted(found, key=lambda row: row[axis])


def exponent(rows: list[Row], axis: str, measured: str) -> float:
    """The slope on logarithmic scales: 1 for linear growth."""
    sizes, values = ([math.log(row[name]) for row in rows] for name in (axis, measured))
    return linear_regression(sizes, values).slope


def table(rows: list[Row]) -> str:
    """Every size, then the exponent of each axis over all sizes and over the last doubling, as Markdown tables."""
    lines = [
        "| batch | response | prompt | seconds per update | of which collecting | GFLOP/s | memory, GB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        sizes = " | ".join(str(row[axis]) for axis in AXES)
        lines.append(
            f"| {sizes} | {row['seconds']:.2f} | {row['collecting_share']:.0%}"
            f" | {row['operations'] / row['seconds'] / 1e9:.0f} | {row['memory_gb']:.2f} |"
        )
    lines += ["", "| | time | last doubling | arithmetic | memory | last doubling |", "|---|---|---|---|---|---|"]
    for axis, name in AXES.items():
        found = along(rows, axis)
        seconds, operations, memory = (exponent(found, axis, key) for key in ("seconds", "operations", "memory_gb"))
        last_seconds, last_memory = (exponent(found[-2:], axis, key) for key in ("seconds", "memory_gb"))
        lines.append(
            f"| {name} | {seconds:.2f} | {last_seconds:.2f} | {operations:.2f} | {memory:.2f} | {last_memory:.2f} |"
        )
    return "\n".join(lines) + "\n"


def draw(rows: list[Row]) -> None:
    """Time and memory against size relative to the base."""
    figure = Figure(figsize=(9.5, 3.6), layout="constrained")
    panels = {"seconds": "seconds per update", "memory_gb": "peak memory above the start, GB"}
    for axes, (measured, label) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for axis, name in AXES.items():
            found = along(rows, axis)
            axes.plot(FACTORS, [row[measured] for row in found], marker="o", markersize=4, label=name)
        base = along(rows, "batch_size")[0][measured]
        axes.plot(FACTORS, [base * factor for factor in FACTORS], color="grey", linestyle="--", label="linear")
        axes.set(xscale="log", yscale="log", xlabel="times the base", ylabel=label)
        axes.set_xticks(FACTORS, [f"{factor} ×" for factor in FACTORS])
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#E4E4E4", linewidth=0.6)
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(PICTURE, dpi=150)


if __name__ == "__main__":
    main()
