"""The jobs of both sides, with one set of settings, and this project's targets."""

import argparse
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

THREADS = 2
VOCABULARY = 50_258  # GPT-2's 50,257 tokens and one for padding

# TRL's names and defaults if it has one; the learning rate is smaller, so that random weights stay finite.
PPO_SETTINGS: dict[str, float] = {
    "learning_rate": 1e-6,
    "temperature": 0.7,
    "kl_coef": 0.05,
    "cliprange": 0.2,
    "cliprange_value": 0.2,
    "vf_coef": 0.1,
    "gamma": 1.0,
    "lam": 0.95,
}
# transformers.TrainingArguments of both sides
REWARD_ARGUMENTS: dict[str, Any] = {
    "num_train_epochs": 1,
    "learning_rate": 1.41e-5,
    "lr_scheduler_type": "linear",
    "max_grad_norm": 1.0,
    "weight_decay": 0.0,
    "seed": 42,  # determines the order of the pairs
    "gradient_checkpointing": False,
    "eval_strategy": "no",
    "save_strategy": "no",
    "logging_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "use_cpu": True,
}

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PPOJob:
    """PPO of a GPT-2 with random weights on prompts of at most `prompt_tokens`; EOS is disabled."""

    kind: ClassVar[str] = "ppo"
    unit: ClassVar[str] = "episodes"
    name: str
    title: str
    precision: Precision
    critic: Literal["shared", "separate"] = "shared"  # this project's; TRL's is always a separate model
    layers: int = 6
    width: int = 384
    heads: int = 6
    vocabulary: int = VOCABULARY
    prompt_tokens: int = 64
    response_tokens: int = 48
    batch_size: int = 16
    mini_batch_size: int = 4  # TRL's responses per backward pass, accumulated to one optimiser step per epoch
    ppo_epochs: int = 4
    updates: int = 2

    @property
    def episodes(self) -> int:
        return self.batch_size * self.updates

    def tiny(self) -> "PPOJob":
        """A small version of the job that takes a few seconds."""
        sizes = {"layers": 2, "width": 32, "heads": 2, "vocabulary": 700, "prompt_tokens": 16}
        return replace(self, **sizes, response_tokens=6, batch_size=4, mini_batch_size=2, ppo_epochs=2)


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardJob:
    """One epoch of reward modelling on pairs, from random weights; pairs over `max_length` tokens are dropped."""

    kind: ClassVar[str] = "reward"
    unit: ClassVar[str] = "pairs"
    name: str
    title: str
    precision: Precision
    architecture: Literal["distilbert", "gpt2"]
    layers: int = 6
    width: int = 768
    heads: int = 12
    vocabulary: int = VOCABULARY
    pairs: int = 64
    batch_size: int = 16
    max_length: int = 512

    def tiny(self) -> "RewardJob":
        """A small version of the job that takes a few seconds; some of its pairs are too long."""
        sizes = {"layers": 2, "width": 32, "heads": 2, "vocabulary": 700}
        return replace(self, **sizes, pairs=12, batch_size=4, max_length=200)


Job = PPOJob | RewardJob
KINDS: dict[str, type[PPOJob] | type[RewardJob]] = {kind.kind: kind for kind in (PPOJob, RewardJob)}

_LARGE: dict[str, Any] = {"batch_size": 32, "response_tokens": 128}
_JOBS: list[Job] = [
    PPOJob(name="ppo-fp32", title="PPO, shared trunk", precision="fp32"),
    PPOJob(name="ppo-separate-fp32", title="PPO, separate critic", precision="fp32", critic="separate"),
    PPOJob(name="ppo-bf16", title="PPO, shared trunk", precision="bf16"),
    PPOJob(name="ppo-large-fp32", title="PPO, batch 32, response 128", precision="fp32", **_LARGE),
    PPOJob(name="ppo-large-bf16", title="PPO, batch 32, response 128", precision="bf16", **_LARGE),
    RewardJob(name="distilbert-fp32", title="reward, DistilBERT", precision="fp32", architecture="distilbert"),
    RewardJob(name="distilbert-bf16", title="reward, DistilBERT", precision="bf16", architecture="distilbert"),
    RewardJob(name="gpt2-fp32", title="reward, GPT-2", precision="fp32", architecture="gpt2"),
    RewardJob(name="gpt2-bf16", title="reward, GPT-2", precision="bf16", architecture="gpt2"),
]
JOBS = {job.name: job for job in _JOBS}


@dataclass(frozen=True, slots=True)
class Bar:
    """Targets: the ratios of TRL's seconds and of TRL's peak memory above the start to this project's."""

    speed: float
    memory: float


BARS = {
    "ppo-fp32": Bar(2.5, 2.5),
    "ppo-separate-fp32": Bar(2.0, 2.0),
    "ppo-bf16": Bar(4.0, 2.5),
    "ppo-large-fp32": Bar(2.0, 5.0),
    "ppo-large-bf16": Bar(4.0, 5.0),
    "distilbert-fp32": Bar(1.8, 2.5),
    "distilbert-bf16": Bar(2.5, 2.5),
    "gpt2-fp32": Bar(3.0, 4.0),
    "gpt2-bf16": Bar(4.0, 4.0),
}
LEAST_SHARE = {"fp32": 0.6}  # target MFU: necessary arithmetic by the measured matrix rate


def write_job(job: Job, folder: Path) -> None:
    """Writes `job.json` into a workplace."""
    (folder / "job.json").write_text(json.dumps({"kind": job.kind, **asdict(job)}, indent=1))


def workplace_and_result(description: str | None) -> tuple[Path, Path]:
    """The command-line arguments of a side: the folder of the job, and the file for its report."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("workplace", type=Path, help="folder with job.json and the job's models and data")
    parser.add_argument("result", type=Path, help="JSON file to write the report to")
    options = parser.parse_args()
    return options.workplace, options.result


def read_job(folder: Path) -> Any:
    """The job of a workplace: a PPOJob or a RewardJob."""
    settings = json.loads((folder / "job.json").read_text())
    return KINDS[settings.pop("kind")](**settings)
