"""Runs TRL's side of a reward job, with trl 1.16: `python trl_reward.py WORKPLACE RESULT`."""

import json
import tempfile

import torch
from datasets import Dataset
from side_by_side.jobs import REWARD_ARGUMENTS, THREADS, RewardJob, read_job, workplace_and_result
from side_by_side.measure import StepLosses, watch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig, RewardTrainer


class Trainer(StepLosses, RewardTrainer):
    pass


def main() -> None:
    torch.set_num_threads(THREADS)
    workplace, result = workplace_and_result(__doc__)
    job: RewardJob = read_job(workplace)
    with tempfile.TemporaryDirectory() as output_dir:
        config = RewardConfig(
            output_dir=output_dir,
            per_device_train_batch_size=job.batch_size,
            max_length=job.max_length,
            bf16=job.precision == "bf16",
            **REWARD_ARGUMENTS,
        )
        trainer = Trainer(
            model=AutoModelForSequenceClassification.from_pretrained(workplace / "model"),
            args=config,
            train_dataset=Dataset.from_list(json.loads((workplace / "pairs.json").read_text())),
            processing_class=AutoTokenizer.from_pretrained(workplace / "tokenizer"),
        )
        with watch() as measured:
            trainer.train()
    data = trainer.train_dataset
    work = {
        "pairs_kept": len(data),
        "tokens": sum(len(ids) for side in ("chosen_ids", "rejected_ids") for ids in data[side]),
        "optimizer_steps": trainer.state.global_step,
    }
    precision = {"no": "fp32", "bf16": "bf16"}[trainer.accelerator.mixed_precision]
    outcome = {**measured, "precision": precision, "work": work, "first_loss": trainer.step_losses[0]}
    result.write_text(json.dumps(outcome))


if __name__ == "__main__":
    main()
