"""Each option of PPO against a plain computation of what it should do, or against the run that it must equal."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from facts import assert_names
from grids import slow_but
from torch import Tensor
from transformers import GPT2Config, GPT2ForSequenceClassification

from deep_rlhf import ConfigError, PPOConfig, PPOTrainer, RewardModel
from deep_rlhf.errors import RewardError
from deep_rlhf.models.critic import make_critic
from deep_rlhf.models.function_scorer import FunctionScorer
from deep_rlhf.types import Experience

PROMPTS = ["the cat sees", "red", "a very old dog finds the small house and not", "two fish", "moon or sun", "bad", "a"]
SMALL: dict[str, Any] = {
    **{"batch_size": 6, "steps": 12, "ppo_epochs": 2, "max_new_tokens": 8, "learning_rate": 3e-3},
    **{"adap_kl_ctrl": False, "init_kl_coef": 0.1, "temperature": 0.9},
}
NOT_THE_RESULT = {"tokens_per_second", "sampling_share_of_time", "memory_gb"}
Make = Callable[..., PPOTrainer]


def reward(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    return [len(response) / 10 + (response[:1] < "f") for response in responses]


class Members:
    """An ensemble of three that disagree more about longer responses."""

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        lengths = torch.tensor([float(len(response)) for response in responses])
        return torch.stack([lengths, 2 * lengths, 6 * lengths], 1)


@pytest.fixture
def make_trainer(make_model: Callable[..., Any], tokenizer: Any) -> Make:
    def make(kind: str = "gpt2", reward: Any = reward, **settings: Any) -> PPOTrainer:
        config = PPOConfig(**(SMALL | settings))
        return PPOTrainer(config, model=make_model(kind), tokenizer=tokenizer, prompts=PROMPTS, reward=reward)

    return make


def shaken(trainer: PPOTrainer) -> PPOTrainer:
    """Away from the reference and from values of 0."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.learner.optimisation.parameters:
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=generator))
    return trainer


def collected(trainer: PPOTrainer) -> tuple[PPOTrainer, Experience]:
    rollout = trainer.collect_rollout(0)
    return trainer, trainer.learner.experience(rollout, trainer.kl_coef)


def assert_same_run(one: PPOTrainer, two: PPOTrainer, *, but: Sequence[str] = ()) -> None:
    for a, b in zip(one.train(), two.train(), strict=True):
        for name in a.keys() - NOT_THE_RESULT - set(but):
            assert a[name] == pytest.approx(b[name], abs=1e-5, rel=1e-5), name


@pytest.mark.parametrize("kind", slow_but(["gpt2"], ["gpt2", "t5"]))
@pytest.mark.parametrize(
    ("settings", "same_as"),
    [
        ({"forward_batch_size": 1}, {}),
        ({"gradient_checkpointing": True}, {}),
        ({"gradient_checkpointing": True, "critic": "separate"}, {"critic": "separate"}),
        ({"mini_batch_size": 1, "gradient_accumulation_steps": 3}, {"mini_batch_size": 3}),
        ({"kl_penalty": "k1"}, {"kl_penalty": "kl"}),
        ({"kl_penalty": "k2"}, {"kl_penalty": "mse"}),
        ({"importance_cap": 2.0}, {}),  # sampler and trainer agree here
        ({"early_stopping": True, "target_kl": 1e6}, {}),
        ({"max_grad_norm": None}, {"max_grad_norm": 1e9}),
    ],
    ids=lambda settings: "-".join(settings) or "defaults",
)
def test_options_that_must_not_change_the_result(
    kind: str, settings: dict[str, Any], same_as: dict[str, Any], make_trainer: Make
) -> None:
    assert_same_run(make_trainer(kind, **settings), make_trainer(kind, **same_as))


def test_checkpointed_activations_are_really_computed_twice(make_trainer: Make) -> None:
    counts = []
    for checkpointing in (False, True):
        trainer, experience = collected(make_trainer(gradient_checkpointing=checkpointing))
        block, calls = trainer._policy.trunk.h[0], []
        block.mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        trainer.learner.optimisation.backward(
            experience,
            torch.arange(6),
            lambda part: trainer.learner._losses(part, 0.1),  # noqa: B023
        )
        counts.append(len(calls))
    assert counts[1] == 2 * counts[0] > 0


