"""What an online run is made of, from its settings: models, reward, prompts, and what tells one run from another."""

import copy
import dataclasses
import hashlib
import logging
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deep_rlhf.algorithms.online.config import OnlineConfig
from deep_rlhf.errors import UserError
from deep_rlhf.models.adapters import add_lora
from deep_rlhf.models.function_scorer import FunctionScorer
from deep_rlhf.models.load import load_language_model, load_tokenizer
from deep_rlhf.models.policy import Policy, Reference
from deep_rlhf.models.quantisation import compute_four_bit_in, is_four_bit
from deep_rlhf.models.reward import RewardModel, load_scorer
from deep_rlhf.runtime.precision import cast_weights, compute_dtype, frozen_copy, hidden_width, multiplies_bf16
from deep_rlhf.runtime.processes import Runtime
from deep_rlhf.runtime.run_directory import write_summary
from deep_rlhf.runtime.trackers import LOOP_TRACKERS, usable_trackers
from deep_rlhf.types import Rollout, RowReport, Scorer

logger = logging.getLogger(__name__)


def open_runtime(config: OnlineConfig) -> Runtime:
    """The processes, with the trackers that can be used. Raises UserError if there are more of them than responses."""
    trackers = usable_trackers(
        [config.log_with or "none"],
        run_name=config.exp_name,
        project=config.tracker_project_name,
        tracker_kwargs=config.tracker_kwargs,
        known=LOOP_TRACKERS,
    )
    runtime = Runtime(trackers, project_kwargs=config.project_kwargs, accelerator_kwargs=config.accelerator_kwargs)
    if config.batch_size < runtime.processes:
        raise UserError(
            f"batch_size={config.batch_size} gives some of the {runtime.processes} processes nothing to do: raise it."
        )
    return runtime


