"""PPO on tasks whose answer is known: it must find it, not merely move."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from deep_rlhf import PPOConfig, PPOTrainer

PROMPTS = ["the cat sees", "red", "a very old dog finds the small house and not", "two fish", "moon or sun", "bad", "a"]
TOKENS = 8


def colours(prompts: list[str], responses: list[str]) -> list[float]:
    """The share of the response's places that hold a colour: about 0.2 by chance, at most 1."""
    wanted = {"red", "green", "blue", "black", "white", "gold", "grey", "pink"}
    return [sum(word in wanted for word in response.split()) / TOKENS for response in responses]


def brevity(prompts: list[str], responses: list[str]) -> list[float]:
    """How much of the room an answer leaves unused: the policy must learn to end."""
    return [1 - len(response.split()) / TOKENS for response in responses]


@pytest.mark.parametrize(
    ("kind", "reward", "settings"),
    [
        ("gpt2", colours, {}),
        ("gpt2", brevity, {}),
        ("gpt2", colours, {"use_peft": True}),
        ("t5", colours, {"learning_rate": 1e-2}),
    ],
    ids=["gpt2 says colours", "gpt2 ends early", "adapters say colours", "t5 says colours"],
)
def test_a_planted_reward_is_found(
    kind: str, reward: Any, settings: dict[str, Any], make_model: Callable[..., Any], tokenizer: Any
) -> None:
    config = PPOConfig(
        **({"learning_rate": 3e-3} | settings),
        batch_size=32,
        steps=32 * 16,
        ppo_epochs=4,
        max_new_tokens=TOKENS,
        init_kl_coef=0.01,
        adap_kl_ctrl=False,
        seed=1,
    )
    trainer = PPOTrainer(config, model=make_model(kind), tokenizer=tokenizer, prompts=PROMPTS, reward=reward)
    history = trainer.train()
    assert history[0]["score_mean"] < 0.3
    assert sum(metrics["score_mean"] for metrics in history[-3:]) / 3 > 0.65
    assert history[-1]["kl"] > 1
    assert history[-1]["entropy"] < history[0]["entropy"]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_bandit_converges_to_the_known_optimum(
    temperature: float, make_model: Callable[..., Any], make_tokenizer: Callable[..., Any]
) -> None:
    """With one token per response the optimum is π* ∝ π₀ exp(r/β), enumerated here over the whole vocabulary."""
    words = ["w" + letter for letter in "abcdefghijklm"]
    tokenizer = make_tokenizer(words)
    values = {word: 0.15 * i - 0.9 for i, word in enumerate(words)}  # special tokens read as "" and earn 0
    coefficient, updates, learning_rate = 0.5, 30, 4e-3

    def reward(prompts: list[str], responses: list[str]) -> list[float]:
        return [values.get(response.strip(), 0.0) for response in responses]

    config = PPOConfig(
        batch_size=256,
        steps=256 * updates,
        ppo_epochs=2,
        max_new_tokens=1,
        learning_rate=learning_rate,
        temperature=temperature,
        init_kl_coef=coefficient,
        adap_kl_ctrl=False,
        seed=2,
    )
    model = make_model("gpt2", spread=0.3, n_layer=1, vocab_size=16)
    trainer = PPOTrainer(config, model=model, tokenizer=tokenizer, prompts=["wa"], reward=reward)

    @torch.no_grad()
    def log_distribution() -> Tensor:
        logits = model(**tokenizer("wa", return_tensors="pt")).logits[0, -1]
        return (logits.double() / temperature).log_softmax(0)

    rewards = torch.tensor([values.get(tokenizer.convert_ids_to_tokens(token), 0.0) for token in range(16)]).double()
    optimum = (log_distribution() + rewards / coefficient).log_softmax(0)

    def distance() -> float:
        log_policy = log_distribution()
        return float((log_policy.exp() * (log_policy - optimum)).sum())

    def decay(metrics: dict[str, float]) -> None:  # whitened advantages never shrink, so the steps must
        trainer.optimizer.param_groups[0]["lr"] = learning_rate * (1 - metrics["step"] / updates)

    assert distance() > 0.3
    trainer.train(on_update=decay)
    assert distance() < 0.005
