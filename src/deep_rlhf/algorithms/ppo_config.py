"""The settings of a PPO run, named as in TRL ≤ 0.11, so that old configurations still mean the same."""

import math
from dataclasses import dataclass, field
from typing import Literal, get_args, get_origin, get_type_hints

from deep_rlhf.ops.kl import KLPenalty
from deep_rlhf.types import UserError, check_seed

_POSITIVE = (
    *("max_prompt_length", "max_new_tokens", "temperature", "batch_size", "ppo_epochs", "learning_rate"),
    *("max_grad_norm", "target", "horizon", "cliprange", "cliprange_value", "lora_r", "lora_alpha"),
)


@dataclass(frozen=True)
class ScriptArguments:
    """How the policy is opened."""

    use_seq2seq: bool = field(default=False, metadata={"help": "the policy is an encoder-decoder such as T5"})
    trust_remote_code: bool = field(default=False, metadata={"help": "run code that a model's repository brings along"})
    use_peft: bool = field(
        default=False, metadata={"help": "train LoRA adapters; the reference is the base without them"}
    )
    lora_alpha: float = field(default=16, metadata={"help": "LoRA's scale, applied as alpha / r"})
    lora_r: int = field(default=16, metadata={"help": "rank of the LoRA matrices"})


@dataclass(frozen=True)
class PPOConfig(ScriptArguments):
    """Every setting of a PPO run, named as in TRL ≤ 0.11. Raises UserError for values that cannot work."""

    exp_name: str = field(default="ppo", metadata={"help": "the run's name"})
    seed: int = field(default=0, metadata={"help": "seed of sampling, shuffling and new weights"})
    log_with: str | None = field(default=None, metadata={"help": "a tracker: wandb"})
    model_name: str = field(default="gpt2", metadata={"help": "the policy to start from: a folder or Hub name"})
    query_dataset: str = field(
        default="wentingzhao/anthropic-hh-first-prompt", metadata={"help": "prompts: a Hub name, file or folder"}
    )
    query_split: str = field(default="train", metadata={"help": "split of the prompts"})
    template: Literal["auto", "hh", "plain"] = field(
        default="auto",
        metadata={"help": "how a bare prompt becomes text; auto: as the reward model was trained, or plain"},
    )
    on_bad_rows: Literal["error", "skip"] = field(default="error", metadata={"help": "skip: count them and go on"})
    query_config: str | None = field(default=None, metadata={"help": "configuration of a data set on the Hub"})
    query_column: str | None = field(
        default=None, metadata={"help": "column of the prompts; default: the first known name"}
    )
    reward_model: str = field(
        default="./reward_modeling_anthropic_hh",
        metadata={"help": "a folder, a Hub name, or python:module:function taking (prompts, responses)"},
    )
    output_dir: str | None = field(default=None, metadata={"help": "default: outputs/<exp_name>"})
    max_prompt_length: int = field(default=512, metadata={"help": "prompts with more tokens are dropped and counted"})
    max_new_tokens: int = field(default=32, metadata={"help": "longest response, in tokens"})
    temperature: float = field(default=1.0, metadata={"help": "divides the logits, in sampling and in training"})
    steps: int | None = field(
        default=None, metadata={"help": "responses sampled in all; default: one pass over the prompts"}
    )
    batch_size: int = field(default=128, metadata={"help": "responses per update, over all processes"})
    mini_batch_size: int | None = field(
        default=None, metadata={"help": "responses per optimiser step; default: batch_size"}
    )
    ppo_epochs: int = field(default=4, metadata={"help": "passes over each batch"})
    learning_rate: float = field(default=1.41e-5, metadata={"help": "Adam's step size"})
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = field(
        default="constant", metadata={"help": "how learning_rate falls over the updates, to 0 at the end"}
    )
    max_grad_norm: float = field(default=1.0, metadata={"help": "gradients are scaled down to this norm"})
    adap_kl_ctrl: bool = field(default=True, metadata={"help": "adapt the KL coefficient towards `target`"})
    init_kl_coef: float = field(default=0.2, metadata={"help": "KL coefficient at the start"})
    target: float = field(default=6.0, metadata={"help": "KL aimed at by adap_kl_ctrl, nats per response"})
    horizon: float = field(default=10_000, metadata={"help": "samples over which the KL coefficient adapts"})
    kl_penalty: KLPenalty = field(default="kl", metadata={"help": "estimator of the KL penalty per token"})
    gamma: float = field(default=1.0, metadata={"help": "discount"})
    lam: float = field(default=0.95, metadata={"help": "lambda of generalised advantage estimation"})
    cliprange: float = field(default=0.2, metadata={"help": "range of the policy ratio, 1 ± this"})
    cliprange_value: float = field(default=0.2, metadata={"help": "range of the value's change"})
    vf_coef: float = field(default=0.1, metadata={"help": "weight of the value loss"})
    whiten_rewards: bool = field(default=False, metadata={"help": "scale rewards to unit variance before GAE"})

    def __post_init__(self) -> None:
        if self.log_with not in (None, "none", "wandb"):
            raise UserError(f"log_with must be wandb or none, not {self.log_with}.")
        for name, kind in get_type_hints(type(self)).items():
            if get_origin(kind) is Literal and getattr(self, name) not in get_args(kind):
                raise UserError(f"{name} must be one of {', '.join(get_args(kind))}, not {getattr(self, name)}.")
        for name in _POSITIVE:
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"{name} must be a number greater than 0, not {getattr(self, name)}.")
        for name in ("steps", "mini_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, not {value}.")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} must lie between 0 and 1, not {getattr(self, name)}.")
        check_seed(self.seed)
        for name in ("init_kl_coef", "vf_coef"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{name} must be 0 or more, not {getattr(self, name)}.")
