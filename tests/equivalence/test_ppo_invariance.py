"""PPO against a slow, plain reference, and against itself cut differently."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import plain_ppo
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, pipeline

from deep_rlhf import ConfigError, DataError, PPOConfig, PPOTrainer, RewardError
from deep_rlhf.algorithms.online.prompts import PromptBatches
from deep_rlhf.rollout import engine as engine_module
from deep_rlhf.rollout import passes as passes_module

PROMPTS = ["the cat sees", "red", "a very old dog finds the small house and not", "two fish", "moon or sun", "bad", "a"]
SMALL: dict[str, Any] = {
    "batch_size": 6,
    "steps": 12,
    "ppo_epochs": 2,
    "max_new_tokens": 8,
    "learning_rate": 3e-3,
    "temperature": 0.8,
}
EOS = 1
TIMES = {"tokens_per_second", "sampling_share_of_time", "memory_gb"}
METRICS = TIMES | {
    *("step", "kl_coef", "score_mean", "score_std", "score_member_std", "kl", "entropy", "value_mean"),
    *("shaped_score_mean", "bad_batches", "loss", "ratio", "optimizer_steps", "skipped_minibatches"),
    *("explained_variance", "response_tokens", "missing_eos", "sampler_logprob_gap", "policy_loss", "value_loss"),
    *("policy_clip_fraction", "value_clip_fraction", "approx_kl", "grad_norm", "learning_rate"),
}


def reward(prompts: list[str], responses: list[str]) -> list[float]:
    rows = [(prompt, response.split()) for prompt, response in zip(prompts, responses, strict=True)]
    return [sum(len(word) < 4 for word in words) / 4 + (words[:1] == prompt.split()[:1]) for prompt, words in rows]


@pytest.fixture
def make_trainer(make_model: Callable[..., Any], tokenizer: Any) -> Callable[..., PPOTrainer]:
    def make(kind: str = "gpt2", prompts: list[str] = PROMPTS, reward: Any = reward, **settings: Any) -> PPOTrainer:
        config = PPOConfig(**(SMALL | settings))
        return PPOTrainer(config, model=make_model(kind), tokenizer=tokenizer, prompts=prompts, reward=reward)

    return make


def assert_same_history(one: list[dict[str, float]], two: list[dict[str, float]], tolerance: float) -> None:
    assert len(one) == len(two) > 0
    for update, (a, b) in enumerate(zip(one, two, strict=True)):
        assert a.keys() == b.keys()
        for name in a.keys() - TIMES:
            assert a[name] == pytest.approx(b[name], abs=tolerance, rel=tolerance), f"update {update}: {name}"


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "t5"])
def test_the_forward_batch_size_changes_nothing(
    kind: str, make_trainer: Callable[..., PPOTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_trainer(kind).train()
    monkeypatch.setitem(passes_module.TOKENS, "cpu", (30, 30))
    monkeypatch.setattr(engine_module, "CPU_BYTES", 30_000)
    assert_same_history(whole, make_trainer(kind).train(), 1e-5)
    assert whole[1]["kl"] != 0


def test_the_seed_decides_everything(make_trainer: Callable[..., PPOTrainer]) -> None:
    first = make_trainer(use_peft=True, seed=3).train()
    torch.rand(5)  # the state of the global generator is not asked
    assert_same_history(first, make_trainer(use_peft=True, seed=3).train(), 0.0)
    assert first[0]["policy_loss"] != make_trainer(use_peft=True, seed=4).train()[0]["policy_loss"]


def reference_update(trainer: PPOTrainer, tokenizer: Any) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """The optimiser steps of one update, the trainer's and a plain loop's: losses, gradients and weights must agree."""
    config, learner = trainer.config, trainer.learner
    own = learner.critic.own_trunk
    first = copy.deepcopy(trainer._policy.model)
    with torch.no_grad():  # away from the reference and from values of 0, so that every term counts
        generator = torch.Generator().manual_seed(0)
        for parameter in learner.optimisation.parameters:
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    policy, head = copy.deepcopy(trainer._policy.model), copy.deepcopy(learner.critic.value_head)
    plain = plain_ppo.Models(policy, policy if own is None else copy.deepcopy(own.model), head)
    gradients = []
    follow = learner.optimisation.adam.step

    def step() -> None:
        gradients.append([None if p.grad is None else p.grad.clone() for p in learner.optimisation.parameters])
        follow()

    learner.optimisation.adam.step = step
    ours = trainer.train()[:1]

    rollout = trainer.last_rollout
    rows = [
        (rollout.prompt_ids[i][rollout.prompt_mask[i]].tolist(), rollout.response_ids[i][mask].tolist())
        for i, mask in enumerate(rollout.response_mask)
    ]
    assert {tokenizer.decode(prompt) for prompt, _ in rows} <= set(PROMPTS)
    assert len({len(prompt) for prompt, _ in rows}) > 1  # prompts are padded on the left
    assert rollout.finished.any()  # EOS is inside the mask, early …
    assert not rollout.finished.all()  # … and missing
    texts = [" ".join(w for w in tokenizer.convert_ids_to_tokens(ids) if "<" not in w) for _, ids in rows]
    scores = reward(rollout.prompts, texts)
    assert rollout.scores.tolist() == pytest.approx(scores)
    reference = plain_ppo.Models(first, first, head)
    of_rows = plain_ppo.experience(rows, scores, plain, reference, config, eos=EOS)
    parameters = plain.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, eps=1e-5, weight_decay=0.0)
    steps = []
    for gradient in gradients:
        optimizer.zero_grad()
        losses = plain_ppo.backward(plain, rows, of_rows, config)
        norm = math.sqrt(sum(float((p.grad.double() ** 2).sum()) for p in parameters if p.grad is not None))
        for parameter, expected in zip(parameters, gradient, strict=True):
            if parameter.grad is not None:
                parameter.grad *= min(1.0, (config.max_grad_norm or math.inf) / norm)
                torch.testing.assert_close(expected, parameter.grad, atol=1e-5, rtol=1e-5)
        optimizer.step()
        steps.append({**losses, "grad_norm": norm})
    for expected, actual in zip(parameters, learner.optimisation.parameters, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-3)
    return ours, steps


H24: dict[str, Any] = {  # Huang et al. 2024, and their learning rate made large, so that clipping takes effect
    **{"ppo_epochs": 4, "vf_coef": 0.1, "cliprange": 0.2, "cliprange_value": 0.2, "gamma": 1.0, "lam": 0.95},
    **{"adap_kl_ctrl": False, "init_kl_coef": 0.05, "temperature": 0.7, "missing_eos_penalty": 1.0},
    **{"missing_eos_mode": "replace", "lr_scheduler_type": "linear", "max_grad_norm": None, "critic": "separate"},
}
OTHERS = {"kl_penalty": "k3", "whiten_rewards": True, "gamma": 0.9, "lam": 0.8, "vf_coef": 0.7, "max_grad_norm": 0.3}


@pytest.mark.parametrize(
    ("settings", "clips"),
    [(H24 | {"learning_rate": 3e-6}, False), (H24 | {"learning_rate": 1.9e-2}, True), ({}, True), (OTHERS, True)],
    ids=["Huang et al. 2024", "the same in larger steps", "defaults", "everything else"],
)
def test_one_update_is_that_of_a_plain_reference(
    settings: dict[str, Any], clips: bool, make_trainer: Callable[..., PPOTrainer], tokenizer: Any
) -> None:
    """To 1e-5 in every loss and every gradient of every optimiser step."""
    shared = {"steps": 6, "ppo_epochs": 3, "learning_rate": 2e-2, "max_new_tokens": 12, "seed": 1, "temperature": 1.1}
    trainer = make_trainer(**(shared | settings))
    (metrics,), steps = reference_update(trainer, tokenizer)
    assert len(steps) == trainer.config.ppo_epochs
    for name in steps[0]:
        expected = sum(step[name] for step in steps) / len(steps)
        assert metrics[name] == pytest.approx(expected, abs=1e-5, rel=1e-5), name
    assert (metrics["policy_clip_fraction"] > 0) == clips
    assert (metrics["value_clip_fraction"] > 0) == clips


def test_only_adapters_and_value_head_train_and_the_reference_never_does(
    make_trainer: Callable[..., PPOTrainer],
) -> None:
    adapted, whole = make_trainer(use_peft=True), make_trainer()
    before = {name: p.clone() for name, p in adapted._policy.named_parameters()}
    critic = adapted.learner.critic
    assert not critic.value_head.weight.any()  # values start at exactly 0
    with whole._reference.model() as frozen:
        reference_before = {name: p.clone() for name, p in frozen.named_parameters()}
    policy_before = {name: p.clone() for name, p in whole._policy.named_parameters()}
    adapted.train()
    whole.train()
    changed = {name for name, p in adapted._policy.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "lora_" in name}
    assert critic.value_head.weight.any()
    with whole._reference.model() as frozen:
        assert all(torch.equal(p, reference_before[name]) for name, p in frozen.named_parameters())
    assert all(not torch.equal(p, policy_before[name]) for name, p in whole._policy.named_parameters())


def test_history_and_policy_are_plain(make_trainer: Callable[..., PPOTrainer], tokenizer: Any) -> None:
    trainer = make_trainer(steps=7, mini_batch_size=4, use_peft=True)
    seen: list[dict[str, float]] = []
    history = trainer.train(on_update=seen.append)
    assert history is trainer.history
    assert history == seen
    assert [metrics["step"] for metrics in history] == [1, 2]  # seven samples are two batches
    assert all(metrics.keys() == METRICS for metrics in history)
    assert all(isinstance(value, float) and math.isfinite(value) for metrics in history for value in metrics.values())
    assert all(metrics["sampler_logprob_gap"] < 1e-5 for metrics in history)
    assert isinstance(trainer.policy, PreTrainedModel)
    ids = tokenizer("the cat", return_tensors="pt").input_ids
    assert trainer.policy.generate(ids, max_new_tokens=3).shape[1] > 2


@pytest.mark.parametrize("settings", [{"use_peft": True}, {}], ids=["adapters", "whole"])
def test_saved_policy_opens_in_a_pipeline(
    settings: dict[str, Any], make_trainer: Callable[..., PPOTrainer], tmp_path: Path, tokenizer: Any
) -> None:
    trainer = make_trainer(**settings)
    trainer.train()
    trainer.save(tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    options = {"max_new_tokens": 4, "do_sample": False}
    generated = pipeline("text-generation", model=str(tmp_path))("the cat", return_tensors=True, **options)
    expected = trainer.policy.generate(**tokenizer("the cat", return_tensors="pt"), pad_token_id=0, **options)
    assert generated[0]["generated_token_ids"] == expected[0].tolist()


def test_a_half_precision_policy_is_saved_too(make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> None:
    model = make_model("gpt2").to(torch.bfloat16)
    trainer = PPOTrainer(PPOConfig(**SMALL), model=model, tokenizer=tokenizer, prompts=PROMPTS, reward=reward)
    trainer.train()
    trainer.save(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path).lm_head.weight, model.lm_head.weight)


def test_a_run_from_folders_is_the_run_from_objects(
    make_model: Callable[..., Any], make_trainer: Callable[..., PPOTrainer], tokenizer: Any, tmp_path: Path
) -> None:
    model = make_model("t5")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = PPOConfig(**SMALL, use_seq2seq=True, model_name=str(tmp_path))
    expected = make_trainer("t5").train()
    assert_same_history(PPOTrainer(config, prompts=PROMPTS, reward=reward).train(), expected, 1e-6)
    by_name = PPOTrainer(PPOConfig(**SMALL, use_seq2seq=True), model=str(tmp_path), prompts=PROMPTS, reward=reward)
    assert_same_history(by_name.train(), expected, 1e-6)


def test_unusable_prompts_are_counted(make_trainer: Callable[..., PPOTrainer]) -> None:
    trainer = make_trainer(prompts=["", "the cat", "red red red red red", "  "], max_prompt_length=4)
    assert trainer.prompts == ["the cat"]
    assert trainer.prompt_report.read == 4
    assert trainer.prompt_report.dropped == {"too long": 1, "empty": 2}
    with pytest.raises(DataError, match=r"\b1 prompts.*\b1 have more than 4 tokens"):
        make_trainer(prompts=["red red red red red"], max_prompt_length=4)
    with pytest.raises(DataError, match=r"\b0 prompts"):
        make_trainer(prompts=[])


def test_prompts_must_leave_room_for_the_response(make_trainer: Callable[..., PPOTrainer]) -> None:
    trainer = make_trainer(prompts=["red " * 56, "red " * 57])  # 64 positions, 8 of them for the response
    assert trainer.prompt_report.dropped == {"too long": 1}
    assert len(make_trainer(prompts=["red " * 56], steps=6).train()) == 1
    with pytest.raises(ConfigError, match=r"max_new_tokens=64.* no room"):
        make_trainer(max_new_tokens=64)


def test_every_pass_over_the_prompts_is_a_new_permutation() -> None:
    batches = PromptBatches(PROMPTS, seed=3, batch_size=6, samples_per_prompt=1)
    asked = [prompt for update in range(7) for prompt in batches.of_update(update)]
    passes = [asked[start : start + len(PROMPTS)] for start in range(0, len(asked), len(PROMPTS))]
    assert all(sorted(each) == sorted(PROMPTS) for each in passes)
    assert len({tuple(each) for each in passes}) > 1


@pytest.mark.parametrize(
    ("returned", "sentence"),
    [
        ([1.0], "returned 1 rewards for"),
        (3.0, "must return one number per response, but it returned a float"),
        (["good"] * 6, "instead of a number for sample 0"),
    ],
)
def test_a_bad_reward_function_is_a_users_mistake(
    returned: Any, sentence: str, make_trainer: Callable[..., PPOTrainer]
) -> None:
    def bad_reward(prompts: list[str], responses: list[str]) -> Any:
        return returned

    with pytest.raises(RewardError, match=sentence):
        make_trainer(reward=bad_reward).train()


def test_adaptive_coefficient_follows_the_kl(make_trainer: Callable[..., PPOTrainer]) -> None:
    adaptive = make_trainer(horizon=100, target=6.0, init_kl_coef=0.2).train()
    assert adaptive[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert adaptive[1]["kl_coef"] == pytest.approx(0.2 * (1 - 0.2 * 6 / 100))
    fixed = make_trainer(adap_kl_ctrl=False, init_kl_coef=0.3).train()
    assert [metrics["kl_coef"] for metrics in fixed] == [0.3, 0.3]
