"""Workplaces in which the two commands run as typed, and two ways of running them."""

import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from fixtures import build_workplace

from deep_rlhf.cli.main import run

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


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """Both commands on generated models and data: the reward without a wandb key, PPO with wandb offline."""
    folder = tmp_path_factory.mktemp("workplace")
    build_workplace(folder)
    reward = run_script(folder, *REWARD_COMMAND, HF_HUB_OFFLINE="1")
    ppo = run_script(folder, *PPO_COMMAND, HF_HUB_OFFLINE="1", WANDB_MODE="offline", WANDB_DIR=str(folder))
    return Workplace(folder, reward, ppo)


@dataclass
class Result:
    """How a command run in this process ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def cli(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Result]:
    """cli("ppo", "--flag=value", …) in the workplace's folder, in this process."""
    monkeypatch.chdir(workplace.folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(sys, "path", [str(workplace.folder), *sys.path])

    def call(command: str, *argv: str) -> Result:
        capsys.readouterr()
        code = 0
        try:
            run(command, list(argv))
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return call
