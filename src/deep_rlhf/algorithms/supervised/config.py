"""Settings that SFT, reward modelling and DPO share: the flags of transformers.TrainingArguments that we implement."""

import contextlib
import json
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from transformers import TrainingArguments, enable_full_determinism, set_seed

from deep_rlhf.errors import CheckpointError, ConfigError, ResourceError, UserError, one_line
from deep_rlhf.runtime.checkpoint import is_checkpoint
from deep_rlhf.settings import LARGEST_SEED, check_settings, seed_setting, setting

# Flags of TrainingArguments that this loop does not implement. Those that only concern speed, display or the features
# of transformers.Trainer around the training itself (data loader workers, DDP, the name of the Hub repository) are
# accepted without effect.
# fmt: off
UNSUPPORTED = (
    "auto_find_batch_size", "average_tokens_across_devices", "batch_eval_metrics", "bf16_full_eval", "debug",
    "deepspeed", "enable_jit_checkpoint", "fp16", "fp16_full_eval", "fsdp", "fsdp_config", "group_by_length",
    "gradient_checkpointing_kwargs", "activation_checkpointing_kwargs", "ignore_data_skip",
    "include_for_metrics", "include_num_input_tokens_seen",
    "label_names", "label_smoothing_factor", "liger_kernel_config", "neftune_noise_alpha", "optim_target_modules",
    "parallelism_config", "prediction_loss_only", "push_to_hub", "restore_callback_states_from_checkpoint",
    "save_on_each_node", "skip_memory_metrics", "torch_compile", "torch_compile_backend", "torch_compile_mode",
    "torch_empty_cache_steps", "use_liger_kernel",
)
# fmt: on
# Bounds of the fields of TrainingArguments that have an effect here, or that would fail in transformers.
BOUNDS: dict[str, dict[str, float]] = {
    "per_device_train_batch_size": {"least": 1, "most": 2**20},
    "per_device_eval_batch_size": {"least": 1, "most": 2**20},
    "gradient_accumulation_steps": {"least": 1, "most": 2**20},
    "num_train_epochs": {"above": 0, "most": 1e6},
    "max_steps": {"least": -1},
    "learning_rate": {"least": 0, "most": 1e3},
    "warmup_steps": {"least": 0},
    "warmup_ratio": {"least": 0, "most": 1},
    "weight_decay": {"least": 0, "most": 1e3},
    "adam_beta1": {"least": 0, "below": 1},
    "adam_beta2": {"least": 0, "below": 1},
    "adam_epsilon": {"above": 0, "most": 1e3},  # 0 divides 0 by 0 where a gradient is 0
    "max_grad_norm": {"least": 0},
    "logging_steps": {"least": 0},
    "eval_steps": {"least": 0},
    "eval_delay": {"least": 0},
    "eval_accumulation_steps": {"least": 1},
    "save_steps": {"above": 0},
    "save_total_limit": {"least": 1},
    "data_seed": {"least": 0, "most": LARGEST_SEED},
    "dataloader_num_workers": {"least": 0},
    "dataloader_prefetch_factor": {"least": 1},
    "ddp_bucket_cap_mb": {"least": 1},
    "ddp_timeout": {"least": 1},
    "local_rank": {"least": -1},
}
OFF: tuple[Any, ...] = (None, False, "", "no", [], {})  # ways to say that a feature is not wanted


@dataclass
class SupervisedConfig(TrainingArguments):
    """Every flag of transformers.TrainingArguments, with bounds, and `resume`.

    Raises ConfigError for a flag that the training loop does not implement, a value out of bounds and settings that
    contradict each other, and CheckpointError if there is no checkpoint at `resume_from_checkpoint`.
    """

    metric_for_best_model: str | None = field(
        default=None, metadata={"help": "Figure of the evaluation that decides which model is best."}
    )
    FIGURES: ClassVar[tuple[str, ...]] = ()  # of an evaluation, as `metric_for_best_model` names them

    per_device_train_batch_size: int = setting(8, "Examples per device in one batch.")
    per_device_eval_batch_size: int = setting(8, "Examples per device in one batch of an evaluation.")
    gradient_accumulation_steps: int = setting(1, "Batches per update.")
    seed: int = seed_setting(42, "Seed of fresh weights, dropout and the order of the data.")
    train_sampling_strategy: Literal["random", "sequential"] = setting("random", "Order of the examples in an epoch.")
    resume: bool = setting(False, "Continue from the newest complete checkpoint in output_dir.")

    def __post_init__(self) -> None:
        self._refuse_unsupported()
        check_settings(self, BOUNDS)
        self._read_mapping("lr_scheduler_kwargs")
        checkpoint = self.resume_from_checkpoint
        if self.resume and (checkpoint or self.save_only_model):
            other = "--resume_from_checkpoint" if checkpoint else "--save_only_model"
            raise ConfigError(f"--resume contradicts {other}: leave out one of them.")
        if checkpoint and not is_checkpoint(Path(checkpoint)):
            raise CheckpointError(f"--resume_from_checkpoint: '{checkpoint}' is not a checkpoint folder.")
        try:
            super().__post_init__()
        except UserError:
            raise
        except (ValueError, TypeError, KeyError, NotImplementedError) as error:
            raise ConfigError(one_line(error)) from error
        except OSError as error:
            raise ConfigError(f"A file that the flags name cannot be read: {one_line(error)}") from error
        except ImportError as error:
            raise ResourceError(one_line(error)) from error
        self._check_combinations()
        if self.accelerator_config != type(self.accelerator_config)():
            raise ConfigError("--accelerator_config is not supported: leave it out.")
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # it only warns there

    def _read_mapping(self, name: str) -> None:
        """Replaces the JSON text of a command line by what it says."""
        value = text = getattr(self, name)
        if not isinstance(text, str):
            return
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(text)
        if not isinstance(value, dict):
            raise ConfigError(f'{name} must be JSON like {{"name": 1}}, not {text}.')
        setattr(self, name, value)

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

    def _check_combinations(self) -> None:
        """What transformers.Trainer checks when it is made, or finds out during training."""
        if self.max_steps == 0:
            raise ConfigError("max_steps must be -1 (as many as num_train_epochs are) or at least 1, not 0.")
        if self.save_strategy == "best" and self.metric_for_best_model is None:
            self.metric_for_best_model, self.greater_is_better = "loss", False
        name: str | None = self.metric_for_best_model
        if name is not None and self.FIGURES and name.removeprefix("eval_") not in self.FIGURES:
            raise ConfigError(f"metric_for_best_model must be one of {', '.join(self.FIGURES)}, not {name}.")
        if self.load_best_model_at_end and self.eval_strategy == "no":
            raise ConfigError("load_best_model_at_end needs evaluations: give --eval_strategy, or leave it out.")

    def set_seeds(self) -> None:
        """Seeds Python, NumPy and torch; with `full_determinism`, also chooses deterministic operations."""
        enable_full_determinism(self.seed) if self.full_determinism else set_seed(self.seed)
