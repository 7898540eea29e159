"""The valid input that cases are made from: tiny models, data, stores and runs, built by the commands themselves."""

import itertools
import json
import os
import random
from pathlib import Path

from fixtures import write_distilbert, write_gpt2, write_jsonl
from stopped_runs import at_update

from deep_rlhf.cli.main import run
from deep_rlhf.data.chat import HH
from deep_rlhf.data.synthetic import generate_prompts, sft_pairs
from deep_rlhf.feedback.records import Comparison
from deep_rlhf.feedback.store import Store

QUICK = ["--report_to=none", "--disable_tqdm=True", "--use_cpu=True", "--max_length=256", "--max_steps=2"]
SAVED = ["--save_strategy=steps", "--save_steps=1", "--eval_steps=1", "--load_best_model_at_end=False"]
PAIRS = ["--dataset_name=pairs.jsonl", "--per_device_train_batch_size=4", *QUICK]
REWARD = ["reward", "--model_name_or_path=encoder", *PAIRS]
DPO = ["dpo", "--model_name_or_path=policy", *PAIRS]
SMALL = ["--max_new_tokens=4", "--batch_size=4", "--steps=8", "--max_prompt_length=64"]
SAMPLING = ["--model_name=policy", "--query_dataset=prompts.jsonl", *SMALL]
FUNCTION = "--reward_model=python:rewards:length"
ONLINE = {
    "ppo": ["ppo", *SAMPLING, FUNCTION, "--mini_batch_size=2", "--ppo_epochs=1"],
    "trpo": ["trpo", *SAMPLING, FUNCTION],
    "rloo": ["rloo", *SAMPLING, FUNCTION, "--group_size=2", "--ppo_epochs=1"],
    "grpo": ["grpo", *SAMPLING, FUNCTION, "--group_size=2", "--ppo_epochs=1"],
    "reinforce_plus_plus": ["reinforce_plus_plus", *SAMPLING, FUNCTION, "--ppo_epochs=1"],
}
LOOP = [
    *("loop", "--model=policy", "--labeler=replay:votes.jsonl", "--template=plain", "--pace=0", "--threads=1"),
    *("--mode=batched", "--updates=2", "--batched_updates=1", "--initial_labels=6", "--labels=8", "--save_every=1"),
    *("--batch_size=4", "--mini_batch_size=4", "--max_new_tokens=4", "--max_prompt_length=64", "--members=2"),
    *("--held_out_members=0", "--fixed_prompts=1", "--reward_batch_size=4", "--samples_per_prompt=2"),
]
OUT = "--output_dir=out"
REWARDS = "def length(prompts, responses):\n    return [len(response) / 10 for response in responses]\n"


def write_inputs(folder: Path) -> None:
    """Models, tokenizers, data and a reward function."""
    write_gpt2(folder / "policy")
    write_distilbert(folder / "encoder")
    rng, responses = random.Random(0), sft_pairs(60, seed=1)
    pairs = [
        {
            "chosen": HH.prompt(prompt) + HH.response(response),
            "rejected": HH.prompt(prompt) + HH.response(rng.choice(responses)[1]),
        }
        for prompt, response in responses[:24]
    ]
    write_jsonl(folder / "pairs.jsonl", pairs)
    write_jsonl(folder / "prompts.jsonl", [{"prompt": prompt[:80]} for prompt in generate_prompts(1)[:12]])
    words = ["red", "green", "blue", "cat", "dog", "sun"]
    votes = [
        {
            **{"prompt": words[i % 6], "a": f"the {words[i // 6]}", "b": f"a very old {words[i % 5]} {i}"},
            "votes": [["ann", "a"], ["bob", "a"], ["eve", "b"]],
        }
        for i in range(30)
    ]
    (folder / "votes.jsonl").write_text("\n".join(map(json.dumps, votes)))
    (folder / "rewards.py").write_text(REWARDS)


def write_store(folder: Path) -> None:
    """Three labels, a ranking and a question that waits; and the same labels exported."""
    with Store(folder / "labels.db") as store:
        questions = [Comparison(prompt=f"p{i}", responses=("x", "y"), policy_version=i) for i in (1, 2, 10)]
        store.add([*questions, Comparison(prompt="ranking", responses=("x", "y", "z"))])
        for i, choice in enumerate(("a", "cant_tell", "b")):
            store.add_label(store.ask("anna")[0].id, "anna", token=str(i), choice=choice)  # type: ignore[arg-type]
        store.add_label(store.ask("bert")[0].id, "bert", token="ranking", ranks=[1, 2, 3])
        store.add([Comparison(prompt="waits", responses=("x", "y"))])
    for name in ("labels.jsonl", "labels.parquet"):
        run("store", ["export", "labels.db", name, "--all"])


def finished(command: list[str], name: str, *flags: str) -> None:
    """A run until its end, in the folder `name`."""
    run(command[0], [*command[1:], *flags, f"--output_dir={name}"])


def unfinished(command: list[str], name: str, update: int, *flags: str) -> None:
    """A run that is killed before its `update`-th optimiser step."""
    at_update(update)
    finished(command, name, *flags)


# Each is built in a process of its own, in the folder; those of the second list use what the first has built.
STEPS = [
    {"inputs": lambda: write_inputs(Path())},
    {
        "store": lambda: write_store(Path()),
        "reward model": lambda: finished(REWARD, "reward", *SAVED),
        "PPO": lambda: finished(ONLINE["ppo"], "ppo_run", "--save_freq=1"),
        "unfinished PPO": lambda: unfinished(ONLINE["ppo"], "ppo_part", 6, "--save_freq=1", "--steps=16"),
        "unfinished reward model": lambda: unfinished(REWARD, "reward_part", 4, *SAVED, "--max_steps=4"),
        "DPO": lambda: finished(DPO, "dpo_run"),
        "loop": lambda: finished(LOOP, "loop_run", "--updates=1"),
    },
]


def names() -> itertools.chain[str]:
    """What is built, for the progress."""
    return itertools.chain.from_iterable(STEPS)


def sizes(folder: Path) -> int:
    """Bytes below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not os.path.islink(path))
