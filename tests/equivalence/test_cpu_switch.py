"""Training with and without the fast CPU code, and the fallback to plain PyTorch where operators are missing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from deep_rlhf import PPOConfig, PPOTrainer, RewardConfig
from deep_rlhf.accel.cpu import gradients, switch
from deep_rlhf.accel.cpu.allocator import kept_memory, release_freed_memory
from deep_rlhf.accel.cpu.attention import FastAttention, fast_attention
from deep_rlhf.accel.cpu.gradients import gradients_in_place
from deep_rlhf.accel.cpu.kernels import FastLinear, use_fast_kernels
from deep_rlhf.accel.cpu.packed import packed_weights
from deep_rlhf.algorithms.supervised.reward import train_reward_model
from deep_rlhf.models.function_scorer import FunctionScorer
from deep_rlhf.types import Preference

PROMPTS = ["the cat sees", "red", "a very old dog finds the small house", "two fish", "moon or sun", "bad"]
WORDS = ["red", "green", "blue"]
PAIRS = [
    Preference(prompt="the cat ", a=f"sees {WORDS[i % 3]} gold", b=f"sees {WORDS[i % 2]}", id=str(i), mu=1.0)
    for i in range(8)
]
PRECISIONS = ["fp32", "bf16"]
# Of metrics, and of the change of each weight in units of the learning rate: AdamW moves a weight by about one unit.
TOLERANCE = {"fp32": (1e-5, 1e-3), "bf16": (5e-2, 0.5)}
LEARNING_RATE = 1e-3
TIMES = {"tokens_per_second", "sampling_share_of_time", "memory_gb"}


def reward(prompts: list[str], responses: list[str]) -> list[float]:
    return [sum(len(word) < 4 for word in response.split()) / 4 for response in responses]


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach().float().clone() for name, weight in model.named_parameters()}


def assert_same_weights(one: dict[str, Tensor], other: dict[str, Tensor], precision: str) -> None:
    """The root mean square of the differences, in units of the learning rate."""
    assert one.keys() == other.keys()
    difference = torch.cat([(one[name] - other[name]).flatten() for name in one])
    assert difference.square().mean().sqrt() < TOLERANCE[precision][1] * LEARNING_RATE


def assert_same_metrics(one: dict[str, float], other: dict[str, float], precision: str) -> None:
    assert one.keys() == other.keys()
    tolerance = TOLERANCE[precision][0]
    for name in one.keys() - TIMES:
        assert one[name] == pytest.approx(other[name], abs=tolerance, rel=tolerance), name


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_ppo_update_is_the_same_without_the_fast_code(
    kind: str, precision: str, make_model: Callable[..., Any], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"batch_size": 6, "steps": 6, "ppo_epochs": 2, "max_new_tokens": 8}

    def trainer() -> PPOTrainer:
        config = PPOConfig(**settings, learning_rate=LEARNING_RATE, precision=precision)
        scorer = FunctionScorer(reward, "reward")
        return PPOTrainer(config, model=make_model(kind), tokenizer=tokenizer, prompts=PROMPTS, reward=scorer)

    fast = trainer()
    before = weights_of(fast.policy)
    monkeypatch.setenv(switch.PLAIN_VARIABLE, "1")
    plain = trainer()
    assert any(isinstance(layer, FastLinear) for layer in fast.policy.modules())
    assert not any(type(layer).__module__.startswith("deep_rlhf") for layer in plain.policy.modules())

    rollouts: list[Any] = []
    plain_learn = plain.learner.learn

    def learn(rollout: Any, **options: Any) -> dict[str, float]:
        rollouts.append((rollout, options))
        return plain_learn(rollout, **options)

    plain.learner.learn = learn  # type: ignore[method-assign]
    history = plain.train()
    if precision == "fp32":  # sampling, too
        monkeypatch.delenv(switch.PLAIN_VARIABLE)
        assert_same_metrics(fast.train()[0], history[0], precision)
    else:  # rounding may draw another token: an update from the same samples
        monkeypatch.delenv(switch.PLAIN_VARIABLE)
        rollout, options = rollouts[0]
        metrics = fast.learner.learn(rollout, **options)
        assert_same_metrics(metrics, {name: history[0][name] for name in metrics}, precision)
    after = weights_of(plain.policy)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert_same_weights(weights_of(fast.policy), after, precision)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_reward_updates_are_the_same_without_the_fast_code(
    precision: str, make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model("llama").save_pretrained(tmp_path / "base")

    def run(name: str) -> tuple[dict[str, Tensor], dict[str, float]]:
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
        torch.nn.init.normal_(model.score.weight, std=0.2, generator=torch.Generator().manual_seed(0))
        model.config.architectures = [type(model).__name__]  # its head is kept
        config = RewardConfig(
            output_dir=str(tmp_path / name),
            precision=precision,
            learning_rate=LEARNING_RATE,
            per_device_train_batch_size=4,
            num_train_epochs=1,
            report_to="none",
            disable_tqdm=True,
        )
        result = train_reward_model(config, model, tokenizer, PAIRS, PAIRS)
        assert any(isinstance(layer, FastLinear) for layer in result.model.model.modules()) == (name == "fast")
        return weights_of(result.model.model), result.metrics

    weights, metrics = run("fast")
    monkeypatch.setenv(switch.PLAIN_VARIABLE, "1")
    plain_weights, plain_metrics = run("plain")
    assert_same_metrics(metrics, plain_metrics, precision)
    assert_same_weights(weights, plain_weights, precision)
    start = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
    assert not torch.equal(plain_weights["model.layers.0.mlp.up_proj.weight"], start.model.layers[0].mlp.up_proj.weight)


@pytest.fixture
def fresh_switch() -> Any:
    """Clears the cache of the check before and after a test."""
    switch.linear_operators_work.cache_clear()
    yield
    switch.linear_operators_work.cache_clear()


class _NoOperators:
    """torch.ops.mkldnn of a PyTorch without oneDNN's private operators."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"no operator {name}")


