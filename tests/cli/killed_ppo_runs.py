"""Runs of PPO and its relatives, and what stops each of them: `stopped_runs` runs them."""

import itertools
import math
import os
import random
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stopped_runs import Run, at_update, flip_bit, interrupt, kill, limit_files, terminate

from deep_rlhf.algorithms.online.trainer import OnlineTrainer
from deep_rlhf.runtime import checkpoint

# 8 updates of four optimiser steps, but for those with a group of 4 and TRPO
COMMON = [
    *("--model_name=policy", "--query_dataset=prompts.jsonl", "--reward_model=python:killed_ppo_runs:noisy"),
    *("--max_new_tokens=4", "--batch_size=8", "--steps=64", "--save_freq=2", "--learning_rate=1e-3"),
]
SCALED = ["--lr_scheduler_type=linear", "--use_score_scaling=True", "--use_score_norm=True"]
ADAPTIVE = ["--adap_kl_ctrl=True", "--target=0.5", "--horizon=50"]
MINIBATCHES = ["--ppo_epochs=2", "--mini_batch_size=4"]
BEST = ['--push_to_hub_if_best_kwargs={"repo_id": "me/tuned"}']  # is saved in best/; the Hub is not asked offline
PPO = ["ppo", *COMMON, *SCALED, *ADAPTIVE, *MINIBATCHES, *BEST]
LORA = ["ppo", *COMMON, *ADAPTIVE, *MINIBATCHES, "--use_peft=True", "--lora_r=2", "--critic=separate", "--steps=48"]
RLOO = ["rloo", *COMMON, *SCALED, *ADAPTIVE, "--group_size=4", "--ppo_epochs=2", "--steps=48"]
TRPO = ["trpo", *COMMON, *SCALED, "--max_kl=1e-3", "--steps=32"]

BAD = "moon house"  # the first prompt of a batch that earns no number
calls = itertools.count(1)  # of the reward function in this process
during: dict[int, Callable[[], Any]] = {}  # what happens in which of them


def noisy(prompts: list[str], responses: list[str]) -> list[float]:
    """Rewards long words, and draws from every generator that a checkpoint has to keep."""
    during.get(next(calls), lambda: None)()
    rewards = [len(text) / 10 + random.random() + np.random.rand() + float(torch.rand(())) for text in responses]
    return [math.nan, *rewards[1:]] if prompts[0] == BAD else rewards


def interrupt_twice() -> None:
    """The second Ctrl-C as soon as the first was seen; then the reward never comes."""
    before = signal.getsignal(signal.SIGINT)
    interrupt()
    while signal.getsignal(signal.SIGINT) is before:
        pass
    interrupt()
    threading.Event().wait()


def hang_from(call: int) -> None:
    """No reward comes any more, however often it is asked for."""
    during.update(dict.fromkeys(range(call, call + 20), threading.Event().wait))


def scoring(call: int, act: Callable[[], Any]) -> Callable[[], None]:
    """`act` while the rewards of the `call`-th batch are computed."""
    return lambda: during.update({call: act})


def half_written(save: int) -> None:
    """The process dies when half of the tensors of the `save`-th checkpoint are on the disk."""
    original, saves = checkpoint.save_file, itertools.count(1)

    def torn(tensors: Any, path: Path) -> None:
        original(tensors, path)
        if next(saves) == save:
            os.truncate(path, path.stat().st_size // 2)
            kill()

    checkpoint.save_file = torn


def before_rename(save: int) -> None:
    """… when the `save`-th checkpoint is whole, but for its name."""
    original, renames = os.rename, itertools.count(1)

    def stopped(source: Any, target: Any) -> None:
        if Path(target).name.startswith("step-") and next(renames) == save:
            kill()
        original(source, target)

    os.rename = stopped


def no_final_model() -> None:
    """… when the training is done."""
    original = OnlineTrainer.save
    OnlineTrainer.save = lambda self, folder: kill() if folder.name == "model" else original(self, folder)


def tear(folder: Path) -> None:
    """Cuts the tensors of the newest checkpoint."""
    newest = max((folder / "checkpoints").glob("step-*"), key=lambda path: int(path.name.split("-")[1]))
    os.truncate(newest / "state.safetensors", 1000)


def change_tree(folder: Path) -> None:
    """A bit of state.json of the newest checkpoint changes, and the log is cut."""
    flip_bit(folder / "checkpoints" / "step-6" / "state.json", -200)
    os.truncate(folder / "metrics.jsonl", 100)
    (folder / "samples.jsonl").unlink()


def change_history(folder: Path) -> None:
    """A bit of what the newest checkpoint added to the history changes."""
    flip_bit(folder / "checkpoints" / "history.jsonl", -100)


RUNS = {
    "first update": Run(PPO, lambda: at_update(3)),
    "scoring": Run(PPO, scoring(6, kill)),
    "update": Run(PPO, lambda: at_update(26)),  # the fourth batch is bad, so this is in update 8
    "file": Run(PPO, lambda: half_written(2)),
    "rename": Run(PPO, lambda: before_rename(2)),
    "torn": Run(PPO, scoring(7, kill), before_resume=tear),
    "changed tree": Run(PPO, scoring(7, kill), before_resume=change_tree),
    "changed history": Run(PPO, scoring(7, kill), before_resume=change_history),
    "disk full": Run(PPO, lambda: limit_files(18, 50_000), ending=2),
    "hang": Run(PPO, lambda: hang_from(4), ending=2, flags=("--reward_timeout=2",)),
    "exit": Run(PPO, scoring(5, lambda: os._exit(0)), ending=0),
    "interrupt": Run(PPO, scoring(5, interrupt), ending=130),
    "terminate": Run(PPO, scoring(5, terminate), ending=143),
    "interrupt twice": Run(PPO, scoring(5, interrupt_twice), ending=130),
    "ending": Run(PPO, no_final_model),
    "lora": Run(LORA, lambda: at_update(14)),
    "rloo": Run(RLOO, lambda: at_update(10)),
    "trpo": Run(TRPO, scoring(4, kill)),
}


def whole(command: list[str]) -> str:
    """The name of the run of this command that nothing stops."""
    return f"whole {command[0]}{' lora' if command == LORA else ''}"


WHOLE = {whole(run.command): run.command for run in RUNS.values()}
