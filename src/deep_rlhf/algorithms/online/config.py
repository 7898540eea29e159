"""The settings shared by all algorithms that sample from the policy while it learns, named as in TRL ≤ 0.11."""

from dataclasses import dataclass
from typing import Any, Literal

from deep_rlhf.errors import ConfigError
from deep_rlhf.ops.kl import KLPenalty
from deep_rlhf.runtime.hub import check_push_options
from deep_rlhf.runtime.optimisers.adamw import OptimizerName
from deep_rlhf.runtime.precision import Precision
from deep_rlhf.settings import check_settings, seed_setting, setting

# A resumed run may change these settings: they affect neither the weights nor the metrics.
RESUME_MAY_CHANGE = frozenset(
    {
        *("output_dir", "exp_name", "log_with", "tracker_project_name", "tracker_kwargs", "project_kwargs", "resume"),
        *("save_freq", "compare_steps", "push_to_hub_if_best_kwargs", "reward_timeout", "max_bad_batches"),
        *("dataset_num_proc", "on_bad_rows"),
    }
)


@dataclass(frozen=True)
class ScriptArguments:
    """How the policy is loaded."""

    use_seq2seq: bool = setting(False, "the policy is an encoder-decoder such as T5")
    trust_remote_code: bool = setting(False, "run Python code from a model's repository")
    use_peft: bool = setting(False, "train LoRA adapters; the reference model is the base without them")
    lora_alpha: float = setting(16, "scale of the LoRA update, applied as lora_alpha / lora_r", above=0, most=1e6)
    lora_r: int = setting(16, "rank of the LoRA matrices", least=1, most=2**16)
    load_in_4bit: bool = setting(False, "with use_peft: load the base in 4-bit NF4 (QLoRA); needs bitsandbytes")