class _WrongOperators:
    """Operators of another release: the same names, other arguments and results."""

    def _reorder_linear_weight(self, weight: Tensor) -> Tensor:
        return weight

    def _linear_pointwise(self, inputs: Tensor, weight: Tensor, *_: Any) -> Tensor:
        return torch.zeros(len(inputs), len(weight))


@pytest.mark.parametrize("operators", [_NoOperators(), _WrongOperators()])
def test_missing_operators_leave_plain_layers(
    operators: Any,
    fresh_switch: None,
    make_model: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(torch.ops, "mkldnn", operators)
    plain, fast = make_model("llama"), make_model("llama")
    use_fast_kernels(fast)
    ids = torch.tensor([[3, 4, 5]])
    plain(input_ids=ids, labels=ids).loss.backward()
    with gradients_in_place(fast):
        fast(input_ids=ids, labels=ids).loss.backward()
    for mine, theirs in zip(fast.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-6, rtol=1e-5)
    with torch.no_grad(), packed_weights(fast):
        assert not any("forward" in vars(module) for module in fast.modules())
        assert torch.equal(fast(input_ids=ids).logits, plain(input_ids=ids).logits)
    assert len(caplog.records) == 1  # tried once


def test_parts_that_lack_their_private_functions_are_off(
    make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = torch.device("cpu")
    assert isinstance(fast_attention(torch.bfloat16, cpu), FastAttention)
    monkeypatch.delattr(torch, "_softmax_backward_data")
    assert not isinstance(fast_attention(torch.bfloat16, cpu), FastAttention)
    model = make_model("llama")
    use_fast_kernels(model)
    with gradients_in_place(model):
        assert any(getattr(module, "adds_gradients", False) for module in model.modules())
    monkeypatch.setattr(gradients, "has_gradients_in_place", lambda: False)  # as without Tensor.grad_dtype
    with gradients_in_place(model):
        assert not any(getattr(module, "adds_gradients", False) for module in model.modules())


def test_the_variable_turns_every_part_off(make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    fast = make_model("llama")
    use_fast_kernels(fast)
    monkeypatch.setenv(switch.PLAIN_VARIABLE, "1")
    model = make_model("gpt2")
    types = [type(module) for module in model.modules()]
    use_fast_kernels(model)
    assert [type(module) for module in model.modules()] == types
    assert not isinstance(fast_attention(torch.bfloat16, torch.device("cpu")), FastAttention)
    with packed_weights(fast):
        assert not any("forward" in vars(module) for module in fast.modules())
    with gradients_in_place(fast):
        assert not any(getattr(module, "adds_gradients", False) for module in fast.modules())
        assert not fast.get_input_embeddings()._forward_hooks
    assert switch.libc_function("malloc_trim") is None
    with kept_memory():
        release_freed_memory()
    monkeypatch.setenv(switch.PLAIN_VARIABLE, "0")
    assert not switch.is_plain()
