"""Reward models whose losses must not depend on how many processes train them: `reward_processes.py FOLDER`.

FOLDER holds a tokenizer and a folder for each kind of model; the losses go to FOLDER/losses.json, written by the main
process.
"""

import json
import os
import sys
from pathlib import Path

from transformers import AutoTokenizer

from deep_rlhf.algorithms.supervised import reward_trainer
from deep_rlhf.algorithms.supervised.reward import RewardConfig, train_reward_model
from deep_rlhf.models.load import load_sequence_classifier
from deep_rlhf.runtime.processes import leave_processes
from deep_rlhf.types import Preference

RUNS = {
    "decoder": {"kind": "gpt2", "gradient_accumulation_steps": 2},
    "encoder": {"kind": "distilbert"},
    "adapters": {"kind": "gpt2", "use_peft": True, "lora_r": 4},
    "bf16": {"kind": "gpt2", "precision": "bf16"},
}
TOKENS = 40  # of a micro-batch, so that a batch has several
COLOURS = ["red", "green", "blue", "black"]


def preferences(count: int) -> list[Preference]:
    """Responses of 1 to 13 words, so that one process has more micro-batches than the other."""
    return [
        Preference(
            prompt="the cat sees ",
            a=" ".join(["gold", *COLOURS * (i % 4)]),
            b=" ".join(["grey", *COLOURS * (i % 3)]),
            id=str(i),
        )
        for i in range(count)
    ]


def losses(folder: Path, name: str, processes: int) -> list[float]:
    """What the trainer logged after each of three updates of eight pairs, and the final held-out loss."""
    flags = dict(RUNS[name])
    model = load_sequence_classifier(str(folder / flags.pop("kind")), num_labels=1)
    accumulated = flags.setdefault("gradient_accumulation_steps", 1)
    config = RewardConfig(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=8 // (processes * accumulated),
        learning_rate=3e-3,
        logging_steps=1,
        eval_strategy="no",
        save_strategy="no",
        template="plain",
        report_to="none",
        disable_tqdm=True,
        **flags,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    result = train_reward_model(config, model, tokenizer, preferences(24), preferences(8))
    return [row["loss"] for row in result.history if "loss" in row] + [result.metrics["loss"]]


if __name__ == "__main__":
    reward_trainer.TOKENS_AT_ONCE["cpu"] = TOKENS
    folder, processes = Path(sys.argv[1]), int(os.environ["WORLD_SIZE"])
    found = {name: losses(folder, name, processes) for name in RUNS}
    if os.environ["RANK"] == "0":
        (folder / "losses.json").write_text(json.dumps({"processes": processes, "losses": found}))
    leave_processes()