def test_the_full_kl_is_that_of_the_whole_distributions(make_trainer: Make) -> None:
    trainer, experience = collected(shaken(make_trainer(kl_penalty="full")))
    part = (experience.prompt_ids, experience.prompt_mask, experience.response_ids, experience.response_mask)
    with torch.no_grad(), trainer._reference.model() as frozen:
        ours, theirs = (
            (policy.head(policy.states(*part)) / 0.9).log_softmax(-1) for policy in (trainer._policy, frozen)
        )
    expected = torch.where(experience.response_mask, (ours.exp() * (ours - theirs)).sum(-1), 0.0)
    torch.testing.assert_close(experience.kl, expected, atol=1e-5, rtol=1e-4)
    assert experience.kl[experience.response_mask].min() > 0
    sampled = collected(shaken(make_trainer(kl_penalty="kl")))[1].kl
    assert sampled.min() < 0
    assert not torch.allclose(sampled, expected, atol=1e-2)


def gradients(make_trainer: Make, kl_coef: float = 0.1, **settings: Any) -> tuple[dict[str, float], Tensor, Experience]:
    """The loss and gradient of the first minibatch, from one shaken policy, and the experience."""
    trainer, experience = collected(shaken(make_trainer(**settings)))
    learner = trainer.learner
    old = experience.logprobs + 0.3 * torch.sin(
        torch.arange(experience.logprobs.numel()).reshape_as(experience.logprobs)
    )
    experience = dataclasses.replace(experience, logprobs=old)  # as if the policy had moved since
    metrics = learner.optimisation.backward(experience, torch.arange(6), lambda part: learner._losses(part, kl_coef))
    flat = [p.grad.flatten() for p in trainer._policy.trainable_parameters() if p.grad is not None]
    return metrics, torch.cat(flat), experience


def test_the_kl_in_the_loss_is_not_in_the_reward(make_trainer: Make) -> None:
    settings = {"kl_in_loss": True, "kl_penalty": "k3"}
    with_kl, gradient, experience = gradients(make_trainer, **settings)
    without, gradient_without, _ = gradients(make_trainer, kl_coef=0.0, **settings)
    torch.testing.assert_close(experience.rewards.abs().sum(1), experience.shaped_scores.abs())  # the score alone
    trainer, _ = collected(shaken(make_trainer()))
    part = (experience.prompt_ids, experience.prompt_mask, experience.response_ids, experience.response_mask)
    logprobs = trainer._policy.logprobs(trainer._policy.states(*part), *part[2:], 0.9)
    gap = (logprobs - experience.ref_logprobs)[experience.response_mask]
    penalty = 0.1 * (torch.exp(-gap) - 1 + gap).mean()
    penalty.backward()
    expected = torch.cat([p.grad.flatten() for p in trainer._policy.trainable_parameters()])
    assert with_kl["loss"] - without["loss"] == pytest.approx(penalty.item(), abs=1e-5)
    torch.testing.assert_close(gradient - gradient_without, expected, atol=1e-5, rtol=1e-3)
    assert penalty > 1e-3


def test_the_entropy_bonus_is_part_of_the_loss(make_trainer: Make) -> None:
    without, gradient, experience = gradients(make_trainer)
    with_bonus, bonus_gradient, _ = gradients(make_trainer, entropy_coef=0.5)
    trainer, _ = collected(shaken(make_trainer()))
    part = (experience.prompt_ids, experience.prompt_mask, experience.response_ids, experience.response_mask)
    logs = (trainer._policy.head(trainer._policy.states(*part))[experience.response_mask] / 0.9).log_softmax(-1)
    entropy = -(logs.exp() * logs).sum(-1).mean()
    (-0.5 * entropy).backward()
    expected = torch.cat([p.grad.flatten() for p in trainer._policy.trainable_parameters()])
    assert with_bonus["loss"] == pytest.approx(without["loss"] - 0.5 * entropy.item(), abs=1e-5)
    torch.testing.assert_close(bonus_gradient - gradient, expected, atol=1e-5, rtol=1e-3)


