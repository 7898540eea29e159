"""A few PPO runs whose metrics must not depend on who computes what: `two_processes.py MODELS OUTPUT`.

MODELS holds a folder for each model that `RUNS` names; the histories go to OUTPUT as JSON, written by the main process.
"""

import json
import sys
from pathlib import Path
from typing import Any

from deep_rlhf import PPOConfig, PPOTrainer, UserError

PROMPTS = ["the cat sees", "red", "a very old dog finds the small house and not", "two fish", "moon or sun", "bad", "a"]
RUNS: dict[str, dict[str, Any]] = {
    "even": {"model_name": "gpt2", "batch_size": 6, "mini_batch_size": 4},
    # five samples for two processes, and a last minibatch of one: a process without work
    "uneven, adapters": {"model_name": "gpt2", "batch_size": 5, "mini_batch_size": 2, "use_peft": True},
    "uneven, encoder-decoder": {"model_name": "bart", "batch_size": 5, "mini_batch_size": 3, "use_seq2seq": True},
}


def reward(prompts: list[str], responses: list[str]) -> list[float]:
    """How many words of the response are short, and whether the first one stands in the prompt."""
    rows = [(prompt, response.split()) for prompt, response in zip(prompts, responses, strict=True)]
    return [sum(len(word) < 4 for word in words) / 4 + (words[:1] == prompt.split()[:1]) for prompt, words in rows]


def history(models: Path, name: str) -> list[dict[str, float]]:
    settings = RUNS[name]
    folder = str(models / settings["model_name"])
    config = PPOConfig(
        **(settings | {"model_name": folder}),
        steps=2 * settings["batch_size"],
        ppo_epochs=2,
        max_new_tokens=8,
        learning_rate=3e-3,
        temperature=0.8,
        seed=5,
    )
    return PPOTrainer(config, prompts=PROMPTS, reward=reward).train()


if __name__ == "__main__":
    from accelerate import PartialState

    try:
        PPOTrainer(PPOConfig(model_name=f"{sys.argv[1]}/gpt2", batch_size=1), prompts=PROMPTS, reward=reward)
    except UserError as error:
        refusal = str(error)
    histories = {name: history(Path(sys.argv[1]), name) for name in RUNS}
    if PartialState().is_main_process:
        found = {"processes": PartialState().num_processes, "histories": histories, "refusal": refusal}
        Path(sys.argv[2]).write_text(json.dumps(found))