def model_and_tokenizer(
    model: PreTrainedModel | str | None, tokenizer: PreTrainedTokenizerBase | str | None, config: OnlineConfig
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Both as objects; `config.model_name` stands in for a model, the model's name for a tokenizer."""
    model = config.model_name if model is None else model
    if tokenizer is None:
        tokenizer = model if isinstance(model, str) else model.name_or_path or None
    if tokenizer is None:
        raise UserError("Give the trainer the model's tokenizer: this model object does not say where it came from.")
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
        raise UserError("load_in_4bit quantises a model while it is loaded: give its name, or load it in 4 bits.")
    return model, tokenizer


def open_policy(model: PreTrainedModel, device: torch.device, config: OnlineConfig) -> Policy:
    """The policy that is trained, on its device and in its precision: all of `model`, or adapters on it."""
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
    """The policy as it is now, frozen: a copy in the format and place of `config`, or the policy without adapters."""
    if policy.is_adapted:
        if (config.frozen_precision, config.frozen_device) != ("auto", "auto"):
            logger.info("With use_peft the reference is the policy's own base: frozen_… is for the reward model alone.")
        return Reference(policy)
    return Reference(policy, frozen=frozen_copy(policy, *_frozen_format(policy.language_model, policy.device, config)))


def open_scorer(reward: Any, device: torch.device, config: OnlineConfig) -> Scorer:
    """A Scorer from a Scorer, a function, or what `--reward_model` takes.

    A RewardModel that has to be cast or moved is copied, and the caller's stays as it is.
    """
    if isinstance(reward, str):
        reward = load_scorer(reward, trust_remote_code=config.trust_remote_code)
    if isinstance(reward, RewardModel):
        dtype, device = _frozen_format(reward.model, device, config)
        if any(weight.dtype != dtype or weight.device != device for weight in reward.model.parameters()):
            reward = copy.copy(reward)
            reward.model = frozen_copy(reward.model, dtype, device)
    if not hasattr(reward, "score"):
        reward = FunctionScorer(reward, getattr(reward, "__name__", "reward"))
    if isinstance(reward, FunctionScorer):
        reward.timeout = config.reward_timeout
    return reward


def _frozen_format(
    model: PreTrainedModel, device: torch.device, config: OnlineConfig
) -> tuple[torch.dtype, torch.device]:
    """How and where a model that is not trained computes in a run on `device`."""
    device = torch.device("cpu") if config.frozen_device == "cpu" else torch.empty(0, device=device).device
    precision = config.precision if config.frozen_precision == "auto" else config.frozen_precision
    return compute_dtype(precision, multiplies_bf16(device), hidden_width(model)), device


def longest_prompt(model: PreTrainedModel, config: OnlineConfig) -> int:
    """The most tokens of a prompt: as told, or what the response leaves of the positions that the model knows."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is None:
        return config.max_prompt_length
    if config.max_new_tokens >= positions:
        raise UserError(
            f"max_new_tokens={config.max_new_tokens} leaves no room for a prompt in the {positions} positions of the"
            " model: lower it."
        )
    return min(config.max_prompt_length, positions - config.max_new_tokens)


def usable_prompts(
    prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase, longest: int
) -> tuple[list[str], RowReport]:
    """Prompts with 1 to `longest` tokens, and what became of the others."""
    lengths = [len(row) for row in tokenizer(list(prompts)).input_ids] if len(prompts) else []
    kept = [prompt for prompt, length in zip(prompts, lengths, strict=True) if 0 < length <= longest]
    dropped = {"too long": sum(length > longest for length in lengths), "empty": lengths.count(0)}
    if not kept:
        raise UserError(
            f"None of the {len(prompts)} prompts can be used ({dropped['too long']} have more than {longest} tokens, "
            f"{dropped['empty']} are empty): raise max_prompt_length or give other prompts."
        )
    return kept, RowReport(read=len(prompts), kept=len(kept), dropped={k: v for k, v in dropped.items() if v})


def count_updates(prompts: int, config: OnlineConfig) -> int:
    """How many batches make up `config.steps` responses, or one pass over the prompts."""
    if config.steps is None:
        return max(1, prompts * config.samples_per_prompt // config.batch_size)
    return -(-config.steps // config.batch_size)


def run_identity(
    config: OnlineConfig,
    prompts: Sequence[str],
    reference: Reference,
    scorer: Scorer,
    *,
    updates: int,
    processes: int,
    without: Collection[str],
) -> dict[str, Any]:
    """Everything that decides what a run computes: settings but for `without`, prompts, reward model, where it starts.

    The same for the settings as typed and as config.yaml has them: what `steps` and `template` came to.

    Empty for a run without an output_dir, which nobody can continue.
    """
    if config.output_dir is None:
        return {}
    without = {*without, "template"}  # the prompts are in it
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in without}
    settings["steps"] = updates * config.batch_size
    texts = hashlib.sha256("\0".join(prompts).encode(errors="surrogatepass")).hexdigest()[:16]
    identity = {**settings, "processes": processes, "prompts": texts}
    with reference.model() as frozen:  # adapters are switched off in the reference
        weights = [tensor for name, tensor in frozen.named_parameters() if "lora_" not in name]
    identity["weights of the reference"] = _fingerprint(weights)
    if isinstance(scorer, RewardModel):
        identity["weights of the reward model"] = _fingerprint([*scorer.model.parameters(), scorer.mean, scorer.std])
    return identity


def trainable_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The weights that training changes."""
    return {name: parameter.detach() for name, parameter in module.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def load_tensors(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Puts back what `trainable_tensors` took."""
    parameters = dict(module.named_parameters())
    for name, tensor in tensors.items():
        parameters[name].copy_(tensor)


def copied(value: Any) -> Any:
    """A copy of a nest of dicts, lists and tuples, with every tensor in main memory."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {name: copied(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(copied(item) for item in value)
    return value


def set_aside(path: Path, rollout: Rollout, *, step: int, reason: str) -> None:
    """Writes the texts and rewards of a batch that ended its update, for people to look at."""
    rows = zip(rollout.prompts, rollout.responses, rollout.scores.tolist(), strict=True)
    samples = [{"prompt": prompt, "response": response, "score": repr(score)} for prompt, response, score in rows]
    try:
        write_summary(path, {"step": step, "reason": reason, "samples": samples})
    except OSError as error:
        logger.warning("The batch could not be set aside in '%s': %s.", path, error.strerror)
    else:
        logger.warning("The batch is set aside in '%s'.", path)


def save_policy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path, *, trust_remote_code: bool
) -> None:
    """Writes a plain transformers folder and opens it again to be sure it is whole. Raises UserError if it is not."""
    try:
        model.save_pretrained(folder, safe_serialization=True)
        tokenizer.save_pretrained(folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"The policy could not be written to '{folder}': {reason}.") from error
    seq2seq = model.config.is_encoder_decoder
    reopened = load_language_model(str(folder), seq2seq=seq2seq, trust_remote_code=trust_remote_code).state_dict()
    for name, weight in model.state_dict().items():
        if not torch.equal(reopened[name], weight.cpu().to(reopened[name].dtype)):
            raise UserError(f"The policy saved in '{folder}' differs from the trained one in '{name}': save it again.")


def _fingerprint(tensors: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