def test_dual_clip_bounds_the_loss_of_bad_tokens(make_trainer: Make) -> None:
    plain, _, experience = gradients(make_trainer, cliprange=0.1)
    clipped, _, _ = gradients(make_trainer, cliprange=0.1, dual_clip=1.2)
    assert clipped["policy_loss"] < plain["policy_loss"]
    assert clipped["policy_clip_fraction"] > plain["policy_clip_fraction"]
    assert experience.advantages.min() < 0


def test_importance_weights_correct_for_a_sampler_unlike_the_trainer(make_trainer: Make) -> None:
    """Per token, the loss is weighted by min(π_trainer / π_sampler, cap)."""
    trainer, experience = collected(shaken(make_trainer(importance_cap=1.5)))
    other = experience.sampler_logprobs - torch.linspace(-1, 1, experience.sampler_logprobs.shape[1])
    experience = dataclasses.replace(experience, sampler_logprobs=other)
    _, reported = trainer.learner._losses(experience, 0.0)
    plain, without = collected(shaken(make_trainer()))
    _, expected = plain.learner._losses(without, 0.0)
    mask = experience.response_mask
    weights = (experience.logprobs - other).exp().clamp(max=1.5)
    torch.testing.assert_close(reported["policy_loss"][mask], (weights * expected["policy_loss"])[mask])
    assert weights[mask].max() == 1.5
    assert weights[mask].min() < 0.6


def test_early_stopping_ends_the_passes_once_the_policy_has_moved(make_trainer: Make) -> None:
    settings = {"learning_rate": 0.1, "ppo_epochs": 6, "mini_batch_size": 3, "ratio_threshold": 1e9, "steps": 6}
    (without,) = make_trainer(**settings).train()
    (stopped,) = make_trainer(**settings, early_stopping=True, target_kl=0.05).train()
    assert without["optimizer_steps"] == 12
    assert stopped["optimizer_steps"] in (2, 4)  # whole passes
    assert stopped["approx_kl"] > 0


def test_a_minibatch_whose_ratio_is_too_large_is_left_out(make_trainer: Make) -> None:
    settings = {"learning_rate": 0.3, "ppo_epochs": 4, "mini_batch_size": 3, "steps": 6, "max_grad_norm": None}
    (metrics,) = make_trainer(**settings, ratio_threshold=1.2).train()
    assert metrics["skipped_minibatches"] > 0
    assert metrics["optimizer_steps"] + metrics["skipped_minibatches"] == 8
    assert metrics["ratio"] <= 1.2


def test_early_stopping_sees_the_kl_of_minibatches_that_are_left_out(make_trainer: Make) -> None:
    settings = {"learning_rate": 0.3, "ppo_epochs": 6, "steps": 6, "max_grad_norm": None, "ratio_threshold": 1.01}
    (without,) = make_trainer(**settings).train()
    assert (without["optimizer_steps"], without["skipped_minibatches"]) == (1, 5)
    assert without["approx_kl"] < 1e-6  # the mean over the steps, here the first alone
    (stopped,) = make_trainer(**settings, early_stopping=True, target_kl=0.01).train()
    assert (stopped["optimizer_steps"], stopped["skipped_minibatches"]) == (1, 1)


def test_scores_are_scaled_by_all_scores_so_far(make_trainer: Make) -> None:
    trainer = make_trainer(use_score_scaling=True, use_score_norm=True, score_clip=1.0)
    seen: list[float] = []
    for update in range(2):
        rollout = trainer.collect_rollout(update)
        seen += rollout.scores.tolist()
        everything = torch.tensor(seen, dtype=torch.float64)
        expected = ((rollout.scores - everything.mean()) / everything.std()).clamp(-1, 1)
        torch.testing.assert_close(rollout.shaped_scores.double(), expected.double(), atol=1e-5, rtol=1e-4)
    scaled = make_trainer(use_score_scaling=True)
    first = scaled.collect_rollout(0)
    torch.testing.assert_close(first.shaped_scores, first.scores / first.scores.std(), atol=1e-5, rtol=1e-4)
    clipped = make_trainer(score_clip=0.7)
    rollout = clipped.collect_rollout(0)
    assert rollout.shaped_scores.tolist() == pytest.approx(rollout.scores.clamp(max=0.7).tolist())


