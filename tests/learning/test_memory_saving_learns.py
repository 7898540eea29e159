"""PPO with less memory finds the planted reward, too."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from deep_rlhf import PPOConfig, PPOTrainer

PROMPTS = ["the cat sees", "red", "a very old dog finds the small house and not", "two fish", "moon or sun", "bad", "a"]
COLOURS = {"red", "green", "blue", "black", "white", "gold", "grey", "pink"}
TOKENS = 8

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")


def colours(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """The share of the response's places that hold a colour: about 0.2 by chance, at most 1."""
    return [sum(word in COLOURS for word in response.split()) / TOKENS for response in responses]


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "adamw_8bit"},
        pytest.param({"optimizer": "adamw_8bit", "precision": "bf16"}, marks=pytest.mark.slow),
        pytest.param({"load_in_4bit": True, "use_peft": True}, marks=pytest.mark.slow),
        {"load_in_4bit": True, "use_peft": True, "optimizer": "adamw_8bit", "precision": "bf16"},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_the_planted_reward_is_found(
    settings: dict[str, Any], make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    make_model("gpt2").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = PPOConfig(
        **settings,
        model_name=str(tmp_path),
        learning_rate=3e-3,
        batch_size=32,
        steps=32 * 16,
        max_new_tokens=TOKENS,
        init_kl_coef=0.01,
        adap_kl_ctrl=False,
        seed=1,
    )
    history = PPOTrainer(config, prompts=PROMPTS, reward=colours).train()
    assert history[0]["score_mean"] < 0.3
    assert sum(metrics["score_mean"] for metrics in history[-3:]) / 3 > 0.65
    assert history[-1]["kl"] > 1
