"""One step of TRPO against a slow, dense reference, and what becomes of steps that must not be taken."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deep_rlhf.algorithms.trpo import TRPOConfig, TRPOTrainer
from deep_rlhf.errors import ConfigError, NotFiniteError
from deep_rlhf.types import Experience, Rollout

WORDS = ["one", "two", "three", "a", "cat", "seventeen"]
PROMPTS = ["a cat", "one", "two three a", "a"]
TINY = {
    "gpt2": {"n_embd": 4, "n_layer": 1, "n_head": 2, "n_positions": 12, "vocab_size": 9},
    "t5": {"d_model": 4, "d_kv": 2, "d_ff": 6, "num_layers": 1, "num_heads": 2, "vocab_size": 9},
}
SPEED_AND_MEMORY = {"tokens_per_second", "sampling_share_of_time", "memory_gb"}


def reward(prompts: list[str], responses: list[str]) -> list[float]:
    return [sum(len(word) for word in response.split()) / 10 for response in responses]


@pytest.fixture
def make_trainer(make_model: Callable[..., Any], make_tokenizer: Callable[..., Any]) -> Callable[..., TRPOTrainer]:
    def make(kind: str = "gpt2", **settings: Any) -> TRPOTrainer:
        common = {"batch_size": 6, "steps": 24, "max_new_tokens": 3, "temperature": 0.8, "learning_rate": 1e-2}
        config = TRPOConfig(**(common | {"init_kl_coef": 0.1, "seed": 3} | settings))
        model = make_model(kind, spread=0.5, **TINY[kind])
        return TRPOTrainer(config, model=model, tokenizer=make_tokenizer(WORDS), prompts=PROMPTS, reward=reward)

    return make


def rollout_of(trainer: TRPOTrainer) -> Rollout:
    return trainer.collect_rollout(0)


def weights(trainer: TRPOTrainer) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.learner.parameters]).clone()


def log_distributions(trainer: TRPOTrainer, rollout: Rollout) -> Tensor:
    """The log-distribution [T, V] before each response token, one response at a time by the model's own forward."""
    rows = []
    model, temperature = trainer._policy.model, trainer.config.temperature
    for i in range(len(rollout.prompts)):
        prompt = rollout.prompt_ids[i][rollout.prompt_mask[i]]
        response = rollout.response_ids[i][rollout.response_mask[i]]
        if trainer._policy.is_seq2seq:
            start = torch.tensor([model.config.decoder_start_token_id])
            logits = model(input_ids=prompt[None], decoder_input_ids=torch.cat([start, response[:-1]])[None]).logits[0]
        else:
            logits = model(input_ids=torch.cat([prompt, response[:-1]])[None]).logits[0, len(prompt) - 1 :]
        rows.append((logits / temperature).log_softmax(-1))
    return torch.cat(rows)


def gradient_of(value: Tensor, trainer: TRPOTrainer) -> Tensor:
    found = torch.autograd.grad(value, trainer.learner.parameters, retain_graph=True, materialize_grads=True)
    return torch.cat([part.flatten() for part in found])


def dense_fisher(trainer: TRPOTrainer, rollout: Rollout) -> Tensor:
    """E[∇log π ∇log πᵀ] over every token of the vocabulary, averaged over the states: the definition, [D, D]."""
    logprobs = log_distributions(trainer, rollout)
    fisher = torch.zeros(2 * (len(weights(trainer)),))
    for state in logprobs:
        scores = torch.stack([gradient_of(logprob, trainer) for logprob in state])
        fisher += scores.T @ (state.detach().exp().unsqueeze(1) * scores) / len(logprobs)
    return fisher


