"""Measures reward modelling and PPO on a GPU, compared with TRL's PPO, in at most nine minutes.

One epoch of a DistilBERT-base on as many pairs as hh-rlhf has; PPO of GPT-2 on whole prompts, here and in TRL 1.12; and
the difference between the log-probabilities of sampler and trainer. Weights are random. Pairs are real if there is a
`shared/` folder beside the checkout, repeated up to the published number. Every part has its own process and time
limit: an epoch stopped by the limit is extrapolated (`seconds_measured` has the measured time), and for other parts the
report says why there is no figure. Writes results/gpu.json and prints a table.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from published_sizes import DISTILBERT, GPT2, whole_prompts
from side_by_side.arithmetic import PairLengths, reward_operations
from side_by_side.jobs import REWARD_ARGUMENTS, PPOJob, RewardJob, read_job, write_job
from side_by_side.table import UnequalWorkError, check_equal_work
from side_by_side.workplace import (
    generated_dialogues,
    generated_tokenizer,
    gpt2_tokenizer,
    has_real_data,
    real_dialogues,
    write_classifier,
    write_policy_and_reward_model,
)
from speed import machine
from transformers import AutoTokenizer, TrainerCallback

from deep_rlhf.algorithms.ppo import PPOConfig, PPOTrainer
from deep_rlhf.algorithms.supervised.reward import RewardConfig, RewardTrainer, pair_features
from deep_rlhf.models.load import load_sequence_classifier
from deep_rlhf.types import Preference

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "gpu.json"
NOT_MEASURED = "not measured"

PPO_JOB = PPOJob(
    name="gpu",
    title="PPO, GPT-2",
    precision="bf16",
    prompt_tokens=512,
    response_tokens=128,
    batch_size=256,
    mini_batch_size=32,
    updates=3,
    **GPT2,
)
REWARD_JOB = RewardJob(
    name="gpu",
    title="reward, DistilBERT",
    precision="bf16",
    architecture="distilbert",
    pairs=160_800,
    batch_size=64,
    **DISTILBERT,
)
GAP_RESPONSES = 64

# In seconds. With half a minute of preparation they add up to less than nine minutes.
EPOCH_SECONDS = 150
LIMITS = {"reward": EPOCH_SECONDS + 90, "ppo": 90, "trl": 130, "gap": 40}

# Key, description and target of each figure.
FIGURES = {
    "epoch_seconds": ("one epoch of reward modelling, 160,800 pairs, DistilBERT-base: seconds", "≤ 120"),
    "tokenising_seconds": ("tokenising them before it: seconds", ""),
    "pairs_per_second": ("pairs/s of the epoch", ""),
    "share": ("MFU (share of the measured matrix rate)", "≥ 0.4"),
    "tokens_per_second": ("PPO, GPT-2 124M, prompts ≤ 512, 128 new tokens, batch 256: new tokens/s", ""),
    "speed_ratio": ("speed relative to TRL", "≥ 5"),
    "peak_gb": ("peak GPU memory, GB", ""),
    "memory_ratio": ("TRL's memory relative to ours", "≥ 4"),
    "sampler_logprob_gap": (
        "sampler against trainer, mean absolute difference of log-probabilities: nats per token",
        "",
    ),
}

Row = dict[str, Any]


def main() -> None:
    if sys.argv[1:2] == ["--part"]:
        workplace, result = map(Path, sys.argv[3:])
        result.write_text(json.dumps(PARTS[sys.argv[2]](workplace)))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", metavar="PYTHON", help="a Python interpreter with trl 1.12")
    parser.add_argument("--output", type=Path, default=RESULTS, help="file of the results")
    parser.add_argument("--smallest", action="store_true", help="try the script without a GPU; no figures")
    options = parser.parse_args()
    if not (torch.cuda.is_available() or options.smallest):
        sys.exit("There is no GPU here; --smallest tries the script without one.")
    report = measured(options.peer, smallest=options.smallest)
    options.output.write_text(json.dumps(report, indent=1) + "\n")
    sys.stdout.write(table(report))


def measured(peer: str | None, *, smallest: bool) -> Row:
    """Runs every part in turn and computes the figures."""
    start = time.perf_counter()
    ppo, reward = PPO_JOB, REWARD_JOB
    if smallest:
        ppo, reward = replace(ppo.tiny(), prompt_tokens=128), reward.tiny()
    with tempfile.TemporaryDirectory() as folder:
        workplace = Path(folder)
        real = has_real_data() and not smallest
        prepare(workplace, ppo, reward, real=real)
        on_gpu = ["-m", "side_by_side.on_gpu"]
        parts = {
            "reward": run("reward", [sys.executable, __file__, "--part", "reward"], workplace / "reward"),
            "ppo": run("ppo", [sys.executable, *on_gpu, str(HERE / "side_by_side" / "project.py")], workplace / "ppo"),
            "gap": run("gap", [sys.executable, __file__, "--part", "gap"], workplace / "ppo"),
        }
        parts["trl"] = {"not_measured": "no --peer was given"}
        if peer is not None:
            parts["trl"] = run("trl", [peer, *on_gpu, str(HERE / "peers" / "trl_ppo.py")], workplace / "ppo")
    report = {
        "date": datetime.date.today().isoformat(),
        "machine": machine() | {"gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None},
        "torch": torch.__version__,
        "data": "hh-rlhf" if real else "generated text",
        "smallest": smallest,
        "settings": {"reward": asdict(reward), "ppo": asdict(ppo)},
        **parts,
        "seconds": time.perf_counter() - start,
    }
    return report | {"figures": figures(report)}


def prepare(workplace: Path, ppo: PPOJob, reward: RewardJob, *, real: bool) -> None:
    """Writes a folder for each of the two jobs."""
    torch.manual_seed(0)
    for folder in ("ppo", "reward"):
        (workplace / folder).mkdir()
    dialogues = real_dialogues() if real else generated_dialogues()
    tokenizer = gpt2_tokenizer() if real else generated_tokenizer(dialogues, ppo.vocabulary)
    prompts, _ = whole_prompts(
        [prompt for prompt, _, _ in dialogues], tokenizer, longest=ppo.prompt_tokens, count=ppo.episodes
    )
    write_job(ppo, workplace / "ppo")
    tokenizer.save_pretrained(workplace / "ppo" / "tokenizer")
    (workplace / "ppo" / "prompts.json").write_text(json.dumps(prompts))
    write_policy_and_reward_model(ppo, tokenizer, workplace / "ppo")

    tokenizer = generated_tokenizer(dialogues, reward.vocabulary)
    write_job(reward, workplace / "reward")
    tokenizer.save_pretrained(workplace / "reward" / "tokenizer")
    (workplace / "reward" / "dialogues.json").write_text(json.dumps(dialogues))
    write_classifier(reward, tokenizer, workplace / "reward")


def run(part: str, command: list[str], workplace: Path) -> Row:
    """Runs a part; returns its report, or the reason why it was not measured."""
    result = workplace / "result.json"
    result.unlink(missing_ok=True)
    paths = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    sys.stderr.write(f"{part}: at most {LIMITS[part]} s\n")
    try:
        done = subprocess.run(
            [*command, str(workplace), str(result)], env=env, capture_output=True, text=True, timeout=LIMITS[part]
        )
    except subprocess.TimeoutExpired:
        return {"not_measured": f"it did not end within {LIMITS[part]} s"}
    if done.returncode != 0:
        sys.stderr.write(done.stderr[-4000:])
        return {"not_measured": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]}
    return json.loads(result.read_text())


def reward_epoch(workplace: Path) -> Row:
    """One epoch of reward modelling in this process, stopped after EPOCH_SECONDS."""
    job: RewardJob = read_job(workplace)
    dialogues = islice(cycle(json.loads((workplace / "dialogues.json").read_text())), job.pairs)
    pairs = [Preference(prompt=prompt, a=better, b=worse) for prompt, better, worse in dialogues]
    tokenizer = AutoTokenizer.from_pretrained(workplace / "tokenizer")
    model = load_sequence_classifier(str(workplace / "model"), num_labels=1)
    with tempfile.TemporaryDirectory() as output_dir:
        config = RewardConfig(
            output_dir=output_dir,
            per_device_train_batch_size=job.batch_size,
            max_length=job.max_length,
            precision=job.precision,
            **REWARD_ARGUMENTS | {"use_cpu": not torch.cuda.is_available()},
        )
        start = time.perf_counter()
        features, rows = pair_features(pairs, tokenizer, config, job.max_length)
        tokenised = time.perf_counter()
        trainer = RewardTrainer(
            model,
            config,
            pad_token_id=tokenizer.pad_token_id,
            train_dataset=features,
            callbacks=[StopAfter(EPOCH_SECONDS)],
        )
        begun = time.perf_counter()
        trainer.train()
        seconds = seconds_since(begun)
    share = min(1.0, trainer.state.global_step * job.batch_size / len(features))
    lengths = [PairLengths(*pair["lengths"]) for pair in features]
    return {
        "pairs_read": rows.read,
        "pairs_kept": rows.kept,
        "tokens": sum(2 * prefix + a + b for prefix, a, b in lengths),
        "seconds_tokenising": tokenised - start,
        "seconds_measured": seconds,
        "share_of_the_epoch": share,
        "seconds": seconds / share,
        "operations": sum(reward_operations(job, lengths).values()),
        "precision": str(trainer.dtype),
        **gpu_figures(),
    }


class StopAfter(TrainerCallback):
    """Stops the training after `seconds`."""

    def __init__(self, seconds: float) -> None:
        self.end = time.perf_counter() + seconds

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop |= time.perf_counter() > self.end


def sampler_gap(workplace: Path) -> Row:
    """The difference between the trainer's first log-probabilities and those of the sampler."""
    job: PPOJob = read_job(workplace)
    responses = min(GAP_RESPONSES, job.batch_size)
    trainer = PPOTrainer(
        PPOConfig(
            precision=job.precision,
            batch_size=responses,
            max_prompt_length=job.prompt_tokens,
            max_new_tokens=job.response_tokens,
            ppo_epochs=1,
        ),
        prompts=json.loads((workplace / "prompts.json").read_text()),
        reward=lambda prompts, texts: [float(len(text)) for text in texts],
        model=str(workplace / "policy"),
        tokenizer=str(workplace / "tokenizer"),
    )
    (metrics,) = trainer.train(updates=1)
    return {"responses": responses, "sampler_logprob_gap": metrics["sampler_logprob_gap"]}