@pytest.mark.parametrize("mode", ["replace", "subtract"])
def test_a_response_without_eos_is_penalised(mode: str, make_trainer: Make) -> None:
    trainer = make_trainer(missing_eos_penalty=2.0, missing_eos_mode=mode, max_new_tokens=12, temperature=1.5)
    rollout = trainer.collect_rollout(0)
    assert 0 < rollout.finished.sum() < 6
    punished = {"replace": torch.full((6,), -2.0), "subtract": rollout.scores - 2.0}[mode]
    torch.testing.assert_close(rollout.shaped_scores, torch.where(rollout.finished, rollout.scores, punished))


@pytest.mark.parametrize(
    ("settings", "of_length"),
    [
        ({}, 3.0),
        ({"ensemble_reward": "min"}, 1.0),
        ({"ensemble_reward": "uncertainty", "ensemble_std_coef": 0.5}, 3 - 0.5 * math.sqrt(7)),
    ],
)
def test_an_ensembles_rewards_are_combined_as_configured(
    settings: dict[str, Any], of_length: float, make_trainer: Make
) -> None:
    trainer = make_trainer(reward=Members(), **settings)
    rollout = trainer.collect_rollout(0)
    lengths = torch.tensor([float(len(response)) for response in rollout.responses])
    torch.testing.assert_close(rollout.shaped_scores, of_length * lengths)
    torch.testing.assert_close(rollout.scores, 3 * lengths)


def test_an_ensembles_rule_needs_an_ensemble(make_trainer: Make) -> None:
    with pytest.raises(ConfigError, match=r"ensemble_reward=min.*ensemble"):
        make_trainer(ensemble_reward="min").train()


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_while_the_critic_warms_up_the_policy_stays(critic: str, make_trainer: Make) -> None:
    trainer = make_trainer(critic=critic, critic_warmup_updates=1)
    before = [p.clone() for p in trainer._policy.parameters()]
    trainer.train(updates=1)
    assert all(torch.equal(p, b) for p, b in zip(trainer._policy.parameters(), before, strict=True))
    assert trainer.learner.critic.value_head.weight.any()
    trainer.train()
    assert not any(torch.equal(p, b) for p, b in zip(trainer._policy.parameters(), before, strict=True))
    with pytest.raises(ConfigError, match=r"critic_warmup_updates=2\b.*\b2 updates"):
        make_trainer(critic_warmup_updates=2)


def test_a_separate_critic_learns_on_its_own_trunk(make_trainer: Make) -> None:
    trainer = make_trainer(critic="separate", vf_coef=1.0)
    own = trainer.learner.critic.own_trunk
    before = [p.clone() for p in own.parameters()]
    assert all(torch.equal(p, q) for p, q in zip(own.parameters(), trainer._policy.parameters(), strict=True))
    trainer.train()
    assert not any(torch.equal(p, b) for p, b in zip(own.parameters(), before, strict=True))
    assert not any(torch.equal(p, q) for p, q in zip(own.parameters(), trainer._policy.parameters(), strict=True))


@pytest.fixture
def reward_model(tokenizer: Any) -> RewardModel:
    """A decoder with two heads, each with its own scale."""
    torch.manual_seed(3)
    config = GPT2Config(vocab_size=43, n_embd=32, n_layer=2, n_head=4, n_positions=64, num_labels=2, pad_token_id=0)
    model = GPT2ForSequenceClassification(config)
    torch.nn.init.normal_(model.score.weight)
    mean, std = torch.tensor([0.3, -0.2]), torch.tensor([2.0, 0.5])
    return RewardModel(model, tokenizer, template=None, max_length=64, mean=mean, std=std)