def dense_gradient(trainer: TRPOTrainer, experience: Experience) -> Tensor:
    """Of the mean over tokens of A log π, whose gradient is that of the surrogate at the old policy."""
    mask = experience.response_mask
    chosen = log_distributions(trainer, experience).gather(1, experience.response_ids[mask].unsqueeze(1)).squeeze(1)
    return gradient_of((chosen * experience.advantages[mask]).mean(), trainer)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("gpt2", {}),
        ("gpt2", {"forward_batch_size": 2}),
        ("gpt2", {"gradient_checkpointing": True}),
        ("gpt2", {"use_peft": True, "lora_r": 2}),
        ("t5", {}),
    ],
    ids=["gpt2", "several forward passes", "gradient checkpointing", "adapters", "t5"],
)
def test_fisher_products_are_those_of_the_dense_matrix(
    kind: str, settings: dict[str, Any], make_trainer: Callable[..., TRPOTrainer]
) -> None:
    trainer = make_trainer(kind, batch_size=3, **settings)
    if settings.get("use_peft"):  # peft's adapters start where half of their gradients are 0
        for parameter in trainer.learner.parameters:
            torch.nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(0))
    rollout = rollout_of(trainer)
    product = trainer.learner.fisher(trainer.learner.experience(rollout, 0.1))
    fisher = dense_fisher(trainer, rollout)
    vector = torch.randn(len(fisher), generator=torch.Generator().manual_seed(1))
    for _ in range(2):  # the second product may come from what the first one kept
        expected = fisher @ vector
        torch.testing.assert_close(product(vector), expected, atol=1e-4 * float(expected.abs().max()), rtol=1e-4)
        vector = expected


def test_a_whole_step_is_the_natural_gradient_at_the_bound(make_trainer: Callable[..., TRPOTrainer]) -> None:
    max_kl, damping = 1e-4, 0.02
    trainer = make_trainer(max_kl=max_kl, cg_damping=damping, cg_iterations=200)
    rollout = rollout_of(trainer)
    experience = trainer.learner.experience(rollout, 0.1)
    fisher = dense_fisher(trainer, rollout)
    damped = fisher + damping * torch.eye(len(fisher))
    natural = torch.linalg.solve(damped.double(), dense_gradient(trainer, experience).double())
    expected = (natural * (2 * max_kl / (natural @ damped.double() @ natural)).sqrt()).float()
    before, old = weights(trainer), log_distributions(trainer, rollout).detach()
    metrics = trainer.learner.learn(rollout, kl_coef=0.1, update=0)
    moved = weights(trainer) - before
    assert metrics["step_fraction"] == 1
    assert float((moved - expected).norm() / expected.norm()) < 1e-3
    new = log_distributions(trainer, rollout).detach()
    kl = float((old.exp() * (old - new)).sum(1).mean())
    assert metrics["approx_kl"] == pytest.approx(kl, rel=1e-2)
    undamped = float(natural @ fisher.double() @ natural / (natural @ damped.double() @ natural))
    assert kl == pytest.approx(undamped * max_kl, rel=0.05)  # the damping's share of the bound is not used
    assert undamped > 0.5
    chosen = experience.response_ids[experience.response_mask].unsqueeze(1)
    ratio = (new - old).gather(1, chosen).squeeze(1).exp()
    surrogate = float((ratio * experience.advantages[experience.response_mask]).mean())
    assert metrics["policy_loss"] == pytest.approx(-surrogate, abs=1e-5)
    assert surrogate > 0  # 0 at the old policy, since advantages are whitened


def test_a_step_that_is_too_long_is_halved(make_trainer: Callable[..., TRPOTrainer]) -> None:
    trainer = make_trainer(max_kl=100.0)
    metrics = trainer.learner.learn(rollout_of(trainer), kl_coef=0.1, update=0)
    assert metrics["step_fraction"] == 0.5
    assert 0 < metrics["approx_kl"] <= 100.0
    assert metrics["policy_loss"] < 0


def test_without_an_acceptable_step_the_old_weights_come_back(make_trainer: Callable[..., TRPOTrainer]) -> None:
    trainer = make_trainer(max_kl=1000.0, line_search_steps=1)
    rollout, before = rollout_of(trainer), weights(trainer)
    critic = [parameter.detach().clone() for parameter in trainer.learner.critic.trainable_parameters()]
    metrics = trainer.learner.learn(rollout, kl_coef=0.1, update=0)
    assert metrics["step_fraction"] == 0
    assert metrics["approx_kl"] == 0
    assert torch.equal(weights(trainer), before)
    changed = zip(trainer.learner.critic.trainable_parameters(), critic, strict=True)
    assert any(not torch.equal(new, old) for new, old in changed)  # which is why it must not share the policy's trunk
    assert metrics["value_loss"] > 0


