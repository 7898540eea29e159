"""Builds the parts of an online run from its settings: processes, policy, reference and reward."""

import copy
import logging
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deep_rlhf.algorithms.online.config import OnlineConfig
from deep_rlhf.errors import ConfigError, ModelError
from deep_rlhf.models.adapters import add_lora
from deep_rlhf.models.load import load_language_model, load_tokenizer
from deep_rlhf.models.policy import Policy, Reference
from deep_rlhf.models.quantisation import compute_four_bit_in, is_four_bit
from deep_rlhf.models.reward import RewardModel, as_scorer
from deep_rlhf.models.validation import check_generation, check_vocabulary
from deep_rlhf.runtime.precision import cast_weights, compute_dtype, frozen_copy, hidden_width, multiplies_bf16
from deep_rlhf.runtime.processes import Runtime
from deep_rlhf.runtime.trackers import LOOP_TRACKERS, usable_trackers
from deep_rlhf.types import Scorer

logger = logging.getLogger(__name__)


def open_runtime(config: OnlineConfig) -> Runtime:
    """Returns the processes of the run, with the trackers that are installed.

    Raises ConfigError if `batch_size` is smaller than the number of processes.
    """
    trackers = usable_trackers(
        [config.log_with or "none"],
        run_name=config.exp_name,
        project=config.tracker_project_name,
        tracker_kwargs=config.tracker_kwargs,
        known=LOOP_TRACKERS,
    )
    runtime = Runtime(trackers, project_kwargs=config.project_kwargs, accelerator_kwargs=config.accelerator_kwargs)
    if config.batch_size < runtime.processes:
        raise ConfigError(
            f"batch_size={config.batch_size} gives some of the {runtime.processes} processes nothing to do: raise it."
        )
    return runtime


def model_and_tokenizer(
    model: PreTrainedModel | str | None, tokenizer: PreTrainedTokenizerBase | str | None, config: OnlineConfig
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads model and tokenizer where they are given by name.

    The model defaults to `config.model_name`, the tokenizer to the model's. Raises ModelError if the tokenizer is
    unknown or not the model's, or a file cannot be opened, and ConfigError if `load_in_4bit` comes too late for a model
    object.
    """
    model = config.model_name if model is None else model
    if tokenizer is None:
        tokenizer = model if isinstance(model, str) else model.name_or_path or None
    if tokenizer is None:
        raise ModelError("Give the trainer the model's tokenizer: this model object does not say where it came from.")
    if isinstance(tokenizer, str):
        tokenizer = load_tokenizer(tokenizer, trust_remote_code=config.trust_remote_code)
    if isinstance(model, str):
        model = load_language_model(
            model,
            seq2seq=config.use_seq2seq,
            in_4bit=config.load_in_4bit,
            trust_remote_code=config.trust_remote_code,
        )
    elif config.load_in_4bit and not is_four_bit(model):
        raise ConfigError("load_in_4bit quantises a model while it is loaded: give its name, or load it in 4 bits.")
    opened: Any = model
    check_generation(opened, opened.name_or_path or opened.config.model_type)
    check_vocabulary(opened, tokenizer)
    return model, tokenizer


def open_policy(model: PreTrainedModel, device: torch.device, config: OnlineConfig) -> Policy:
    """Makes the trained policy, on its device and in its precision: the whole `model`, or LoRA adapters on it."""
    if config.use_peft:
        task_type = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
        model = add_lora(model, r=config.lora_r, alpha=config.lora_alpha, task_type=task_type)
    policy = Policy(model)
    dtype = compute_dtype(config.precision, multiplies_bf16(device), hidden_width(model))
    cast_weights(policy, dtype, frozen_only=policy.is_adapted)  # adapters are few, and stay float32
    compute_four_bit_in(policy, dtype)
    if config.gradient_checkpointing:
        policy.checkpoint_activations()
    return policy.to(device)


def open_reference(policy: Policy, config: OnlineConfig) -> Reference:
    """Returns the frozen reference model: a copy of the policy as it is now, or its base with the adapters off.

    A copy has the dtype and device of `config.frozen_precision` and `config.frozen_device`.
    """
    if policy.is_adapted:
        if (config.frozen_precision, config.frozen_device) != ("auto", "auto"):
            logger.info(
                "With use_peft the reference is the policy's own base: frozen_precision and frozen_device apply to the"
                " reward model only."
            )
        return Reference(policy)
    dtype, device = _frozen_placement(policy.language_model, policy.device, config)
    return Reference(policy, frozen=frozen_copy(policy, dtype, device))


def open_scorer(reward: Any, device: torch.device, config: OnlineConfig) -> Scorer:
    """Makes a Scorer from a Scorer, a function, or a value of `--reward_model`.

    A RewardModel that needs another dtype or device is copied; the caller's object stays as it is, and a FunctionScorer
    keeps its own time limit. Raises RewardError for anything else.
    """
    reward = as_scorer(reward, trust_remote_code=config.trust_remote_code, timeout=config.reward_timeout)
    if isinstance(reward, RewardModel):
        dtype, device = _frozen_placement(reward.model, device, config)
        if any(weight.dtype != dtype or weight.device != device for weight in reward.model.parameters()):
            reward = copy.copy(reward)
            reward.model = frozen_copy(reward.model, dtype, device)
    return reward


def _frozen_placement(
    model: PreTrainedModel, device: torch.device, config: OnlineConfig
) -> tuple[torch.dtype, torch.device]:
    """The dtype and device of a model that is not trained, in a run on `device`."""
    device = torch.device("cpu") if config.frozen_device == "cpu" else torch.empty(0, device=device).device
    precision = config.precision if config.frozen_precision == "auto" else config.frozen_precision
    return compute_dtype(precision, multiplies_bf16(device), hidden_width(model)), device
