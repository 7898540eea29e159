"""The memory plan of PPO, RLOO, GRPO and REINFORCE++: runs their own code on models without weights, and counts.

Prompts and responses are assumed to be as long as the settings allow, which gives an upper limit.
"""

import copy
import dataclasses
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

from deep_rlhf.accel.cpu.gradients import gradients_in_place
from deep_rlhf.accel.cpu.kernels import use_fast_kernels
from deep_rlhf.algorithms.online.build import open_policy, open_reference
from deep_rlhf.algorithms.online.config import OnlineConfig
from deep_rlhf.algorithms.online.prompts import longest_prompt
from deep_rlhf.algorithms.ppo import PPOConfig
from deep_rlhf.errors import ConfigError
from deep_rlhf.models.critic import Critic, make_critic
from deep_rlhf.models.policy import LOGIT_BYTES, LOGIT_BYTES_OF_GPU, Policy
from deep_rlhf.models.reward import TOKENS_PER_BATCH
from deep_rlhf.models.trunk import Trunk
from deep_rlhf.ops.logprobs import chunked_token_logprobs
from deep_rlhf.planning.memory_plan import (
    GRADIENT_BYTES,
    LiveBytes,
    Machine,
    MemoryPlan,
    Phase,
    bytes_of,
    forward_bytes,
    meta_model,
    optimizer_bytes,
    temporary_bytes,
    training_bytes,
)
from deep_rlhf.rollout.collect import needs_states
from deep_rlhf.rollout.decoding import Decoding, bytes_per_token
from deep_rlhf.rollout.engine import CPU_BYTES, GPU_SHARE
from deep_rlhf.rollout.passes import TOKENS, TOKENS_OF_GPU
from deep_rlhf.rollout.sampler import draw_tokens
from deep_rlhf.runtime.precision import cast_weights

FOUR_BIT_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # per weight in doubly quantised NF4 (Dettmers et al. 2023)


@dataclasses.dataclass(frozen=True, slots=True)
class _Models:
    """The models of a run on the meta device, in their dtypes."""

    policy: Policy
    reference: list[Policy]  # empty if the reference is the policy without adapters
    critic: Critic | None
    reward: nn.Module | None  # None for a function

    @property
    def trained(self) -> list[nn.Parameter]:
        return [*self.policy.trainable_parameters(), *(self.critic.trainable_parameters() if self.critic else [])]


