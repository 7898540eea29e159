"""The settings of a reward-model run."""

from dataclasses import dataclass, field

from transformers.training_args import OptimizerNames

from deep_rlhf.algorithms.supervised.config import SupervisedConfig
from deep_rlhf.data.chat import get_template
from deep_rlhf.errors import ConfigError
from deep_rlhf.runtime.precision import Precision
from deep_rlhf.settings import setting

ADAMW = ("adamw_torch", "adamw_torch_fused")  # the optimisers that can have float32 masters


@dataclass
class RewardConfig(SupervisedConfig):
    """Every flag of transformers.TrainingArguments, and those of the reward model.

    One epoch, since a second one over-fits (Stiennon et al. 2020). The model is evaluated every `eval_steps` updates
    (default: `logging_steps`), and the weights with the lowest held-out loss are kept. With save_strategy="best" there
    is also a checkpoint every ten minutes, for `resume`. Raises ConfigError for a value out of bounds.
    """

    FIGURES = ("loss", "accuracy", "accuracy_length_baseline")

    output_dir: str = field(default="outputs/reward", metadata={"help": "Folder for the reward model."})
    learning_rate: float = field(default=1.41e-5, metadata={"help": "The initial learning rate of AdamW."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the training pairs."})
    logging_steps: float = field(default=10, metadata={"help": "Updates between two log entries."})
    eval_strategy: str = field(default="steps", metadata={"help": "When to evaluate: no, steps or epoch."})
    save_strategy: str = field(default="best", metadata={"help": "When to save: no, steps, epoch or best."})
    save_total_limit: int | None = field(
        default=2, metadata={"help": "Number of newest checkpoints to keep, besides the best."}
    )
    load_best_model_at_end: bool = field(
        default=True, metadata={"help": "Keep the best evaluated model, not the last."}
    )
    metric_for_best_model: str | None = field(
        default="loss", metadata={"help": "Metric that decides which model is best."}
    )

    max_length: int = setting(512, "Tokens of prompt and response; longer pairs are dropped.", least=2)
    eval_samples: int = setting(
        200, "Held-out pairs evaluated during training; the final evaluation takes all.", least=1
    )
    ensemble_size: int = setting(1, "Heads, each trained on its own bootstrap of the pairs.", least=1, most=1024)
    label_noise: float = setting(0.0, "Share of labels assumed to be random, for example 0.1.", least=0.0, below=1.0)
    center_rewards_coefficient: float | None = setting(
        None, "Weight of the squared sum of a pair's rewards, which keeps them near 0.", least=0, most=1e6
    )
    disable_dropout: bool = field(default=True, metadata={"help": "Train without dropout."})
    use_peft: bool = field(
        default=False, metadata={"help": "Train LoRA adapters; they are merged into the saved model."}
    )
    lora_r: int = setting(16, "Rank of the adapters.", least=1, most=2**16)
    lora_alpha: float = setting(16.0, "Scale of the adapters, divided by lora_r.", above=0, most=1e6)
    bf16: bool = field(default=False, metadata={"help": "The same as --precision=bf16."})
    precision: Precision = field(
        default="auto",
        metadata={"help": "Number format: fp32, bf16 with float32 master weights, or auto."},
    )
    template: str = field(default="hh", metadata={"help": "Format of a dialogue: hh or plain."})

    def __post_init__(self) -> None:
        get_template(self.template)
        self._check_precision()
        if "no" in (self.eval_strategy, self.save_strategy):
            self.load_best_model_at_end = False
        super().__post_init__()

    def _check_precision(self) -> None:
        """--bf16 means --precision=bf16; an optimiser without masters needs float32 weights."""
        if self.bf16 and self.precision == "fp32":
            raise ConfigError("--bf16 contradicts --precision=fp32: leave out one of them.")
        if self.bf16:
            self.precision, self.bf16 = "bf16", False  # no autocast: the weights themselves are bfloat16
        if self.optim in ADAMW:
            return
        if self.precision == "bf16":
            raise ConfigError(
                "--precision=bf16 keeps float32 master weights in torch's AdamW, which contradicts"
                f" --optim={OptimizerNames(self.optim).value}: leave out one of them."
            )
        self.precision = "fp32"
