"""One update of RLOO, GRPO and REINFORCE++ against a slow, plain reference: one response and one token at a time."""

import copy
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
import torch
from torch import Tensor

from deep_rlhf import ConfigError
from deep_rlhf.algorithms.grpo import GRPOConfig, GRPOTrainer
from deep_rlhf.algorithms.online.trainer import OnlineTrainer
from deep_rlhf.algorithms.reinforce_plus_plus import ReinforcePlusPlusConfig, ReinforcePlusPlusTrainer
from deep_rlhf.algorithms.rloo import RLOOConfig, RLOOTrainer
from deep_rlhf.rollout import passes as passes_module

PROMPTS = ["the cat sees", "red", "a very old dog finds the small house and not"]
SMALL: dict[str, Any] = {
    "batch_size": 9,
    "steps": 9,
    "max_new_tokens": 8,
    "learning_rate": 2e-2,
    "temperature": 0.8,
    "init_kl_coef": 0.3,
}
KINDS: dict[str, tuple[Any, Any]] = {
    "rloo": (RLOOConfig, RLOOTrainer),
    "grpo": (GRPOConfig, GRPOTrainer),
    "reinforce++": (ReinforcePlusPlusConfig, ReinforcePlusPlusTrainer),
}
METRICS = {
    *("step", "kl_coef", "score_mean", "score_std", "score_member_std", "shaped_score_mean", "kl", "entropy"),
    *("response_tokens", "missing_eos", "sampler_logprob_gap", "bad_batches", "tokens_per_second"),
    *("sampling_share_of_time", "memory_gb", "learning_rate", "optimizer_steps", "loss", "grad_norm"),
    *("policy_clip_fraction", "approx_kl", "ratio"),
}


def reward(prompts: list[str], responses: list[str]) -> list[float]:
    rows = [(prompt, response.split()) for prompt, response in zip(prompts, responses, strict=True)]
    return [sum(len(word) < 4 for word in words) / 4 + (words[:1] == prompt.split()[:1]) for prompt, words in rows]


@pytest.fixture
def make_trainer(make_model: Callable[..., Any], tokenizer: Any) -> Callable[..., OnlineTrainer]:
    def make(kind: str, reward: Any = reward, **settings: Any) -> OnlineTrainer:
        config_class, trainer_class = KINDS[kind]
        groups = {} if kind == "reinforce++" else {"group_size": 3}
        config = config_class(**(SMALL | groups | settings))
        model = make_model("gpt2")
        return trainer_class(config, model=model, tokenizer=tokenizer, prompts=PROMPTS, reward=reward)

    return make


def plain_logprobs(model: Any, prompt: list[int], response: list[int]) -> Tensor:
    """[R], at the temperature of `SMALL`."""
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    log_distribution = (logits / SMALL["temperature"]).log_softmax(-1)
    return torch.stack([log_distribution[t, token] for t, token in enumerate(response)])


def plain_advantages(kind: str, costs: list[list[float]], scores: list[float], config: Any) -> list[list[float]]:
    """Of every token of every response, from the KL of each token and the score of each response."""
    beta = 0.0 if config.kl_in_loss else config.init_kl_coef
    if kind == "reinforce++":
        returns: list[list[float]] = []
        for cost, score in zip(costs, scores, strict=True):
            rewards = [-beta * c for c in cost]
            rewards[-1] += score
            ahead = [sum(config.gamma ** (s - t) * rewards[s] for s in range(t, len(cost))) for t in range(len(cost))]
            returns.append(ahead)
        everything = [value for row in returns for value in row]
        mean, spread = fmean(everything), math.sqrt(stdev(everything) ** 2 + 1e-8)
        return [[(value - mean) / spread for value in row] for row in returns]
    totals = [score - beta * sum(cost) for cost, score in zip(costs, scores, strict=True)]
    advantages = []
    for i, total in enumerate(totals):
        first = i - i % config.group_size
        group = totals[first : first + config.group_size]
        if kind == "rloo":
            advantage = total - fmean(other for j, other in enumerate(group) if first + j != i)
        else:
            advantage = (total - fmean(group)) / (stdev(group) + 1e-4 if config.scale_rewards else 1.0)
        advantages.append([advantage] * len(costs[i]))
    return advantages


