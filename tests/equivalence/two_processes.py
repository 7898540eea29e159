"""A few runs whose metrics must not depend on who computes what: `two_processes.py MODELS OUTPUT`.

MODELS holds a folder for each model that `RUNS` names; the histories go to OUTPUT as JSON, written by the main process.
"""

import json
import sys
from pathlib import Path
from typing import Any

from deep_rlhf import PPOConfig, PPOTrainer, UserError
from deep_rlhf.cli.commands import ALGORITHMS
from deep_rlhf.cli.online import algorithm
from deep_rlhf.runtime.processes import leave_processes

PROMPTS = ["the cat sees", "red", "a very old dog finds the small house and not", "two fish", "moon or sun", "bad", "a"]
RUNS: dict[str, dict[str, Any]] = {
    "even": {"model_name": "gpt2", "batch_size": 6, "mini_batch_size": 4},
    # five samples for two processes, and a last minibatch of one: a process without work
    "uneven, adapters": {"model_name": "gpt2", "batch_size": 5, "mini_batch_size": 2, "use_peft": True},
    "uneven, encoder-decoder": {"model_name": "bart", "batch_size": 5, "mini_batch_size": 3, "use_seq2seq": True},
    "every statistic": {
        **{"model_name": "gpt2", "batch_size": 5, "critic": "separate", "kl_penalty": "full", "whiten_rewards": True},
        **{"use_score_scaling": True, "use_score_norm": True, "missing_eos_penalty": 1.0, "entropy_coef": 0.01},
    },
    "trpo": {"model_name": "gpt2", "batch_size": 5, "cg_iterations": 2, "cg_damping": 1.0},
    "rloo": {"model_name": "gpt2", "batch_size": 6, "group_size": 3},
    "grpo": {"model_name": "gpt2", "batch_size": 6, "group_size": 3},
    "reinforce_plus_plus": {"model_name": "gpt2", "batch_size": 5},
}


def reward(prompts: list[str], responses: list[str]) -> list[float]:
    """How many words of the response are short, and whether the first one stands in the prompt."""
    rows = [(prompt, response.split()) for prompt, response in zip(prompts, responses, strict=True)]
    return [sum(len(word) < 4 for word in words) / 4 + (words[:1] == prompt.split()[:1]) for prompt, words in rows]


def history(models: Path, name: str) -> list[dict[str, float]]:
    settings = RUNS[name]
    folder = str(models / settings["model_name"])
    config_class, trainer_class = algorithm(name if name in ALGORITHMS else "ppo")
    own = {"ppo_epochs": 2} if config_class is PPOConfig else {}
    config = config_class(
        **(own | settings | {"model_name": folder}),
        steps=2 * settings["batch_size"],
        max_new_tokens=8,
        learning_rate=3e-3,
        temperature=0.8,
        seed=5,
    )
    return trainer_class(config, prompts=PROMPTS, reward=reward).train()


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
    leave_processes()
