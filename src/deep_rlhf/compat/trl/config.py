"""TRL's PPOConfig, a mutable dataclass for `HfArgumentParser`, and its conversion to this project's."""

import json
import logging
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deep_rlhf.algorithms import ppo

logger = logging.getLogger(__name__)

_DICTS = ("tracker_kwargs", "accelerator_kwargs", "project_kwargs", "push_to_hub_if_best_kwargs")
_SAME = (  # settings with the same meaning in this project
    *("exp_name", "seed", "log_with", "tracker_project_name", "steps", "learning_rate", "adap_kl_ctrl", "init_kl_coef"),
    *("kl_penalty", "target", "horizon", "gamma", "lam", "cliprange", "cliprange_value", "vf_coef", "ppo_epochs"),
    *("gradient_accumulation_steps", "max_grad_norm", "early_stopping", "target_kl", "compare_steps"),
    *("ratio_threshold", "use_score_scaling", "use_score_norm", "score_clip", "whiten_rewards"),
    *("gradient_checkpointing", "dataset_num_proc"),
)


def _script_name() -> str:
    return Path(sys.argv[0]).stem or "ppo"


@dataclass
class PPOConfig:
    """The fields of TRL 0.11, in its order and with its defaults; batch sizes are those of one process.

    Raises ValueError where TRL does, and ConfigError (also a ValueError) for settings that this project refuses.
    """

    exp_name: str = field(default_factory=_script_name, metadata={"help": "the run's name"})
    seed: int = 0
    log_with: str | None = field(default=None, metadata={"help": "wandb or tensorboard"})
    task_name: str | None = None
    model_name: str | None = "gpt2"
    query_dataset: str | None = "imdb"
    reward_model: str | None = "sentiment-analysis:lvwerra/distilbert-imdb"
    remove_unused_columns: bool = True
    tracker_kwargs: dict[str, Any] | str | None = field(default_factory=dict, metadata={"help": "JSON, by tracker"})
    accelerator_kwargs: dict[str, Any] | str | None = field(default_factory=dict, metadata={"help": "JSON"})
    project_kwargs: dict[str, Any] | str | None = field(default_factory=dict, metadata={"help": "JSON"})
    tracker_project_name: str = "trl"
    push_to_hub_if_best_kwargs: dict[str, Any] | str | None = field(
        default_factory=dict, metadata={"help": "JSON with repo_id"}
    )

    steps: int = 20_000
    learning_rate: float = 1.41e-5
    adap_kl_ctrl: bool = True
    init_kl_coef: float = 0.2
    kl_penalty: str = field(default="kl", metadata={"help": "kl, abs, mse or full"})
    target: float = 6.0
    horizon: float = 10_000.0
    gamma: float = 1.0
    lam: float = 0.95
    cliprange: float = 0.2
    cliprange_value: float = 0.2
    vf_coef: float = 0.1
    batch_size: int = 128
    forward_batch_size: int | None = field(default=None, metadata={"help": "old name of mini_batch_size"})
    mini_batch_size: int = 128
    gradient_accumulation_steps: int = 1
    world_size: int | None = field(default=None, metadata={"help": "set by the trainer"})
    ppo_epochs: int = 4
    max_grad_norm: float | None = None
    optimize_cuda_cache: bool | None = field(default=None, metadata={"help": "old name of optimize_device_cache"})
    optimize_device_cache: bool = False
    early_stopping: bool = False
    target_kl: float = 1.0
    compare_steps: int = 1
    ratio_threshold: float = 10.0
    use_score_scaling: bool = False
    use_score_norm: bool = False
    score_clip: float | None = None
    whiten_rewards: bool = False
    gradient_checkpointing: bool = False

    is_encoder_decoder: bool | None = field(default=None, metadata={"help": "set by the trainer"})
    is_peft_model: bool | None = field(default=None, metadata={"help": "set by the trainer"})
    backward_batch_size: int | None = field(default=None, metadata={"help": "set from the others"})
    global_backward_batch_size: int | None = field(default=None, metadata={"help": "set by the trainer"})
    global_batch_size: int | None = field(default=None, metadata={"help": "set by the trainer"})
    dataset_num_proc: int | None = None

    def __post_init__(self) -> None:
        for name in _DICTS:
            value = getattr(self, name)
            if isinstance(value, str):  # from a command line
                setattr(self, name, json.loads(value))
        if self.forward_batch_size is not None:
            logger.warning("forward_batch_size is the old name of mini_batch_size, and sets it.")
            self.mini_batch_size = self.forward_batch_size
        if self.optimize_cuda_cache is not None:
            if self.optimize_device_cache:
                raise ValueError("Both `optimize_device_cache` and `optimize_cuda_cache` were provided: leave one out.")
            self.optimize_device_cache = self.optimize_cuda_cache
        self.backward_batch_size = self.mini_batch_size * self.gradient_accumulation_steps
        self.native(1)  # refuses invalid settings before the models are loaded
        if self.batch_size % self.backward_batch_size:
            raise ValueError(
                "`batch_size` must be a multiple of `mini_batch_size * gradient_accumulation_steps`, and"
                f" {self.batch_size} is not a multiple of {self.backward_batch_size}."
            )
        self.total_ppo_epochs = math.ceil(self.steps / self.batch_size)

    def to_dict(self) -> dict[str, Any]:
        """All settings by name; nested ones as "name/key"."""
        return _flat(vars(self))

    def native(self, processes: int) -> ppo.PPOConfig:
        """This configuration as this project's PPOConfig, whose batch sizes are totals over `processes` processes."""
        same: dict[str, Any] = {name: getattr(self, name) for name in _SAME}
        dicts: dict[str, Any] = {name: getattr(self, name) or None for name in _DICTS}
        if not self.push_to_hub_if_best_kwargs:
            del same["compare_steps"]  # it has no effect, which TRL does not mind
        return ppo.PPOConfig(
            **same,
            **dicts,
            batch_size=self.batch_size * processes,
            mini_batch_size=self.mini_batch_size * processes,
            forward_batch_size=self.mini_batch_size,
        )


def _flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        flat |= _flat(value, f"{prefix}{name}/") if isinstance(value, dict) else {prefix + name: value}
    return flat