def plain_loss(
    kind: str, rows: list[Any], policy: Any, old: list[Tensor], ref: list[Tensor], advantages: Any, config: Any
) -> Tensor:
    """The loss of the whole batch, with gradient."""

    def surrogate(change: Tensor, advantage: float) -> Tensor:
        ratio = change.exp()
        return -min(ratio * advantage, ratio.clamp(1 - config.cliprange, 1 + config.cliprange) * advantage)

    per_response: list[list[Tensor]] = []
    for row, old_logprobs, ref_logprobs, advantage in zip(rows, old, ref, advantages, strict=True):
        logprobs = plain_logprobs(policy, *row)
        if kind == "rloo":
            per_response.append([surrogate(logprobs.sum() - old_logprobs.sum(), advantage[0])])
            continue
        losses = [surrogate(logprobs[t] - old_logprobs[t], advantage[t]) for t in range(len(logprobs))]
        if config.kl_in_loss:
            gaps = ref_logprobs - logprobs
            losses = [loss + config.init_kl_coef * (gaps[t].exp() - 1 - gaps[t]) for t, loss in enumerate(losses)]
        per_response.append(losses)
    if kind == "grpo" and config.loss_reduction == "sequence":
        return sum(sum(losses) / len(losses) for losses in per_response) / len(per_response)
    return sum(sum(losses) for losses in per_response) / sum(len(losses) for losses in per_response)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("rloo", {}),
        ("rloo", {"ppo_epochs": 3, "cliprange": 0.3}),
        ("grpo", {}),
        ("grpo", {"ppo_epochs": 3, "loss_reduction": "token", "scale_rewards": False}),
        ("grpo", {"ppo_epochs": 2, "kl_in_loss": False, "kl_penalty": "kl", "max_grad_norm": 0.3}),
        ("reinforce++", {}),
        ("reinforce++", {"ppo_epochs": 3, "gamma": 0.9}),
    ],
)
def test_one_update_is_that_of_a_plain_reference(
    kind: str, settings: dict[str, Any], make_trainer: Callable[..., OnlineTrainer]
) -> None:
    trainer = make_trainer(kind, **settings)
    config: Any = trainer.config
    ours = trainer._policy.model
    reference = copy.deepcopy(ours)
    with torch.no_grad():  # away from the reference, so that the KL counts
        generator = torch.Generator().manual_seed(0)
        for parameter in ours.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    policy = copy.deepcopy(ours)
    metrics = trainer.train()[0]

    rollout = trainer.last_rollout
    assert rollout is not None
    rows = [
        (rollout.prompt_ids[i][rollout.prompt_mask[i]].tolist(), rollout.response_ids[i][mask].tolist())
        for i, mask in enumerate(rollout.response_mask)
    ]
    if kind != "reinforce++":
        assert rollout.prompts == [prompt for prompt in rollout.prompts[::3] for _ in range(3)]
        assert sorted(rollout.prompts[::3]) == sorted(PROMPTS)
    assert len({len(response) for _, response in rows}) > 1
    scores = reward(rollout.prompts, rollout.responses)
    with torch.no_grad():
        old = [plain_logprobs(policy, *row) for row in rows]
        ref = [plain_logprobs(reference, *row) for row in rows]
    costs = [(a - b).tolist() for a, b in zip(old, ref, strict=True)]
    advantages = plain_advantages(kind, costs, scores, config)
    parameters = list(policy.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, eps=1e-5, weight_decay=0.0)
    steps = []
    for _ in range(config.ppo_epochs):
        optimizer.zero_grad()
        loss = plain_loss(kind, rows, policy, old, ref, advantages, config)
        loss.backward()
        norm = math.sqrt(sum(float((p.grad.double() ** 2).sum()) for p in parameters))
        for parameter in parameters:
            parameter.grad *= min(1.0, config.max_grad_norm / norm)
        optimizer.step()
        steps.append((loss.item(), norm))
    assert metrics.keys() == METRICS
    assert metrics["optimizer_steps"] == config.ppo_epochs
    assert metrics["loss"] == pytest.approx(fmean(loss for loss, _ in steps), abs=1e-5)
    assert metrics["grad_norm"] == pytest.approx(fmean(norm for _, norm in steps), rel=1e-4)
    assert (metrics["policy_clip_fraction"] > 0) == (config.ppo_epochs > 1)
    for (name, expected), actual in zip(policy.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-3, msg=lambda text, n=name: f"{n}: {text}")


def test_one_rloo_step_is_plain_reinforce(make_trainer: Callable[..., OnlineTrainer]) -> None:
    """The gradient of −(R − mean of the other two) log π(y), without any ratio."""
    trainer = make_trainer("rloo", max_grad_norm=None)
    policy = copy.deepcopy(trainer._policy.model)  # still the reference, so the KL is 0
    norm = trainer.train()[0]["grad_norm"]
    rollout = trainer.last_rollout
    assert rollout is not None
    total = torch.zeros(())
    for i, score in enumerate(rollout.scores):
        prompt = rollout.prompt_ids[i][rollout.prompt_mask[i]].tolist()
        logprob = plain_logprobs(policy, prompt, rollout.response_ids[i][rollout.response_mask[i]].tolist()).sum()
        others = [j for j in range(i - i % 3, i - i % 3 + 3) if j != i]
        total = total - (score - rollout.scores[others].mean()) * logprob / 9
    total.backward()
    assert norm == pytest.approx(math.sqrt(sum(float((p.grad**2).sum()) for p in policy.parameters())), rel=1e-4)


