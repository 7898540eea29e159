"""Settings that SFT, reward modelling and DPO share: the flags of transformers.TrainingArguments that we implement."""

from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import TrainingArguments, enable_full_determinism, set_seed

from deep_rlhf.errors import CheckpointError, ConfigError
from deep_rlhf.runtime.checkpoint import is_checkpoint
from deep_rlhf.settings import check_settings, seed_setting, setting

# Flags of TrainingArguments that this loop does not implement. Those that only concern speed, display or the features
# of transformers.Trainer around the training itself (data loader workers, DDP, the name of the Hub repository) are
# accepted without effect.
# fmt: off
UNSUPPORTED = (
    "auto_find_batch_size", "average_tokens_across_devices", "batch_eval_metrics", "bf16_full_eval", "debug",
    "deepspeed", "enable_jit_checkpoint", "fp16", "fp16_full_eval", "fsdp", "group_by_length",
    "gradient_checkpointing_kwargs", "activation_checkpointing_kwargs", "ignore_data_skip",
    "include_for_metrics", "include_num_input_tokens_seen",
    "label_names", "label_smoothing_factor", "liger_kernel_config", "neftune_noise_alpha", "optim_target_modules",
    "parallelism_config", "prediction_loss_only", "push_to_hub", "restore_callback_states_from_checkpoint",
    "save_on_each_node", "skip_memory_metrics", "torch_compile", "torch_compile_backend", "torch_compile_mode",
    "torch_empty_cache_steps", "use_liger_kernel",
)
# fmt: on
OFF: tuple[Any, ...] = (None, False, "", "no", [], {})  # ways to say that a feature is not wanted


@dataclass
class SupervisedConfig(TrainingArguments):
    """Every flag of transformers.TrainingArguments, with bounds, and `resume`.

    Raises ConfigError for a flag that the training loop does not implement, a value out of bounds and settings that
    contradict each other, and CheckpointError if there is no checkpoint at `resume_from_checkpoint`.
    """

    per_device_train_batch_size: int = setting(8, "Examples per device in one batch.", least=1)
    per_device_eval_batch_size: int = setting(8, "Examples per device in one batch of an evaluation.", least=1)
    gradient_accumulation_steps: int = setting(1, "Batches per update.", least=1)
    seed: int = seed_setting(42, "Seed of fresh weights, dropout and the order of the data.")
    train_sampling_strategy: Literal["random", "sequential"] = setting("random", "Order of the examples in an epoch.")
    resume: bool = setting(False, "Continue from the newest complete checkpoint in output_dir.")

    def __post_init__(self) -> None:
        self._refuse_unsupported()
        check_settings(self)
        checkpoint = self.resume_from_checkpoint
        if self.resume and (checkpoint or self.save_only_model):
            other = "--resume_from_checkpoint" if checkpoint else "--save_only_model"
            raise ConfigError(f"--resume contradicts {other}: leave out one of them.")
        if checkpoint and not is_checkpoint(Path(checkpoint)):
            raise CheckpointError(f"--resume_from_checkpoint: '{checkpoint}' is not a checkpoint folder.")
        super().__post_init__()
        if self.accelerator_config != type(self.accelerator_config)():
            raise ConfigError("--accelerator_config is not supported: leave it out.")
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # it only warns there

    def _refuse_unsupported(self) -> None:
        for name in UNSUPPORTED:
            field = type(self).__dataclass_fields__.get(name)
            if field is None:  # of another version of transformers
                continue
            default = field.default_factory() if field.default_factory is not MISSING else field.default
            value = getattr(self, name)
            if value != default and not (value in OFF and default in OFF):
                raise ConfigError(f"--{name}={value} is not supported by this project's training loop: leave it out.")
        if getattr(self.lr_scheduler_type, "value", self.lr_scheduler_type) in ("reduce_lr_on_plateau", "greedy"):
            raise ConfigError(
                f"--lr_scheduler_type={self.lr_scheduler_type} is not supported: choose one of the step alone."
            )

    def set_seeds(self) -> None:
        """Seeds Python, NumPy and torch; with `full_determinism`, also chooses deterministic operations."""
        enable_full_determinism(self.seed) if self.full_determinism else set_seed(self.seed)
