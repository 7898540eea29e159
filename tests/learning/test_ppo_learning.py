"""PPO on tasks whose answer is known: it must find it, not merely move."""

from collections.abc import Callable
from typing import Any

import optimum
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
    """How much of the room a response leaves unused: the policy must learn to end."""
    return [1 - len(response.split()) / TOKENS for response in responses]


@pytest.mark.parametrize(
    ("kind", "reward", "settings"),
    [
        ("gpt2", colours, {}),
        ("gpt2", colours, {"precision": "bf16"}),
        ("gpt2", brevity, {}),
        ("gpt2", colours, {"use_peft": True}),
        ("t5", colours, {"learning_rate": 1e-2}),
    ],
    ids=["gpt2 says colours", "in bf16", "gpt2 ends early", "adapters say colours", "t5 says colours"],
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


def test_the_optimum_at_another_temperature(make_model: Callable[..., Any], make_tokenizer: Callable[..., Any]) -> None:
    """The distribution that is sampled and trained, softmax(logits / T), goes to the optimum; T = 1 elsewhere."""
    temperature, beta = 0.7, 0.5
    tokenizer = make_tokenizer(optimum.WORDS)
    model = optimum.reference_model(make_model, "gpt2", 3)
    config = PPOConfig(
        batch_size=256,
        steps=256 * 20,
        ppo_epochs=2,
        max_new_tokens=1,
        learning_rate=2e-3,
        lr_scheduler_type="linear",
        lam=1.0,
        temperature=temperature,
        init_kl_coef=beta,
        adap_kl_ctrl=False,
        seed=3,
    )
    reward = optimum.reward_for(beta)
    trainer = PPOTrainer(config, model=model, tokenizer=tokenizer, prompts=[optimum.PROMPT], reward=reward)

    @torch.no_grad()
    def log_distribution() -> Tensor:
        logits = model(**tokenizer(optimum.PROMPT, return_tensors="pt")).logits[0, -1]
        return (logits.double() / temperature).log_softmax(0)

    rewards = torch.tensor(reward([""] * optimum.VOCABULARY, ["", "", "", *optimum.WORDS])).double()
    best = (log_distribution() + rewards / beta).log_softmax(0)

    def distance() -> float:
        log_policy = log_distribution()
        return float((log_policy.exp() * (log_policy - best)).sum())

    assert distance() > 4 * optimum.BOUNDS[1]
    trainer.train()
    assert distance() <= optimum.BOUNDS[1]
