"""Runs TRL's side of a PPO job, with trl 1.12: `python trl_ppo.py WORKPLACE RESULT`."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import torch
from datasets import Dataset
from side_by_side.jobs import PPO_SETTINGS, THREADS, PPOJob, read_job, workplace_and_result
from side_by_side.measure import watch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl.experimental.ppo import PPOConfig, PPOTrainer


def main() -> None:
    torch.set_num_threads(THREADS)
    workplace, result = workplace_and_result(__doc__)
    job: PPOJob = read_job(workplace)
    if job.precision == "bf16":
        # As `accelerate launch --mixed_precision=bf16` does: with transformers 5, bf16=True alone changes nothing here.
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    with tempfile.TemporaryDirectory() as output_dir:
        trainer = open_trainer(job, workplace, output_dir)
        work = count_work(trainer)
        with watch() as measured:
            trainer.train()
    outcome = {**measured, "precision": precision(trainer), "work": {**prompts(trainer), **work}}
    result.write_text(json.dumps(outcome))


def open_trainer(job: PPOJob, workplace: Path, output_dir: str) -> PPOTrainer:
    """TRL needs four models with one tokenizer: policy, reference, reward model and critic."""
    tokenizer = AutoTokenizer.from_pretrained(workplace / "tokenizer", padding_side="left")
    texts = json.loads((workplace / "prompts.json").read_text())
    data = Dataset.from_dict({"input_ids": tokenizer(texts).input_ids})
    policy, reference = (AutoModelForCausalLM.from_pretrained(workplace / "policy") for _ in range(2))
    reward, critic = (AutoModelForSequenceClassification.from_pretrained(workplace / "reward") for _ in range(2))
    accumulation = job.batch_size // job.mini_batch_size
    config = PPOConfig(
        output_dir=output_dir,
        per_device_train_batch_size=job.mini_batch_size,
        gradient_accumulation_steps=accumulation,
        num_mini_batches=accumulation,
        local_rollout_forward_batch_size=min(job.batch_size, 64),
        total_episodes=job.episodes,
        num_ppo_epochs=job.ppo_epochs,
        response_length=job.response_tokens,
        lr_scheduler_type="linear",
        bf16=job.precision == "bf16",
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
        num_sample_generations=0,
        eval_strategy="no",
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **PPO_SETTINGS,
    )
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=critic,
        train_dataset=data,
        eval_dataset=data,
    )
    # On the last batch of the data accelerate would step after every backward pass instead of once per epoch.
    trainer.accelerator.gradient_state.plugin_kwargs["sync_with_dataloader"] = False
    return trainer


def count_work(trainer: PPOTrainer) -> dict[str, int]:
    """Counters that go up as the trainer samples and trains."""
    work = {"response_tokens": 0, "optimizer_steps": 0, "trained_responses": 0}
    policy = trainer.policy_model
    if policy.generation_config.eos_token_id is not None:
        raise SystemExit("TRL's policy may end a response early: its EOS is not off.")
    generate = policy.generate

    def counted(*args: Any, **options: Any) -> Any:
        output = generate(*args, **options)
        work["response_tokens"] += output.sequences[:, options["input_ids"].shape[1] :].numel()
        return output

    def step(*_: Any) -> None:
        work["optimizer_steps"] += 1

    def forward(_: torch.nn.Module, args: tuple, options: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            work["trained_responses"] += len(options["input_ids"])

    policy.generate = counted
    policy.register_forward_pre_hook(forward, with_kwargs=True)
    trainer.optimizer.optimizer.register_step_post_hook(step)
    return work


def prompts(trainer: PPOTrainer) -> dict[str, int]:
    """What the episodes began with; each prompt is one episode."""
    ids = trainer.train_dataset["input_ids"]
    return {"prompts": len(ids), "prompt_tokens": sum(map(len, ids))}


def precision(trainer: PPOTrainer) -> str:
    """What the trainer really computes in."""
    return {"no": "fp32", "bf16": "bf16"}[trainer.accelerator.mixed_precision]


if __name__ == "__main__":
    main()