class Rounding:
    """A sampler whose log-probabilities are rounded otherwise than the trainer's: half a nat on each response."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler

    def sample(self, *inputs: Any) -> Any:
        sampled = self.sampler.sample(*inputs)
        wrong = torch.where(torch.arange(len(sampled.logprobs)) % 2 == 0, 0.5, -0.5).unsqueeze(1)
        lengths = sampled.response_mask.sum(1, keepdim=True)
        return dataclasses.replace(sampled, logprobs=sampled.logprobs + sampled.response_mask * wrong / lengths)


@pytest.mark.parametrize("settings", [{}, {"ppo_epochs": 2}, {"mini_batch_size": 3}])
def test_the_samplers_rounding_clips_no_response_of_rloo(
    settings: dict[str, Any], make_trainer: Callable[..., OnlineTrainer]
) -> None:
    settings = settings | {"init_kl_coef": 0.0, "learning_rate": 1e-4}
    exact, rounded = make_trainer("rloo", **settings), make_trainer("rloo", **settings)
    rounded.sampler = Rounding(rounded.sampler)  # type: ignore[assignment]
    (expected,), (metrics,) = exact.train(), rounded.train()
    assert metrics["sampler_logprob_gap"] > 0.05
    assert metrics["policy_clip_fraction"] == expected["policy_clip_fraction"]
    assert metrics["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    assert exact.last_rollout is not None
    assert rounded.last_rollout is not None
    is_sampled = torch.equal(rounded.last_rollout.logprobs, rounded.last_rollout.sampler_logprobs)
    assert is_sampled == exact.config.has_one_step  # type: ignore[attr-defined]
    if not is_sampled:
        torch.testing.assert_close(rounded.last_rollout.logprobs, exact.last_rollout.logprobs)


@pytest.mark.parametrize("kind", KINDS)
def test_the_forward_batch_size_changes_nothing(
    kind: str, make_trainer: Callable[..., OnlineTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"ppo_epochs": 2, "mini_batch_size": 5}
    whole = make_trainer(kind, **settings).train()[0]
    monkeypatch.setitem(passes_module.TOKENS, "cpu", (30, 30))
    cut = make_trainer(kind, **settings).train()[0]
    assert whole["optimizer_steps"] == 4
    for name in ("loss", "grad_norm", "policy_clip_fraction", "approx_kl", "ratio"):
        assert cut[name] == pytest.approx(whole[name], abs=1e-5, rel=1e-5), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_run_goes_on_as_if_it_never_stopped(
    kind: str, make_trainer: Callable[..., OnlineTrainer], tmp_path: Path
) -> None:
    settings = {"steps": 27, "ppo_epochs": 2, "lr_scheduler_type": "linear"}
    whole = make_trainer(kind, **settings, output_dir=str(tmp_path / "whole"))
    whole.train()
    stopped = make_trainer(kind, **settings, output_dir=str(tmp_path / "stopped"))
    stopped.train(updates=1)
    stopped.checkpoint()
    resumed = make_trainer(kind, **settings, output_dir=str(tmp_path / "stopped"), resume=True)
    history = resumed.train()
    assert [metrics["loss"] for metrics in history] == [metrics["loss"] for metrics in whole.history]
    for expected, actual in zip(whole._policy.parameters(), resumed._policy.parameters(), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_an_infinite_gradient_never_reaches_the_weights(kind: str, make_trainer: Callable[..., OnlineTrainer]) -> None:
    def huge(prompts: list[str], responses: list[str]) -> list[float]:
        return [(-1.0) ** i * 3e38 for i in range(len(responses))]

    trainer = make_trainer(kind, reward=huge, steps=18)
    before = [parameter.clone() for parameter in trainer._policy.parameters()]
    assert trainer.train(updates=1)[0]["bad_batches"] == 1
    assert all(torch.equal(*pair) for pair in zip(before, trainer._policy.parameters(), strict=True))


@pytest.mark.parametrize(
    ("config_class", "settings", "sentence"),
    [
        (RLOOConfig, {"group_size": 1}, "group_size must be at least 2, not 1."),
        (GRPOConfig, {"group_size": 0}, "group_size must be at least 2, not 0."),
        (RLOOConfig, {"batch_size": 10}, "batch_size=10 is not a multiple of the 4 responses per prompt"),
        (GRPOConfig, {"batch_size": 8, "mini_batch_size": 9}, "mini_batch_size=9 is more than the batch_size=8"),
        (GRPOConfig, {"ppo_epochs": 0}, "ppo_epochs must be at least 1, not 0."),
        (GRPOConfig, {"cliprange": 0}, "cliprange must be greater than 0, not 0."),
        (GRPOConfig, {"loss_reduction": "mean"}, "loss_reduction must be one of sequence, token, not mean."),
        (GRPOConfig, {"kl_penalty": "kl"}, "kl_in_loss needs kl_penalty=mse or k3"),
        (RLOOConfig, {"kl_in_loss": True, "kl_penalty": "k3"}, "kl_in_loss is for PPO and GRPO"),
        (ReinforcePlusPlusConfig, {"kl_in_loss": True, "kl_penalty": "k3"}, "kl_in_loss is for PPO and GRPO"),
        (ReinforcePlusPlusConfig, {"gamma": 1.1}, "gamma must be at least 0 and at most 1, not 1.1."),
    ],
)
def test_a_setting_that_cannot_work_is_refused(config_class: Any, settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        config_class(**settings)
