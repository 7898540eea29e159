"""Counting memory without data: against hand-computed sizes, and against the same passes over real tensors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, LlamaConfig, T5Config

from deep_rlhf.algorithms.grpo import GRPOConfig
from deep_rlhf.algorithms.ppo import PPOConfig
from deep_rlhf.algorithms.supervised.reward import RewardConfig
from deep_rlhf.errors import ConfigError
from deep_rlhf.models.policy import Policy
from deep_rlhf.planning import online
from deep_rlhf.planning.memory_plan import (
    LiveBytes,
    Machine,
    MemoryPlan,
    Phase,
    bytes_of,
    gpu_of,
    optimizer_bytes,
    temporary_bytes,
    training_bytes,
)
from deep_rlhf.planning.online import plan_online
from deep_rlhf.planning.reward import plan_reward
from deep_rlhf.rollout.passes import ForwardPasses
from deep_rlhf.types import Completions

CPU = Machine("a CPU", 2**34, has_bf16=False, is_gpu=False)
GPU = Machine("a GPU", 2**34, has_bf16=True)
SIZES = {"n_embd": 64, "n_layer": 2, "n_head": 2, "vocab_size": 1000, "pad_token_id": 0}
SETTINGS: dict[str, Any] = {"batch_size": 8, "mini_batch_size": 4, "max_prompt_length": 24, "max_new_tokens": 16}
GPT2_WEIGHTS = 1000 * 64 + 1024 * 64 + 2 * (12 * 64**2 + 13 * 64) + 2 * 64


def plan(machine: Machine = CPU, reward: Any = None, **settings: Any) -> MemoryPlan:
    return plan_online(PPOConfig(**SETTINGS | settings), GPT2Config(**SIZES), reward, machine, baseline=1000)


def parts(plan: MemoryPlan, phase: str) -> Any:
    return next(each.parts for each in plan.phases if each.name == phase)


def test_live_bytes_counts_what_is_alive_at_one_time() -> None:
    outside = torch.zeros(1000)
    with LiveBytes() as live:
        first = torch.zeros(100)  # 400 bytes
        second = first + 1  # 800 at one time
        del first
        third = second.view(10, 10)  # the same storage
        third.add_(1)
        outside.add_(1)  # made before
        assert live.now == 400
        assert torch.allclose(torch.zeros(25), torch.ones(25))  # a check passes; its tensors are gone
    assert (live.now, live.peak) == (400, 800)


def test_fused_attention_takes_memory_in_proportion_to_the_length() -> None:
    def attention(length: int, **options: Any) -> int:
        query = torch.zeros(1, 4, length, 16, device="meta", requires_grad=True)
        key = torch.zeros(1, 2, length, 16, device="meta") if options else query
        attend = torch.nn.functional.scaled_dot_product_attention
        return temporary_bytes(lambda: attend(query, key, key, is_causal=True, **options).sum().backward())

    assert attention(2048) / attention(1024) == pytest.approx(2, rel=0.01)
    assert attention(64, enable_gqa=True) > 0


def test_a_tied_table_is_counted_once() -> None:
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(**SIZES))
    assert bytes_of([model]) == 4 * GPT2_WEIGHTS == bytes_of([model, model])


def test_an_optimiser_holds_moments_and_the_masters_of_bf16_weights() -> None:
    weights = [nn.Parameter(torch.zeros(10)), nn.Parameter(torch.zeros(10, dtype=torch.bfloat16))]
    assert optimizer_bytes(weights) == 10 * 8 + 10 * (8 + 4)
    assert optimizer_bytes(weights, "adamw_8bit") == 10 * 2 + 10 * (2 + 4)


@pytest.mark.parametrize(
    ("text", "name", "memory"),
    [("T4", "T4", 14.6 * 2**30), ("h200", "H200", 139.7 * 2**30), ("24GiB", None, 24 * 2**30), ("80gb", None, 80e9)],
)
def test_a_gpu_is_a_card_or_a_size(text: str, name: str | None, memory: float) -> None:
    gpu = gpu_of(text)
    assert (gpu.memory, gpu.is_gpu) == (int(memory), True)
    assert gpu.name == (name or f"a GPU with {text}")


@pytest.mark.parametrize("text", ["", "T5", "24", "0GiB", "-1GB", "24 TiB"])
def test_another_gpu_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--gpu.*T4, L4, A100, H200.* size"):
        gpu_of(text)


def test_the_peak_is_the_largest_phase_not_the_sum() -> None:
    found = MemoryPlan((Phase("a", {"x": 1, "y": 2}), Phase("b", {"x": 1, "z": 5, "none": 0})))
    assert (found.peak, found.largest.name, found.parts) == (6, "b", ["x", "y", "z"])


def test_weights_and_optimiser_states_are_counted_exactly() -> None:
    reward = GPT2Config(**SIZES, num_labels=1)
    held = parts(plan(reward=reward, precision="fp32", critic="separate"), "training")
    trained = 2 * GPT2_WEIGHTS + 65
    assert held["Python, libraries"] == 1000
    assert held["policy"] == held["reference"] == 4 * GPT2_WEIGHTS
    assert held["reward model"] == bytes_of([GPT2ForSequenceClassification(reward)])
    assert held["critic"] == 4 * (GPT2_WEIGHTS + 65)
    assert held["gradients"] == 4 * trained
    assert held["optimiser"] == 8 * trained
    assert plan().peak == plan().largest.total > sum(list(held.values())[:3])


def test_bf16_halves_weights_and_adds_masters() -> None:
    held = parts(plan(precision="bf16"), "training")
    assert held["policy"] == held["reference"] == 2 * GPT2_WEIGHTS
    assert held["gradients"] == 4 * (GPT2_WEIGHTS + 65)
    assert held["optimiser"] == 12 * GPT2_WEIGHTS + 8 * 65  # the value head is float32
    assert parts(plan(precision="fp32", frozen_precision="bf16"), "training")["reference"] == 2 * GPT2_WEIGHTS


def test_adapters_alone_are_trained_and_need_no_reference() -> None:
    held = parts(plan(precision="fp32", use_peft=True, lora_r=4), "training")
    adapters = 2 * 4 * (64 + 192)  # on the attention's c_attn of both layers
    assert held["reference"] == 0
    assert held["policy"] == 4 * (GPT2_WEIGHTS + adapters)
    assert held["gradients"] == 4 * (adapters + 65)


def test_four_bits_are_for_the_layers_below_the_head() -> None:
    plain, packed = (parts(plan(GPU, use_peft=True, load_in_4bit=bits), "training")["policy"] for bits in (False, True))
    layers = 2 * 12 * 64**2
    assert plain - packed == pytest.approx(
        (2 if GPU.has_bf16 and SIZES["n_embd"] >= 256 else 4) * layers - 0.516 * layers, rel=0.001
    )


def test_frozen_models_in_main_memory_take_nothing_of_the_gpu() -> None:
    reward = GPT2Config(**SIZES, num_labels=1)
    elsewhere = plan(GPU, reward=reward, frozen_device="cpu")
    assert "reference" not in elsewhere.parts
    assert "reward model" not in elsewhere.parts
    assert "scoring" not in [phase.name for phase in elsewhere.phases]


@pytest.mark.parametrize(
    "settings", [{"gradient_checkpointing": True}, {"forward_batch_size": 1}, {"max_new_tokens": 4}]
)
def test_settings_that_save_memory_do_in_the_plan(settings: dict[str, Any]) -> None:
    assert momentary(plan(**settings)) < 0.7 * momentary(plan())


def momentary(plan: MemoryPlan) -> int:
    training = parts(plan, "training")
    return training["activations"] + training["logits"]


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        (LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4), {}),
        (LlamaConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2), {}),
        (T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, decoder_start_token_id=0), {"use_seq2seq": True}),
    ],
)
def test_other_architectures_and_algorithms(config: Any, settings: dict[str, Any]) -> None:
    grpo = GRPOConfig(batch_size=8, max_prompt_length=24, max_new_tokens=16, **settings)
    found = plan_online(grpo, config, None, GPU, baseline=0)
    assert "critic" not in found.parts
    assert parts(found, "sampling")["keys and values"] > 0
    assert momentary(found) > 0


def test_the_critic_of_a_function_cannot_be_its_reward_model() -> None:
    with pytest.raises(ConfigError, match="critic=reward needs a reward model"):
        plan(critic="reward")


def test_passes_are_as_large_as_those_of_a_run(make_model: Callable[..., Any]) -> None:
    policy = Policy(make_model("gpt2", n_positions=2048, vocab_size=40_000))
    for prompt, response, training in (
        (64, 48, True),
        (8, 100, True),
        (500, 12, True),
        (64, 48, False),
        (1500, 9, True),
    ):
        mask = torch.ones(40, prompt, dtype=torch.bool), torch.ones(40, response, dtype=torch.bool)
        samples = Completions(
            prompts=[""] * 40,
            responses=[""] * 40,
            prompt_ids=mask[0].long(),
            prompt_mask=mask[0],
            response_ids=mask[1].long(),
            response_mask=mask[1],
            sampler_logprobs=mask[1].float(),
            entropy=mask[1].float(),
            finished=mask[1][:, 0],
            group=torch.arange(40),
        )
        cut = ForwardPasses(policy, training=training, max_rows=16).cut(samples, torch.arange(40))
        tokens = online.TOKENS["cpu"][training]
        logits = policy.chunk_size if training else tokens
        assert len(cut[0]) == online._rows(tokens, prompt, response, logits=logits, most=16)


@pytest.mark.parametrize("checkpoints", [False, True])
def test_a_pass_without_data_takes_what_one_with_data_does(checkpoints: bool) -> None:
    def trunk_pass(device: str) -> int:
        with torch.device(device):
            model = GPT2LMHeadModel(GPT2Config(**SIZES | {"vocab_size": 50}))
            ids = torch.zeros(4, 40, dtype=torch.int64)
        policy = Policy.__new__(Policy)  # its check asks for data
        super(Policy, policy).__init__(model)
        if checkpoints:
            policy.checkpoint_activations()
        mask = torch.ones_like(ids, dtype=torch.bool)
        return training_bytes(
            lambda: policy.run_trunk(ids, mask, use_cache=False).sum().backward(), policy.trainable_parameters()
        )

    assert trunk_pass("meta") == pytest.approx(trunk_pass("cpu"), rel=0.05)


@pytest.mark.parametrize("settings", [{"precision": "fp32"}, {"precision": "bf16"}, {"use_peft": True}])
def test_a_reward_model_is_planned_with_its_gradients_and_optimiser(settings: dict[str, Any], tmp_path: Any) -> None:
    config = RewardConfig(output_dir=str(tmp_path), max_length=64, report_to="none", **settings)
    found = plan_reward(config, GPT2Config(**SIZES), CPU, baseline=0)
    held = parts(found, "training")
    weights = GPT2_WEIGHTS + 64  # the head
    if "use_peft" in settings:
        assert held["gradients"] < weights
    else:
        assert held["gradients"] == 4 * weights
        table = 1000 * 64  # of embeddings, which stays float32
        masters = 4 * (weights - table) if settings["precision"] == "bf16" else 0
        assert held["optimiser"] == 8 * weights + masters
    assert held["activations"] > parts(found, "evaluation")["activations"] > 0