PARTS: dict[str, Callable[[Path], Row]] = {"reward": reward_epoch, "gap": sampler_gap}


def seconds_since(start: float) -> float:
    """Seconds since `start`, after waiting for the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def gpu_figures() -> Row:
    """The peak of allocated GPU memory in this process, in 10⁹ bytes, and the GPU's bf16 operations per second."""
    if not torch.cuda.is_available():
        return {}
    peak = torch.cuda.max_memory_allocated() / 1e9
    torch.cuda.empty_cache()
    size, products = 8192, 20
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    fastest = float("inf")
    for _ in range(5):  # the first warms up
        start = time.perf_counter()
        for _ in range(products):
            torch.mm(a, b)
        fastest = min(fastest, seconds_since(start) / products)
    return {"gpu_peak_gb": peak, "matrix_rate": 2 * size**3 / fastest}


def figures(report: Row) -> Row:
    """The figures of the table; all are NOT_MEASURED without a GPU or with --smallest."""
    found: Row = dict.fromkeys(FIGURES, NOT_MEASURED)
    if report["smallest"] or report["machine"]["gpu"] is None:
        return found
    reward, ppo, trl, gap = (report[part] for part in ("reward", "ppo", "trl", "gap"))
    if "seconds" in reward:
        found["epoch_seconds"] = reward["seconds"]
        found["tokenising_seconds"] = reward["seconds_tokenising"]
        found["pairs_per_second"] = reward["pairs_kept"] / reward["seconds"]
        found["share"] = reward["operations"] / reward["seconds"] / reward["matrix_rate"]
    if "seconds" in ppo:
        found["tokens_per_second"] = ppo["work"]["response_tokens"] / ppo["seconds"]
        found["peak_gb"] = ppo["gpu_peak_gb"]
    if "seconds" in ppo and "seconds" in trl and unequal_work(report) is None:
        found["speed_ratio"] = trl["seconds"] / ppo["seconds"]
        found["memory_ratio"] = trl["gpu_peak_gb"] / ppo["gpu_peak_gb"]
    if "sampler_logprob_gap" in gap:
        found["sampler_logprob_gap"] = gap["sampler_logprob_gap"]
    return found


