"""The settings of a reward-model run: transformers' own, and those of the reward model."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from deep_rlhf.data.chat import get_template
from deep_rlhf.errors import UserError
from deep_rlhf.runtime.precision import Precision
from deep_rlhf.types import check_seed

ADAMW = ("adamw_torch", "adamw_torch_fused")  # the optimisers that can have float32 masters


@dataclass
class RewardConfig(TrainingArguments):
    """Every flag of transformers.TrainingArguments, and those of the reward model.

    One epoch, for a second over-fits (Stiennon et al. 2020). Evaluated every `eval_steps` updates, `logging_steps` if
    not given; the checkpoint with the lowest held-out loss is kept. With save_strategy="best" there is a checkpoint
    every ten minutes besides, for `resume`. Raises UserError for a value out of range.
    """

    output_dir: str = field(default="outputs/reward", metadata={"help": "Where the reward model is written."})
    learning_rate: float = field(default=1.41e-5, metadata={"help": "The initial learning rate of AdamW."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the training pairs."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many updates."})
    eval_strategy: str = field(default="steps", metadata={"help": "When to evaluate: no, steps or epoch."})
    save_strategy: str = field(default="best", metadata={"help": "When to save: no, steps, epoch or best."})
    save_total_limit: int | None = field(
        default=2, metadata={"help": "How many of the newest checkpoints to keep; the best are kept besides."}
    )
    resume: bool = field(default=False, metadata={"help": "Go on from the newest whole checkpoint in output_dir."})
    load_best_model_at_end: bool = field(
        default=True, metadata={"help": "Keep the best evaluated model, not the last."}
    )
    metric_for_best_model: str | None = field(default="loss", metadata={"help": "By which the best is chosen."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Accepted, without effect."})

    max_length: int = field(default=512, metadata={"help": "Tokens of prompt and answer; longer pairs are dropped."})
    eval_samples: int = field(
        default=200, metadata={"help": "Held-out pairs evaluated during training; the final evaluation takes all."}
    )
    ensemble_size: int = field(default=1, metadata={"help": "Heads, each trained on its own bootstrap of the pairs."})
    label_noise: float = field(default=0.0, metadata={"help": "Share of labels assumed to be random, for example 0.1."})
    center_rewards_coefficient: float | None = field(
        default=None, metadata={"help": "Weight of the squared sum of a pair's rewards, which keeps them near 0."}
    )
    disable_dropout: bool = field(default=True, metadata={"help": "Train without dropout."})
    use_peft: bool = field(default=False, metadata={"help": "Train LoRA adapters; the saved model has them merged."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapters."})
    lora_alpha: float = field(default=16.0, metadata={"help": "Scale of the adapters, divided by lora_r."})
    bf16: bool = field(default=False, metadata={"help": "The same as --precision=bf16."})
    precision: Precision = field(
        default="auto",
        metadata={"help": "Format of the computation: fp32, bf16 with float32 master weights, or auto."},
    )
    template: str = field(default="hh", metadata={"help": "How a dialogue is written: hh or plain."})

    def __post_init__(self) -> None:
        check_seed(self.seed)
        for name, smallest in (("max_length", 2), ("eval_samples", 1), ("ensemble_size", 1), ("lora_r", 1)):
            if getattr(self, name) < smallest:
                raise UserError(f"--{name} must be at least {smallest}, not {getattr(self, name)}.")
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} must be at least 1, not {getattr(self, name)}.")
        resume = self.resume_from_checkpoint
        if isinstance(resume, str) and not Path(resume, "trainer_state.json").exists():
            raise UserError(f"--resume_from_checkpoint '{resume}' is no checkpoint: it has no trainer_state.json.")
        if self.resume and (resume or self.save_only_model):
            other = "--resume_from_checkpoint" if resume else "--save_only_model"
            raise UserError(f"--resume does not go with {other}: leave out one of them.")
        if not 0.0 <= self.label_noise < 1.0:
            raise UserError(f"--label_noise is a share of the labels: at least 0 and below 1, not {self.label_noise}.")
        get_template(self.template)
        self._check_precision()
        self.remove_unused_columns = False  # the collator reads columns that no model's forward names
        if "no" in (self.eval_strategy, self.save_strategy):
            self.load_best_model_at_end = False
        super().__post_init__()
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # it only warns there

    def _check_precision(self) -> None:
        """transformers' --bf16 means --precision=bf16; its --fp16 and other optimisers go with float32 weights."""
        if self.precision not in get_args(Precision):
            raise UserError(f"--precision is auto, fp32 or bf16, not {self.precision}.")
        if self.bf16 and self.precision == "fp32":
            raise UserError("--bf16 does not go with --precision=fp32: leave out one of them.")
        if self.bf16:
            self.precision, self.bf16 = "bf16", False  # no autocast: the weights themselves are bfloat16
        other = (
            "--fp16" if self.fp16 else None if self.optim in ADAMW else f"--optim={OptimizerNames(self.optim).value}"
        )
        if other and self.precision == "bf16":
            raise UserError(
                f"bf16 keeps float32 masters in torch's AdamW, so it does not go with {other}: leave out one."
            )
        if other:
            self.precision = "fp32"
