"""Runs of PPO and its relatives that are killed for real and resumed, each in a process forked from this one.

`python killed_ppo_runs.py FOLDER` is to `killed_runs` what PPO is to the reward model: FOLDER/<name>/ is the output of
the run `name`, FOLDER/<name>.log what it said, FOLDER/<name>.endings how each of its processes ended, and
"FOLDER/<name>, stopped" what the first of them left.
"""

import gc
import itertools
import json
import math
import os
import random
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import killed_runs
import numpy as np
import torch
from killed_runs import at_update, kill, limited
from tqdm import tqdm

from deep_rlhf.algorithms.online.trainer import OnlineTrainer
from deep_rlhf.cli.main import run
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
RLOO = ["rloo", *COMMON, *SCALED, *ADAPTIVE, "--group_size=4", "--num_iterations=2", "--steps=48"]
TRPO = ["trpo", *COMMON, *SCALED, "--max_kl=1e-3", "--steps=32"]

BAD = "moon house"  # the first prompt of a batch that earns no number
calls = itertools.count(1)  # of the reward function in this process
during: dict[int, Callable[[], Any]] = {}  # what happens in which of them


def noisy(prompts: list[str], responses: list[str]) -> list[float]:
    """Rewards long words, and draws from every generator that a checkpoint has to keep."""
    during.get(next(calls), lambda: None)()
    rewards = [len(text) / 10 + random.random() + np.random.rand() + float(torch.rand(())) for text in responses]
    return [math.nan, *rewards[1:]] if prompts[0] == BAD else rewards


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


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


def updating(step: int, act: Callable[[], Any] = kill) -> Callable[[], None]:
    """`act` just before the `step`-th step of Adam."""
    return lambda: at_update(step, act)


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


class Run(NamedTuple):
    """A command, what stops it, how it ends then, what happens before it is resumed, and flags of the first try."""

    command: list[str]
    stop: Callable[[], Any]
    ending: int = -signal.SIGKILL
    before_resume: Callable[[Path], Any] = lambda folder: None
    flags: tuple[str, ...] = ()

    @property
    def whole(self) -> str:
        """The name of the run that nothing stopped."""
        return f"whole {self.command[0]}{' lora' if self.command == LORA else ''}"


RUNS = {
    "first update": Run(PPO, updating(3)),
    "scoring": Run(PPO, scoring(6, kill)),
    "update": Run(PPO, updating(26)),  # the fourth batch is bad, so this is in update 8
    "file": Run(PPO, lambda: half_written(2)),
    "rename": Run(PPO, lambda: before_rename(2)),
    "torn": Run(PPO, scoring(7, kill), before_resume=tear),
    "disk full": Run(PPO, lambda: limited(18, 50_000), ending=2),
    "hang": Run(PPO, lambda: hang_from(4), ending=2, flags=("--reward_timeout=0.5",)),
    "interrupt": Run(PPO, scoring(5, interrupt), ending=130),
    "interrupt twice": Run(PPO, scoring(5, interrupt_twice), ending=130),
    "ending": Run(PPO, no_final_model),
    "lora": Run(LORA, updating(14)),
    "rloo": Run(RLOO, updating(10)),
    "trpo": Run(TRPO, scoring(4, kill)),
}


def process(name: str, command: list[str], stop: Callable[[], Any] = lambda: None) -> int:
    """A command in a process of its own; how it ended."""

    def act() -> None:
        stop()
        run(command[0], [*command[1:], f"--output_dir={name}"])
        sys.exit(0)  # so that `killed_runs` goes no further

    return killed_runs.process(Path(f"{name}.log"), [], act)


def take(name: str, run_: Run) -> None:
    """The run `name`, stopped and resumed."""
    endings = [process(name, [*run_.command, *run_.flags], run_.stop)]
    shutil.copytree(name, f"{name}, stopped")
    run_.before_resume(Path(name))
    endings.append(process(name, [*run_.command, "--resume"]))
    Path(f"{name}.endings").write_text(json.dumps(endings))


def main(folder: Path) -> None:
    """Every run, two at a time."""
    sys.modules["killed_ppo_runs"] = sys.modules[__name__]  # the reward function is to be this module's
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell's background jobs ignore
    torch.set_num_threads(1)
    tqdm.monitor_interval = 0  # a thread, which no fork would have
    os.chdir(folder)
    # here, so that what it loads and compiles is inherited
    run(PPO[0], [*PPO[1:], "--steps=16", "--output_dir=warm"])
    during.clear()
    globals()["calls"] = itertools.count(1)
    gc.freeze()
    wholes = {run_.whole: run_.command for run_ in RUNS.values()}
    tasks = [lambda name=name, command=command: process(name, command) for name, command in wholes.items()]
    tasks += [lambda name=name, run_=run_: take(name, run_) for name, run_ in RUNS.items()]
    for number, task in enumerate(tasks):
        if number >= 2:
            os.wait()
        if os.fork() == 0:
            task()
            os._exit(0)
    os.wait(), os.wait()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
