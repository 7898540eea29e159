"""The settings that every algorithm which samples while it learns shares, named as in TRL ≤ 0.11."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

from deep_rlhf.errors import UserError
from deep_rlhf.ops.kl import KLPenalty
from deep_rlhf.runtime.hub import check_push_options
from deep_rlhf.runtime.precision import OptimizerName, Precision
from deep_rlhf.types import check_seed

# What may differ between a run and its continuation: it changes neither the weights nor the metrics.
FREE_TO_CHANGE = frozenset(
    {
        *("output_dir", "exp_name", "log_with", "tracker_project_name", "tracker_kwargs", "project_kwargs", "resume"),
        *("save_freq", "compare_steps", "push_to_hub_if_best_kwargs", "reward_timeout", "max_bad_batches"),
        *("dataset_num_proc", "on_bad_rows"),
    }
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
    load_in_4bit: bool = field(
        default=False, metadata={"help": "with use_peft: the base in 4-bit NF4 (QLoRA), by bitsandbytes"}
    )


@dataclass(frozen=True)
class OnlineConfig(ScriptArguments):
    """Prompts, reward, sampling, KL penalty and optimiser of a run. Raises UserError for values that cannot work."""

    exp_name: str = field(default="ppo", metadata={"help": "the run's name"})
    seed: int = field(default=0, metadata={"help": "seed of sampling, shuffling and new weights"})
    log_with: str | None = field(default=None, metadata={"help": "a tracker: wandb, tensorboard, …"})
    tracker_project_name: str | None = field(
        default=None, metadata={"help": "the project in the tracker; default: $WANDB_PROJECT, or deep-rlhf"}
    )
    tracker_kwargs: dict[str, Any] | None = field(
        default=None, metadata={"help": "JSON handed to the trackers, by tracker"}
    )
    project_kwargs: dict[str, Any] | None = field(
        default=None, metadata={"help": "JSON for accelerate's ProjectConfiguration"}
    )
    accelerator_kwargs: dict[str, Any] | None = field(
        default=None, metadata={"help": "JSON for accelerate's Accelerator"}
    )
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
    dataset_num_proc: int | None = field(default=None, metadata={"help": "processes that read a data set"})
    reward_model: str = field(
        default="./reward_modeling_anthropic_hh",
        metadata={"help": "a folder, a Hub name, or python:module:function taking (prompts, responses)"},
    )
    reward_timeout: float = field(default=600.0, metadata={"help": "seconds that a reward function may take"})
    output_dir: str | None = field(default=None, metadata={"help": "default: outputs/<exp_name>"})
    resume: bool = field(default=False, metadata={"help": "go on from the newest whole checkpoint in output_dir"})
    save_freq: int = field(default=10, metadata={"help": "updates between checkpoints"})
    max_bad_batches: int = field(
        default=3, metadata={"help": "stop after so many batches in a row with a NaN or infinity"}
    )
    compare_steps: int = field(default=1, metadata={"help": "updates between comparisons with the best score so far"})
    push_to_hub_if_best_kwargs: dict[str, Any] | None = field(
        default=None, metadata={"help": "JSON with repo_id, …: push the policy whenever its score is the best so far"}
    )

    max_prompt_length: int = field(default=512, metadata={"help": "prompts with more tokens are dropped and counted"})
    max_new_tokens: int = field(default=32, metadata={"help": "longest response, in tokens"})
    temperature: float = field(default=1.0, metadata={"help": "divides the logits, in sampling and in training"})
    steps: int | None = field(
        default=None, metadata={"help": "responses sampled in all; default: one pass over the prompts"}
    )
    batch_size: int = field(default=128, metadata={"help": "responses per update, over all processes"})
    forward_batch_size: int | None = field(
        default=None, metadata={"help": "most responses in one forward pass; default: as many as fit its tokens"}
    )
    optimizer: OptimizerName = field(
        default="adamw", metadata={"help": "adamw_8bit: Adam's moments in 8 bits, by bitsandbytes"}
    )
    learning_rate: float = field(default=1.41e-5, metadata={"help": "Adam's step size"})
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = field(
        default="constant", metadata={"help": "how learning_rate falls over the updates, to 0 at the end"}
    )
    max_grad_norm: float | None = field(default=1.0, metadata={"help": "gradients are scaled down to this norm"})
    precision: Precision = field(
        default="auto",
        metadata={"help": "bf16 keeps fp32 master weights; auto: bf16 for wide models where the hardware has it"},
    )
    frozen_precision: Precision = field(
        default="auto", metadata={"help": "format of reference and reward model; auto: as precision"}
    )
    frozen_device: Literal["auto", "cpu"] = field(
        default="auto", metadata={"help": "cpu: reference and reward model stay in main memory and compute there"}
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "compute activations twice instead of keeping them"}
    )

    adap_kl_ctrl: bool = field(default=True, metadata={"help": "adapt the KL coefficient towards `target`"})
    init_kl_coef: float = field(default=0.2, metadata={"help": "KL coefficient at the start"})
    target: float = field(default=6.0, metadata={"help": "KL aimed at by adap_kl_ctrl, nats per response"})
    horizon: float = field(default=10_000, metadata={"help": "samples over which the KL coefficient adapts"})
    kl_penalty: KLPenalty = field(
        default="kl", metadata={"help": "estimator of the KL per token; k1 is kl, k2 is mse, full is exact"}
    )
    kl_in_loss: bool = field(default=False, metadata={"help": "the KL is part of the loss, not of the reward"})

    use_score_scaling: bool = field(
        default=False, metadata={"help": "divide scores by the standard deviation of all scores so far"}
    )
    use_score_norm: bool = field(default=False, metadata={"help": "with use_score_scaling: subtract their mean, too"})
    score_clip: float | None = field(default=None, metadata={"help": "scores are cut to ± this, after scaling"})
    missing_eos_penalty: float | None = field(
        default=None, metadata={"help": "what a response without EOS loses; 1 in Huang et al. 2024"}
    )
    missing_eos_mode: Literal["replace", "subtract"] = field(
        default="replace", metadata={"help": "replace: its score becomes −penalty; subtract: as in TRL"}
    )
    ensemble_reward: Literal["mean", "uncertainty", "min"] = field(
        default="mean", metadata={"help": "of several members: their mean, mean − λ·std, or the worst"}
    )
    ensemble_std_coef: float | None = field(default=None, metadata={"help": "λ of ensemble_reward=uncertainty"})

    @property
    def samples_per_prompt(self) -> int:
        """Responses to each prompt of a batch."""
        return 1

    @property
    def recomputes_logprobs(self) -> bool:
        """Whether the trainer's own log-probabilities are needed, beside those that the sampler drew from."""
        return False

    def adapts_kl_coef(self, update: int) -> bool:
        """Whether the KL coefficient follows the KL after this update."""
        return self.adap_kl_ctrl

    def __post_init__(self) -> None:
        for name in ("tracker_kwargs", "project_kwargs", "accelerator_kwargs", "push_to_hub_if_best_kwargs"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, dict):
                raise UserError(f"{name} must be a mapping of names to values, not {value!r}.")
        for name, kind in get_type_hints(type(self)).items():
            if get_origin(kind) is Literal and getattr(self, name) not in get_args(kind):
                raise UserError(f"{name} must be one of {', '.join(get_args(kind))}, not {getattr(self, name)}.")
        check_seed(self.seed)
        self.check_range(
            *("max_prompt_length", "max_new_tokens", "temperature", "batch_size", "learning_rate", "target", "horizon"),
            *("lora_r", "lora_alpha", "reward_timeout", "max_grad_norm", "score_clip", "missing_eos_penalty"),
            above=0,
        )
        self.check_range(
            *("steps", "forward_batch_size", "dataset_num_proc", "save_freq", "max_bad_batches", "compare_steps"),
            least=1,
        )
        self.check_range("init_kl_coef", "ensemble_std_coef", least=0)
        self._check_contradictions()

    def check_range(self, *names: str, above: float | None = None, least: float | None = None) -> None:
        """Raises UserError for a finite number that is too small; None passes, for it means "not given"."""
        for name in names:
            value = getattr(self, name)
            if value is None:
                continue
            if above is not None and not above < value < math.inf:
                raise UserError(f"{name} must be a number greater than {above}, not {value}.")
            if least is not None and not least <= value < math.inf:
                raise UserError(f"{name} must be {least} or more, not {value}.")

    def _check_contradictions(self) -> None:
        if self.load_in_4bit and not self.use_peft:
            raise UserError("load_in_4bit needs use_peft, for 4-bit weights cannot be trained: give both, or neither.")
        if self.use_score_norm and not self.use_score_scaling:
            raise UserError("use_score_norm does nothing without use_score_scaling: give both, or neither.")
        if self.kl_in_loss and self.kl_penalty not in ("mse", "k2", "k3"):
            raise UserError(
                f"kl_in_loss needs kl_penalty=mse or k3, whose gradients are those of a KL, not {self.kl_penalty}: use"
                " one of them, or leave the KL in the reward."
            )
        if (self.ensemble_std_coef is None) == (self.ensemble_reward == "uncertainty"):
            raise UserError("ensemble_reward=uncertainty and ensemble_std_coef (its λ) need each other: give both.")
        if self.adap_kl_ctrl and self.batch_size >= 5 * self.horizon:
            raise UserError(
                f"adap_kl_ctrl with batch_size={self.batch_size} and horizon={self.horizon:g} can turn the KL"
                " coefficient to 0 and below: raise horizon."
            )
        if self.missing_eos_penalty is None and self.missing_eos_mode == "subtract":
            raise UserError(
                "missing_eos_mode=subtract does nothing without missing_eos_penalty: give both, or neither."
            )
        if self.push_to_hub_if_best_kwargs:
            check_push_options(self.push_to_hub_if_best_kwargs)
        if self.batch_size % self.samples_per_prompt:
            raise UserError(
                f"batch_size={self.batch_size} is no multiple of the {self.samples_per_prompt} responses per prompt:"
                " change one of them."
            )
