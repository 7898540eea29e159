"""Runs this project's side of a job: `python -m side_by_side.project WORKPLACE RESULT`."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from deep_rlhf.algorithms.ppo import PPOConfig, PPOTrainer
from deep_rlhf.algorithms.supervised.batches import Batch
from deep_rlhf.algorithms.supervised.reward import RewardConfig, RewardTrainer, pair_features
from deep_rlhf.models.reward import RewardModel
from deep_rlhf.types import Preference
from side_by_side.jobs import (
    PPO_SETTINGS,
    REWARD_ARGUMENTS,
    THREADS,
    PPOJob,
    RewardJob,
    read_job,
    workplace_and_result,
)
from side_by_side.measure import watch

PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def ppo(job: PPOJob, folder: Path) -> dict[str, Any]:
    """Trains a policy; the reward model is the same as TRL's."""
    settings: dict[str, Any] = dict(PPO_SETTINGS)
    config = PPOConfig(
        init_kl_coef=settings.pop("kl_coef"),
        adap_kl_ctrl=False,
        max_grad_norm=None,  # TRL's PPO clips nothing
        lr_scheduler_type="linear",
        precision=job.precision,
        critic=job.critic,
        max_prompt_length=job.prompt_tokens,
        max_new_tokens=job.response_tokens,
        batch_size=job.batch_size,
        ppo_epochs=job.ppo_epochs,
        **settings,
    )
    trainer = PPOTrainer(
        config,
        prompts=json.loads((folder / "prompts.json").read_text()),
        reward=RewardModel.load(folder / "reward"),
        model=AutoModelForCausalLM.from_pretrained(folder / "policy"),
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
    )
    trainer.sampler.eos_ids = trainer.sampler.eos_ids[:0]
    sampled: list[int] = []

    def count(_: dict[str, float]) -> None:
        sampled.append(int(trainer.last_rollout.response_mask.sum()))

    with watch() as measured:
        history = trainer.train(count)
    steps = sum(int(update["optimizer_steps"]) for update in history)
    work = {
        "prompts": len(trainer.prompts),
        "prompt_tokens": sum(map(len, trainer.tokenizer(trainer.prompts).input_ids)),
        "response_tokens": sum(sampled),
        "optimizer_steps": steps,
        "trained_responses": steps * config.optimizer_batch_size,
    }
    return {**measured, "precision": PRECISIONS[next(trainer.sampler.policy.parameters()).dtype], "work": work}


class RecordedRewardTrainer(RewardTrainer):
    """The trainer behind `train_reward_model`, which keeps the loss of each step in `step_losses`."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.step_losses: list[float] = []

    def gradients(self, batches: Sequence[Batch], count: Tensor) -> list[Tensor]:
        losses = super().gradients(batches, count)
        self.step_losses += map(float, losses)
        return losses


def reward(job: RewardJob, folder: Path) -> dict[str, Any]:
    """Trains a reward model."""
    rows = json.loads((folder / "pairs.json").read_text())
    pairs = [Preference(prompt=row["prompt"], a=row["chosen"], b=row["rejected"]) for row in rows]
    model = AutoModelForSequenceClassification.from_pretrained(folder / "model")
    model.config.use_cache = False
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    with tempfile.TemporaryDirectory() as output_dir:
        config = RewardConfig(
            output_dir=output_dir,
            per_device_train_batch_size=job.batch_size,
            max_length=job.max_length,
            precision=job.precision,
            template="plain",
            **REWARD_ARGUMENTS,
        )
        features, _ = pair_features(pairs, tokenizer, config, job.max_length)
        trainer = RecordedRewardTrainer(model, config, pad_token_id=tokenizer.pad_token_id, train_dataset=features)
        with watch() as measured:
            trainer.train()
    work = {
        "pairs_kept": len(features),
        "tokens": sum(2 * prefix + a + b for prefix, a, b in (pair["lengths"] for pair in features)),
        "optimizer_steps": trainer.state.global_step,
    }
    return {
        **measured,
        "precision": PRECISIONS[trainer.dtype],
        "work": work,
        "first_loss": trainer.step_losses[0],
    }


def main() -> None:
    torch.set_num_threads(THREADS)
    workplace, result = workplace_and_result(__doc__)
    job = read_job(workplace)
    outcome = ppo(job, workplace) if job.kind == "ppo" else reward(job, workplace)
    result.write_text(json.dumps(outcome))


if __name__ == "__main__":
    main()