def test_a_critic_made_from_the_reward_model_begins_with_its_scores(
    make_trainer: Make, reward_model: RewardModel, tokenizer: Any
) -> None:
    trainer = make_trainer(critic="reward", reward=reward_model)
    rollout = trainer.collect_rollout(0)
    ids = torch.where(rollout.response_mask, rollout.response_ids, 0)
    for row in range(6):
        for t in range(int(rollout.response_mask[row].sum())):
            text = [*rollout.prompt_ids[row][rollout.prompt_mask[row]].tolist(), *ids[row, :t].tolist()]
            raw = reward_model.model(input_ids=torch.tensor([text])).logits[0]
            expected = ((raw - reward_model.mean) / reward_model.std).mean().item()
            assert rollout.values[row, t].item() == pytest.approx(expected, abs=1e-4)
    before = [p.clone() for p in reward_model.model.parameters()]
    trainer.train()
    assert all(torch.equal(p, b) for p, b in zip(reward_model.model.parameters(), before, strict=True))


@pytest.mark.parametrize("settings", [{}, {"critic": "reward"}, {"frozen_precision": "bf16"}])
def test_the_callers_reward_model_stays_as_it_was(
    settings: dict[str, Any], make_trainer: Make, reward_model: RewardModel
) -> None:
    def state() -> dict[str, Any]:
        parameters = {name: (p.dtype, p.requires_grad, p.grad) for name, p in reward_model.model.named_parameters()}
        fields = {name: value for name, value in vars(reward_model).items() if name not in ("mean", "std", "model")}
        return {"parameters": parameters, "fields": fields, "training": reward_model.model.training}

    before, weights = state(), {name: w.clone() for name, w in reward_model.model.state_dict().items()}
    make_trainer(reward=reward_model, reward_timeout=7.0, steps=6, **settings).train()
    assert state() == before
    assert all(torch.equal(weights[name], weight) for name, weight in reward_model.model.state_dict().items())


def test_the_callers_scorer_keeps_its_time_limit(make_trainer: Make) -> None:
    scorer = FunctionScorer(reward, "reward", timeout=5.0)
    trainer = make_trainer(reward=scorer, reward_timeout=600.0, steps=6)
    trainer.train()
    assert (scorer.timeout, trainer.scorer.timeout) == (5.0, 5.0)
    assert make_trainer(reward_timeout=7.0, steps=6).scorer.timeout == 7.0


@pytest.mark.parametrize(
    "returned", [torch.zeros(6), torch.zeros(1, 6), torch.zeros(6, 0), [0.0] * 6, None, torch.zeros(6, 1) * 1j]
)
def test_a_scorer_that_returns_no_score_per_response(returned: Any, make_trainer: Make) -> None:
    class Broken:
        def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Any:
            return returned

    with pytest.raises(RewardError) as caught:
        make_trainer(reward=Broken()).train()
    assert_names(caught.value, "Broken.score", "[6, K]")


@pytest.mark.parametrize("not_a_reward", [Members, 5, None, lambda prompts: []])
def test_what_is_no_reward_is_refused_before_training(not_a_reward: Any, make_trainer: Make) -> None:
    with pytest.raises(RewardError):
        make_trainer(reward=not_a_reward)


def test_a_reward_model_that_cannot_be_a_critic_is_refused(
    make_trainer: Make, reward_model: RewardModel, make_tokenizer: Callable[..., Any]
) -> None:
    with pytest.raises(ConfigError, match=r"critic=reward .*function"):
        make_trainer(critic="reward")
    with pytest.raises(ConfigError, match=r"critic=reward .*decoder as policy"):
        make_trainer("t5", critic="reward", reward=reward_model)
    trainer = make_trainer()
    reward_model.tokenizer = make_tokenizer(["another", "vocabulary"])
    with pytest.raises(ConfigError, match="the policy's tokenizer"):
        make_critic("reward", trainer._policy, reward_model, trainer.tokenizer)
