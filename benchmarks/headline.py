"""The original's PPO command with whole prompts in 8 GiB: `make headline` (about ten minutes on two cores).

The published command with prompts of up to 512 tokens instead of 2 to 8, 128 new tokens instead of 32 and a batch of
64: one update of a GPT-2 with 124M parameters, scored by a DistilBERT-base with its own tokenizer, both with random
weights, so that every response has full length. Other flags are passed to the command, as in
`headline.py --precision=fp32`. Fails if the process ever used more than 8 GiB. Writes results/headline.json.
"""

import argparse
import json
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests" / "cli"))

import torch  # noqa: E402
from conftest import PPO_COMMAND  # noqa: E402
from fixtures import link_scripts, write_jsonl  # noqa: E402
from published_sizes import DISTILBERT, GPT2, whole_prompts  # noqa: E402
from side_by_side.jobs import PPOJob, RewardJob  # noqa: E402
from side_by_side.measure import RUSAGE_BYTES  # noqa: E402
from side_by_side.workplace import (  # noqa: E402
    generated_dialogues,
    generated_tokenizer,
    gpt2_config,
    gpt2_tokenizer,
    has_real_data,
    real_dialogues,
    write_classifier,
)
from speed import environment, machine  # noqa: E402
from transformers import GPT2LMHeadModel  # noqa: E402

from deep_rlhf.models.load import load_sequence_classifier  # noqa: E402
from deep_rlhf.models.reward import RewardModel  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "headline.json"
LIMIT_GIB = 8
LONGEST_PROMPT, NEW_TOKENS, BATCH_SIZE = 512, 128, 64
POLICY = PPOJob(name="headline", title="policy", precision="fp32", **GPT2)
REWARD_MODEL = RewardJob(
    name="headline", title="reward model", precision="fp32", architecture="distilbert", **DISTILBERT
)
TINY = {"layers": 2, "width": 64, "heads": 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="try the script with two small models; write no results")
    options, flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        workplace = Path(folder)
        lengths = prepare(workplace, TINY if options.tiny else {})
        run = measured(workplace, flags) | {
            "prompt_tokens": {"mean": mean(lengths), "longest": max(lengths)},
            "data": "hh-rlhf" if has_real_data() else "generated text",
            "machine": machine(),
        }
    if not options.tiny:
        kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        RESULTS.write_text(json.dumps(kept | {" ".join(flags) or "as typed": run}, indent=1) + "\n")
    sys.stdout.write(sentence(run) + "\n")
    if run["peak_gib"] >= LIMIT_GIB:
        sys.exit(f"The run used more than {LIMIT_GIB} GiB.")


def prepare(workplace: Path, sizes: dict[str, int]) -> list[int]:
    """Writes models (with other `sizes` if given) and data of the command; returns the prompts' lengths in tokens."""
    torch.manual_seed(0)
    link_scripts(workplace)
    dialogues = real_dialogues() if has_real_data() else generated_dialogues()
    tokenizer = gpt2_tokenizer() if has_real_data() else generated_tokenizer(dialogues, POLICY.vocabulary)
    GPT2LMHeadModel(gpt2_config(replace(POLICY, **sizes), tokenizer)).save_pretrained(workplace / "gpt2")
    tokenizer.save_pretrained(workplace / "gpt2")

    its_tokenizer = generated_tokenizer(dialogues, REWARD_MODEL.vocabulary)
    write_classifier(replace(REWARD_MODEL, **sizes), its_tokenizer, workplace)
    classifier = load_sequence_classifier(str(workplace / "model"), num_labels=1)
    RewardModel(classifier, its_tokenizer, template="hh").save(workplace / "reward_modeling_anthropic_hh")

    prompts, lengths = whole_prompts(
        [prompt for prompt, _, _ in dialogues], tokenizer, longest=LONGEST_PROMPT, count=BATCH_SIZE
    )
    folder = workplace / "wentingzhao" / "anthropic-hh-first-prompt"
    folder.mkdir(parents=True)
    write_jsonl(folder / "train.jsonl.gz", [{"user": prompt} for prompt in prompts])
    return lengths


def measured(workplace: Path, flags: list[str]) -> dict[str, Any]:
    """Runs the command in `workplace` and measures its time and memory."""
    command = [
        *PPO_COMMAND,
        f"--max_prompt_length={LONGEST_PROMPT}",
        f"--max_new_tokens={NEW_TOKENS}",
        f"--batch_size={BATCH_SIZE}",
        *flags,
    ]
    env = environment() | {"WANDB_MODE": "offline", "WANDB_DIR": str(workplace)}
    start = time.perf_counter()
    status = subprocess.run([sys.executable, *command], cwd=workplace, env=env, check=False).returncode
    seconds = time.perf_counter() - start
    if status != 0:
        sys.exit(f"The command failed: {shlex.join(command)}")
    updates = [json.loads(line) for line in (workplace / "outputs" / "ppo" / "metrics.jsonl").read_text().splitlines()]
    return {
        "command": shlex.join(["python", *command]),
        "seconds": seconds,
        "seconds_per_update": mean(row["response_tokens"] * BATCH_SIZE / row["tokens_per_second"] for row in updates),
        "response_tokens": mean(row["response_tokens"] for row in updates),
        # of the command's process, or of this one when it started that: Linux inherits the peak
        "peak_gib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * RUSAGE_BYTES / 2**30,
    }


def sentence(run: dict[str, Any]) -> str:
    """A sentence that describes a run."""
    return (
        f"{run['command']}: {run['seconds_per_update']:.0f} s per update,"
        f" {run['seconds']:.0f} s in all, peak {run['peak_gib']:.2f} GiB; {BATCH_SIZE} prompts of"
        f" {run['prompt_tokens']['mean']:.0f} tokens on average and {run['prompt_tokens']['longest']} at most,"
        f" {run['response_tokens']:.0f} new tokens each."
    )


if __name__ == "__main__":
    main()
