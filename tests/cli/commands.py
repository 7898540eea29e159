"""The two commands as users type them, and what a command that ran has printed."""

import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

# The original program's commands as its users typed them.
REWARD_COMMAND = shlex.split("""
    reward_modeling.py --model_name_or_path="distilbert/distilbert-base-uncased"
    --output_dir="reward_modeling_anthropic_hh" --per_device_train_batch_size=64 --num_train_epochs=1
    --gradient_checkpointing=True --learning_rate=1.41e-5 --report_to="wandb" --remove_unused_columns=False
    --optim="adamw_torch" --logging_steps=10 --evaluation_strategy="steps" --max_length=512
""")
PPO_COMMAND = shlex.split("""
    ppo.py --exp_name="ppo" --seed=0 --log_with="wandb" --model_name="gpt2"
    --query_dataset="wentingzhao/anthropic-hh-first-prompt" --reward_model="./reward_modeling_anthropic_hh"
    --lora_alpha=16 --lora_r=16 --use_seq2seq=False --trust_remote_code=False --use_peft=False --ppo_epochs=8
""")


def run_script(folder: Path, *argv: str, **env: str) -> subprocess.CompletedProcess[str]:
    """`python <argv>` in `folder`, with nothing of the caller's Hub or wandb settings."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "WANDB_"))}
    home = folder / ".home"
    own = {"HOME": str(home), "HF_HOME": str(home / "hf"), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.run(
        [sys.executable, *argv],
        cwd=folder,
        env={**inherited, **own, **env},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@dataclass
class Workplace:
    """A folder in which both commands ran, and what they said."""

    folder: Path
    reward: subprocess.CompletedProcess[str]
    ppo: subprocess.CompletedProcess[str]


@dataclass
class Result:
    """How a command run in this process ended."""

    code: int
    out: str
    err: str