def plan_online(
    config: OnlineConfig, policy_config: Any, reward_config: Any, machine: Machine, *, baseline: int
) -> MemoryPlan:
    """Plans a run with models of these transformers configurations; `reward_config` is None for a reward function.

    `baseline` are the bytes of the process before any model is loaded. Raises the errors that the run itself would
    raise for models that do not fit the settings.
    """
    with LiveBytes():
        models = _models(config, policy_config, reward_config, machine)
    policy, on_gpu = models.policy, machine.is_gpu
    prompt, response = longest_prompt(policy.language_model, config), config.max_new_tokens
    frozen_is_elsewhere = on_gpu and config.frozen_device == "cpu"
    held = {
        "Python, libraries": baseline,
        "policy": _policy_bytes(policy, config),
        "reference": 0 if frozen_is_elsewhere else bytes_of(models.reference),
        "reward model": 0 if frozen_is_elsewhere or models.reward is None else bytes_of([models.reward]),
        "critic": bytes_of([models.critic]) if models.critic else 0,
        "optimiser": optimizer_bytes(models.trained, config.optimizer),
    }
    free = machine.memory - sum(held.values())
    no_gradients = held | {"kept states": _states_bytes(models, config)}
    phases = [Phase("sampling", no_gradients | _sampling(policy, prompt, response, config, free if on_gpu else None))]
    if models.reward is not None and not frozen_is_elsewhere:
        longest = min(prompt + response, getattr(reward_config, "max_position_embeddings", None) or prompt + response)
        rows = max(1, min(TOKENS_PER_BATCH // longest, config.batch_size))
        phases.append(Phase("scoring", no_gradients | {"activations": forward_bytes(models.reward, rows, longest)}))
    phases.append(Phase("experience", no_gradients | _experience(models, prompt, response, config, on_gpu)))
    gradients = GRADIENT_BYTES * sum(parameter.numel() for parameter in models.trained)
    training = _training(models, prompt, response, config, on_gpu)
    phases.append(Phase("training", held | {"gradients": gradients} | training))
    if not on_gpu:
        phases.append(Phase("saving", held | {"policy, as written": _saving(policy)}))
    return MemoryPlan(tuple(phases))


def _models(config: OnlineConfig, policy_config: Any, reward_config: Any, machine: Machine) -> _Models:
    auto = AutoModelForSeq2SeqLM if config.use_seq2seq else AutoModelForCausalLM
    model = meta_model(auto, policy_config, trust_remote_code=config.trust_remote_code)
    reward = None
    if reward_config is not None:
        kind = AutoModelForSequenceClassification
        reward = meta_model(kind, reward_config, trust_remote_code=config.trust_remote_code)
        use_fast_kernels(reward)
        frozen = config.precision if config.frozen_precision == "auto" else config.frozen_precision
        cast_weights(reward, machine.dtype(frozen, reward))
    config = dataclasses.replace(
        config,
        precision="bf16" if machine.dtype(config.precision, model) == torch.bfloat16 else "fp32",
        frozen_device="auto",  # plan_online leaves out models in main memory
        load_in_4bit=False,  # nothing is loaded
    )
    policy = open_policy(model, torch.device("meta"), config)
    reference = open_reference(policy, config)
    with reference.model() as frozen_policy:
        own_reference = [frozen_policy] if frozen_policy is not policy else []
    critic = _critic(config, policy, reward) if isinstance(config, PPOConfig) else None
    return _Models(policy, own_reference, critic, reward)


def _critic(config: PPOConfig, policy: Policy, reward: nn.Module | None) -> Critic:
    if config.critic != "reward":
        critic = make_critic(config.critic, policy, None, None)
    elif reward is None:
        raise ConfigError("critic=reward needs a reward model, but the reward is a function: use critic=separate.")
    else:
        trunk = Trunk(copy.deepcopy(reward).requires_grad_(True))
        cast_weights(trunk, policy.dtype)
        critic = Critic(nn.Linear(trunk.language_model.config.hidden_size, 1, device="meta"), trunk)
    if config.gradient_checkpointing and critic.own_trunk is not None:
        critic.own_trunk.checkpoint_activations()
    return critic


def _policy_bytes(policy: Policy, config: OnlineConfig) -> int:
    """The bytes of the policy's weights; with load_in_4bit its frozen linear layers are quantised."""
    saved = 0.0
    if config.load_in_4bit:
        saved = sum(layer.weight.nbytes - FOUR_BIT_BYTES * layer.weight.numel() for layer in _frozen_layers(policy))
    return bytes_of([policy]) - int(saved)


def _saving(policy: Policy) -> int:
    """The bytes of saving: safetensors copies all weights, and adapters are merged into a copy of the policy first."""
    weights = sum(weight.numel() for weight in policy.language_model.parameters())
    size = policy.language_model.get_input_embeddings().weight.element_size()
    return size * weights + (bytes_of([policy]) if policy.is_adapted else 0)


def _frozen_layers(policy: Policy) -> list[Any]:
    head = policy.language_model.get_output_embeddings()
    return [layer for layer in _linear_layers(policy) if layer is not head and not layer.weight.requires_grad]


def _linear_layers(policy: Policy) -> list[Any]:
    return [module for module in policy.modules() if isinstance(module, nn.Linear | Conv1D)]


def _states_bytes(models: _Models, config: OnlineConfig) -> int:
    """The bytes of the policy's hidden states that the sampler keeps for a shared critic or the exact KL."""
    if not needs_states(models.critic, config.kl_penalty):
        return 0
    width = models.policy.language_model.get_output_embeddings().weight.shape[1]
    return config.batch_size * config.max_new_tokens * width * models.policy.dtype.itemsize


def _sampling(policy: Policy, prompt: int, response: int, config: OnlineConfig, free: int | None) -> dict[str, int]:
    """The bytes of sampling a batch as large as the engine's budget: a share of `free` on a GPU; None on a CPU."""
    budget = CPU_BYTES if free is None else int(GPU_SHARE * max(free, 0))
    head: Any = policy.language_model.get_output_embeddings()
    token_bytes: list[int] = []
    temporary_bytes(lambda: token_bytes.append(bytes_per_token(policy)))
    row_bytes = (prompt + response) * token_bytes[0] + 16 * head.weight.shape[0]
    rows = max(1, min(budget // row_bytes, config.batch_size))

    @torch.no_grad()
    def first_token() -> None:
        ids, mask = _ids(rows, prompt)
        decoding = Decoding(policy, ids, mask, response)
        draw_tokens(policy.head(decoding.hidden), torch.zeros(rows, device=ids.device), config.temperature)

    cache = rows * (prompt + response - 1) * token_bytes[0]
    quantised = set(_frozen_layers(policy)) if config.load_in_4bit else set()
    packed = sum(layer.weight.nbytes for layer in _linear_layers(policy) if layer not in quantised)
    return {
        "keys and values": cache,
        "packed weights": packed if free is None else 0,
        "activations": max(0, temporary_bytes(first_token) - cache),
    }


def _experience(models: _Models, prompt: int, response: int, config: OnlineConfig, on_gpu: bool) -> dict[str, int]:
    """The bytes of passes of policy, reference and critic over the samples, one at a time, without gradients."""
    tokens = (TOKENS_OF_GPU if on_gpu else TOKENS["cpu"])[0]
    rows = _rows(tokens, prompt, response, logits=tokens, most=config.forward_batch_size or config.batch_size)
    trunk = models.critic.own_trunk if models.critic and models.critic.own_trunk else None

    @torch.no_grad()
    def score_tokens() -> None:
        _logprobs(models.policy, rows, prompt, response, on_gpu)
        if trunk is not None:
            trunk.states(*_ids(rows, prompt), *_ids(rows, response))

    return {"activations": temporary_bytes(score_tokens)}


def _training(models: _Models, prompt: int, response: int, config: OnlineConfig, on_gpu: bool) -> dict[str, int]:
    """The bytes of a forward and backward pass, which keeps activations and the logits of its response tokens."""
    policy, critic = models.policy, models.critic
    trunks = 2 if critic and critic.own_trunk else 1
    tokens, chunk = (TOKENS_OF_GPU if on_gpu else TOKENS["cpu"])[1] // trunks, _chunk_size(policy, on_gpu)
    most = config.forward_batch_size or getattr(config, "mini_batch_size", None) or config.batch_size
    most = min(most, getattr(config, "optimizer_batch_size", config.batch_size))
    rows = _rows(tokens, prompt, response, logits=chunk, most=most)

    def backward() -> None:
        with ExitStack() as stack:
            for trunk in (policy, critic and critic.own_trunk):
                if trunk:
                    stack.enter_context(gradients_in_place(trunk.language_model))
            states, logprobs = _logprobs(policy, rows, prompt, response, on_gpu)
            loss = logprobs.sum()
            if critic and critic.own_trunk:
                states = critic.own_trunk.states(*_ids(rows, prompt), *_ids(rows, response))
            if critic:
                loss = loss + critic.value_head(states.to(critic.value_head.weight.dtype)).sum()
            loss.backward()

    temporary = training_bytes(backward, models.trained)
    head = policy.language_model.get_output_embeddings().weight
    if head.requires_grad and not on_gpu:  # a CPU adds its gradient in place; meta tensors do not
        temporary -= head.nbytes
    logits = min(chunk, rows * response) * head.shape[0] * head.element_size()
    unpacked = max((layer.weight.nbytes for layer in _frozen_layers(policy)), default=0) if config.load_in_4bit else 0
    return {"logits": min(logits, temporary), "activations": max(0, temporary - logits) + unpacked}


def _logprobs(policy: Policy, rows: int, prompt: int, response: int, on_gpu: bool) -> tuple[Tensor, Tensor]:
    """The states [rows, response, H] and the log-probabilities [rows · response] of a pass of full length."""
    response_ids, response_mask = _ids(rows, response)
    states = policy.states(*_ids(rows, prompt), response_ids, response_mask)
    chunk = _chunk_size(policy, on_gpu)
    return states, chunked_token_logprobs(states.flatten(0, 1), policy.head, response_ids.flatten(), chunk_size=chunk)


def _chunk_size(policy: Policy, on_gpu: bool) -> int:
    """`Policy.chunk_size` on the planned machine."""
    return policy.chunk_size_of(LOGIT_BYTES_OF_GPU if on_gpu else LOGIT_BYTES["cpu"])


def _rows(tokens: int, prompt: int, response: int, *, logits: int, most: int) -> int:
    """The number of samples of full length in one forward pass, as `rollout.passes` cuts them."""
    return max(1, min(tokens // (prompt + response), logits // response, most))


def _ids(rows: int, length: int) -> tuple[Tensor, Tensor]:
    ids = torch.zeros(rows, length, dtype=torch.int64, device="meta")
    return ids, torch.ones_like(ids, dtype=torch.bool)