@dataclass(frozen=True)
class OnlineConfig(ScriptArguments):
    """Prompts, reward, sampling, KL penalty and optimiser. Raises ConfigError for settings that cannot work."""

    exp_name: str = setting("ppo", "name of the run")
    seed: int = seed_setting(0, "seed of sampling, shuffling and newly initialised weights")
    log_with: str | None = setting(None, "tracker that receives the metrics: wandb, tensorboard, …")
    tracker_project_name: str | None = setting(None, "project in the tracker; default: $WANDB_PROJECT, or deep-rlhf")
    tracker_kwargs: dict[str, Any] | None = setting(
        None, 'JSON with the arguments of each tracker, for example {"wandb": {"entity": "my-team"}}'
    )
    project_kwargs: dict[str, Any] | None = setting(
        None, 'JSON for accelerate\'s ProjectConfiguration, for example {"logging_dir": "logs"}'
    )
    accelerator_kwargs: dict[str, Any] | None = setting(None, 'JSON for accelerate\'s Accelerator: {"cpu": true}')
    model_name: str = setting("gpt2", "policy to start from: a folder or Hub name")
    query_dataset: str = setting(
        "wentingzhao/anthropic-hh-first-prompt", "data set of prompts: a Hub name, file or folder"
    )
    query_split: str = setting("train", "split of the data set of prompts")
    template: Literal["auto", "hh", "plain"] = setting(
        "auto", "format of a bare prompt; auto: the format that the reward model was trained with, or plain"
    )
    on_bad_rows: Literal["error", "skip"] = setting(
        "error", "what to do with a row that cannot be read: stop with an error, or skip and count it"
    )
    query_config: str | None = setting(None, "configuration (subset) of a data set on the Hub")
    query_column: str | None = setting(None, "column of the prompts; default: the first column with a known name")
    dataset_num_proc: int | None = setting(None, "number of processes that read the data set", least=1, most=1024)
    reward_model: str = setting(
        "./reward_modeling_anthropic_hh",
        "reward: a folder, a Hub name, or python:module:function taking (prompts, responses)",
    )
    reward_timeout: float = setting(600.0, "seconds that one call of a reward function may take", above=0, most=1e9)
    output_dir: str | None = setting(None, "folder of the results; default: outputs/<exp_name>")
    resume: bool = setting(False, "continue from the newest complete checkpoint in output_dir")
    save_freq: int = setting(10, "updates between two checkpoints", least=1)
    max_bad_batches: int = setting(3, "number of batches in a row with a NaN or infinity that stops the run", least=1)
    compare_steps: int = setting(
        1, "with push_to_hub_if_best_kwargs: updates between two comparisons of the score with the best one", least=1
    )
    push_to_hub_if_best_kwargs: dict[str, Any] | None = setting(
        None,
        "JSON with the Hub repository that gets the policy (also saved in best/) after each best score, such as"
        ' {"repo_id": "me/policy"}',
    )

    max_prompt_length: int = setting(512, "longest prompt in tokens; longer prompts are dropped and counted", least=1)
    max_new_tokens: int = setting(32, "longest response in tokens", least=1, most=2**20)
    temperature: float = setting(1.0, "divisor of the logits, in sampling and in training", above=0, most=1e4)
    steps: int | None = setting(
        None,
        "responses sampled in all: updates = steps / batch_size, rounded up; default: one pass over the prompts",
        least=1,
    )
    batch_size: int = setting(128, "responses per update, over all processes", least=1, most=2**20)
    forward_batch_size: int | None = setting(
        None, "upper limit of responses in one forward pass; default: as many as fit its token budget", least=1
    )
    optimizer: OptimizerName = setting(
        "adamw", "AdamW with moments in 32 bits, or in 8 bits (adamw_8bit, needs bitsandbytes)"
    )
    learning_rate: float = setting(1.41e-5, "initial learning rate of AdamW", above=0, most=1e3)
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = setting(
        "constant", "learning-rate schedule over the updates; linear and cosine fall to 0 at the last update"
    )
    max_grad_norm: float | None = setting(1.0, "gradients with a larger norm are scaled down to it", above=0)
    precision: Precision = setting(
        "auto",
        "dtype of the trained models; bf16 keeps fp32 master weights; auto: bf16 for wide models on bf16 hardware",
    )
    frozen_precision: Precision = setting("auto", "dtype of reference and reward model; auto: the same as precision")
    frozen_device: Literal["auto", "cpu"] = setting(
        "auto", "device of reference and reward model; cpu: both stay and compute in main memory"
    )
    gradient_checkpointing: bool = setting(False, "save memory by recomputing activations in the backward pass")

    adap_kl_ctrl: bool = setting(True, "adapt the KL coefficient so that the KL approaches target")
    init_kl_coef: float = setting(
        0.2, "initial KL coefficient β: reward subtracted per nat of KL; raise it if the text degenerates", least=0
    )
    target: float = setting(
        6.0, "KL per whole response that adap_kl_ctrl aims at, in nats; scale it with the response length", above=0
    )
    horizon: float = setting(
        10_000, "responses over which adap_kl_ctrl adapts; larger: the KL coefficient changes more slowly", above=0
    )
    kl_penalty: KLPenalty = setting(
        "kl", "estimator of the KL per token: kl = k1, mse = k2, abs, k3, or full, the exact KL"
    )
    kl_in_loss: bool = setting(False, "add the KL to the loss instead of subtracting it from the reward")

    use_score_scaling: bool = setting(False, "divide scores by the running standard deviation of all scores so far")
    use_score_norm: bool = setting(False, "with use_score_scaling: subtract the running mean first")
    score_clip: float | None = setting(None, "clip scores to ± this value, after scaling", above=0)
    missing_eos_penalty: float | None = setting(
        None, "penalty in units of reward for a response without EOS; Huang et al. 2024 use 1", above=0
    )
    missing_eos_mode: Literal["replace", "subtract"] = setting(
        "replace", "replace: the score becomes −missing_eos_penalty; subtract: the penalty is subtracted, as in TRL"
    )
    ensemble_reward: Literal["mean", "uncertainty", "min"] = setting(
        "mean", "score of a reward-model ensemble: mean, mean − λ·standard deviation (uncertainty), or minimum"
    )
    ensemble_std_coef: float | None = setting(None, "coefficient λ of ensemble_reward=uncertainty", least=0)

    @property
    def samples_per_prompt(self) -> int:
        """Responses to each prompt of a batch."""
        return 1

    @property
    def recomputes_logprobs(self) -> bool:
        """Whether a forward pass of the trainer replaces the sampler's log-probabilities in a rollout."""
        return False

    def adapts_kl_coef(self, update: int) -> bool:
        """Whether the KL coefficient is adapted after this update."""
        return self.adap_kl_ctrl

    def __post_init__(self) -> None:
        check_settings(self)
        self._check_contradictions()

    def _check_contradictions(self) -> None:
        if self.load_in_4bit and not self.use_peft:
            raise ConfigError(
                "load_in_4bit needs use_peft, since 4-bit weights cannot be trained: give both or neither."
            )
        if self.use_score_norm and not self.use_score_scaling:
            raise ConfigError("use_score_norm does nothing without use_score_scaling: give both, or neither.")
        if self.kl_in_loss and self.kl_penalty not in ("mse", "k2", "k3"):
            raise ConfigError(
                f"kl_in_loss needs kl_penalty=mse or k3, whose gradients are those of a KL, not {self.kl_penalty}: use"
                " one of them, or leave the KL in the reward."
            )
        if (self.ensemble_std_coef is None) == (self.ensemble_reward == "uncertainty"):
            raise ConfigError("ensemble_reward=uncertainty and ensemble_std_coef (its λ) need each other: give both.")
        if self.adap_kl_ctrl and self.batch_size >= 5 * self.horizon:
            raise ConfigError(
                f"adap_kl_ctrl with batch_size={self.batch_size} and horizon={self.horizon:g} can turn the KL"
                " coefficient to 0 and below: raise horizon."
            )
        if self.missing_eos_penalty is None and self.missing_eos_mode == "subtract":
            raise ConfigError(
                "missing_eos_mode=subtract does nothing without missing_eos_penalty: give both, or neither."
            )
        if self.compare_steps != 1 and not self.push_to_hub_if_best_kwargs:
            raise ConfigError(
                f"compare_steps={self.compare_steps} does nothing without push_to_hub_if_best_kwargs: give both, or"
                " neither."
            )
        if self.push_to_hub_if_best_kwargs:
            check_push_options(self.push_to_hub_if_best_kwargs)
        if self.batch_size % self.samples_per_prompt:
            raise ConfigError(
                f"batch_size={self.batch_size} is not a multiple of the {self.samples_per_prompt} responses per"
                " prompt: change one of them."
            )