def test_the_second_update_starts_from_the_first(make_trainer: Callable[..., TRPOTrainer]) -> None:
    """A rejected step must go back by one update, not to where the run began."""
    trainer = make_trainer(max_kl=0.01)
    trainer.train(updates=1)
    after_one = weights(trainer)
    trainer.learner.config = dataclasses.replace(trainer.config, max_kl=1000.0, line_search_steps=1)
    metrics = trainer.step(1)
    assert trainer.history[0]["step_fraction"] > 0
    assert metrics["step_fraction"] == 0
    assert torch.equal(weights(trainer), after_one)


def test_without_rewards_and_kl_the_weights_stay(make_trainer: Callable[..., TRPOTrainer]) -> None:
    trainer = make_trainer()
    rollout = rollout_of(trainer)
    flat = dataclasses.replace(rollout, shaped_scores=torch.zeros(6), kl=torch.zeros_like(rollout.kl))
    before = weights(trainer)
    assert trainer.learner.learn(flat, kl_coef=0.0, update=0)["step_fraction"] == 0
    assert torch.equal(weights(trainer), before)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["logprobs", "values"])
def test_values_that_are_not_finite_never_reach_the_weights(
    name: str, bad: float, make_trainer: Callable[..., TRPOTrainer]
) -> None:
    trainer = make_trainer()
    rollout = rollout_of(trainer)
    broken = getattr(rollout, name).clone()
    broken[0, 0] = -bad
    before = weights(trainer)
    with pytest.raises(NotFiniteError, match=r"gradient.* not finite"):
        trainer.learner.learn(dataclasses.replace(rollout, **{name: broken}), kl_coef=0.1, update=0)
    assert torch.equal(weights(trainer), before)


def test_the_trust_region_shrinks_with_the_learning_rate(make_trainer: Callable[..., TRPOTrainer]) -> None:
    history = make_trainer(max_kl=0.04, lr_scheduler_type="linear").train()
    assert [metrics["max_kl"] for metrics in history] == pytest.approx([0.04, 0.0225, 0.01, 0.0025])
    assert all(metrics["approx_kl"] <= metrics["max_kl"] for metrics in history)


def test_a_resumed_run_is_the_run_that_was_never_stopped(
    make_trainer: Callable[..., TRPOTrainer], tmp_path: Path
) -> None:
    settings = {"save_freq": 2, "lr_scheduler_type": "linear"}
    whole = make_trainer(**settings).train()
    make_trainer(output_dir=str(tmp_path), **settings).train(updates=2)
    resumed = make_trainer(output_dir=str(tmp_path), resume=True, **settings)
    assert len(resumed.history) == 2
    for one, other in zip(whole, resumed.train(), strict=True):
        assert one.keys() == other.keys()
        assert {name: one[name] for name in one.keys() - SPEED_AND_MEMORY} == {
            name: other[name] for name in one.keys() - SPEED_AND_MEMORY
        }


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"max_kl": 0.0}, "max_kl must be greater than 0"),
        ({"cg_iterations": 0}, "cg_iterations must be at least 1"),
        ({"cg_damping": -0.1}, "cg_damping must be at least 0"),
        ({"line_search_steps": 0}, "line_search_steps must be at least 1"),
        ({"value_epochs": 0}, "value_epochs must be at least 1"),
        ({"lam": 1.1}, "lam must be at least 0 and at most 1, not 1.1"),
        ({"gamma": -0.1}, "gamma must be at least 0 and at most 1"),
        ({"kl_in_loss": True, "kl_penalty": "k3"}, "kl_in_loss is for PPO and GRPO"),
    ],
)
def test_a_setting_that_cannot_work_is_one_sentence(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        TRPOConfig(**settings)