def unequal_work(report: Row) -> str | None:
    """The difference between the work of the two PPO sides, or None."""
    try:
        check_equal_work(report["settings"]["ppo"]["precision"], report["trl"], report["ppo"])
    except UnequalWorkError as error:
        return str(error)
    return None


def table(report: Row) -> str:
    """The figures with their targets, and the reasons for those not measured, as a Markdown table."""
    lines = ["| | measured | target |", "|---|---|---|"]
    for name, (what, target) in FIGURES.items():
        lines.append(f"| {what} | {written(report['figures'][name])} | {target} |")
    where = report["machine"]
    described = [where["gpu"] or "no GPU", where["cpu"], f"torch {report['torch']}", report["data"]]
    lines += ["", f"{'; '.join(described)}; {report['seconds']:.0f} s in all"]
    for part in LIMITS:
        if "not_measured" in report[part]:
            lines.append(f"{part}: {report[part]['not_measured']}")
    if "seconds" in report["ppo"] and "seconds" in report["trl"] and (problem := unequal_work(report)):
        lines.append(problem)
    if report["reward"].get("share_of_the_epoch", 1.0) < 1.0:
        lines.append(f"the epoch is extrapolated from its first {report['reward']['share_of_the_epoch']:.0%}")
    return "\n".join(lines) + "\n"


def written(value: float | str) -> str:
    """A number with three significant digits, or all digits before the decimal point."""
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    main()
