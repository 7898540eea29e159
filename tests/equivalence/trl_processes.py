"""Steps of the TRL interface whose figures must not depend on the number of processes: `trl_processes.py MODEL OUTPUT`.

Eight queries and responses are shared out evenly; the figures go to OUTPUT as JSON, written by the main process.
"""

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import AutoTokenizer

from deep_rlhf.compat.trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from deep_rlhf.runtime.processes import leave_processes

QUERIES = [[5, 6, 7], [8], [9, 10, 11, 12], [13, 14], [15, 16], [17, 18, 19], [5], [6, 7]]
RESPONSES = [[20, 21, 1], [22, 23, 24, 25], [26, 1], [27], [28, 29, 30], [31, 32], [33, 1], [34, 35, 36]]
SCORES = [1.0, -0.5, 0.25, 2.0, 0.0, 1.5, -1.0, 0.5]


def figures(model: str) -> list[dict[str, float]]:
    accelerator = Accelerator()
    rank, processes = accelerator.process_index, accelerator.num_processes
    torch.manual_seed(rank)  # each process draws a head of its own; that of the first is trained
    wrapped = AutoModelForCausalLMWithValueHead.from_pretrained(model, v_head_init_strategy="normal")
    config = PPOConfig(
        batch_size=8 // processes, mini_batch_size=2 // processes, learning_rate=3e-3, use_score_scaling=True
    )
    trainer = PPOTrainer(config, wrapped, None, AutoTokenizer.from_pretrained(model))
    own = slice(rank * 8 // processes, (rank + 1) * 8 // processes)
    queries, responses, scores = ([torch.tensor(row) for row in rows[own]] for rows in (QUERIES, RESPONSES, SCORES))
    steps = [trainer.step(queries, responses, scores) for _ in range(3)]
    return [
        {name: value for name, value in stats.items() if isinstance(value, float) and not name.startswith("time/")}
        for stats in steps
    ]


if __name__ == "__main__":
    found = {"figures": figures(sys.argv[1]), "processes": Accelerator().num_processes}
    if Accelerator().is_main_process:
        Path(sys.argv[2]).write_text(json.dumps(found))
    leave_processes()
