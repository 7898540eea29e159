"""`make kill`: training commands killed at random times, continued until their end, and compared with undisturbed runs.

Each chain is one command. It is killed at seeded shares of the time that the undisturbed run took here, and continued
after each kill. What it leaves at its end must be that of the undisturbed run to the last bit: weights, metrics and
samples, and the summary without times.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from deep_rlhf.runtime.signals import Stopped
from fuzz.case import Case
from fuzz.runner import Child, command, start, warm_up
from fuzz.world import DPO, LOOP, ONLINE, REWARD, SAVED, write_inputs

SECONDS = 240.0  # of one process
KILLS = 50
SIGTERM_SHARE = 0.25
ENDINGS = (
    0,
    130,
    -signal.SIGKILL,
    -signal.SIGTERM,
    128 + signal.SIGTERM,
)  # of a process that was killed, or not in time
TIMED = ("seconds", "runtime", "per_second", "share_of_time", "memory_gb", "created", "time")

LONG = ["--steps=32", "--save_freq=2", "--learning_rate=1e-3"]
STEPS = [*SAVED, "--max_steps=12", "--logging_steps=1", "--learning_rate=1e-3"]


def sft(folder: Path, resume: bool) -> None:
    """Supervised fine-tuning, which has no command."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from deep_rlhf.algorithms.supervised.sft import SFTConfig, train_sft

    pairs = [json.loads(line) for line in Path("pairs.jsonl").read_text().splitlines()]
    model, tokenizer = AutoModelForCausalLM.from_pretrained("policy"), AutoTokenizer.from_pretrained("policy")
    config = SFTConfig(
        output_dir=str(folder),
        max_steps=12,
        save_strategy="steps",
        save_steps=1,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        resume=resume,
    )
    try:
        train_sft(config, model, tokenizer, [("", pair["chosen"]) for pair in pairs])
    except Stopped as stop:
        sys.exit(128 + stop.number)  # as the commands do
    model.save_pretrained(folder / "model")


def of_command(*argv: str, again: Sequence[str] = ("--resume",)) -> Callable[[Path, bool], None]:
    """A run of a command; `again` are the flags with which it continues."""
    return lambda folder, resume: command([*argv, f"--output_dir={folder}", *(again if resume else ())])()


CHAINS: dict[str, Callable[[Path, bool], None]] = {
    "ppo, shared critic": of_command(*ONLINE["ppo"], *LONG, "--ppo_epochs=2", "--critic=shared"),
    "ppo, separate critic": of_command(*ONLINE["ppo"], *LONG, "--critic=separate", "--use_score_scaling=True"),
    "ppo, LoRA": of_command(*ONLINE["ppo"], *LONG, "--use_peft=True", "--lora_r=2"),
    "rloo": of_command(*ONLINE["rloo"], *LONG),
    "trpo": of_command(*ONLINE["trpo"], *LONG),
    "grpo": of_command(*ONLINE["grpo"], *LONG),
    "reinforce_plus_plus": of_command(*ONLINE["reinforce_plus_plus"], *LONG),
    "reward": of_command(*REWARD, *STEPS),
    "ensemble": of_command(*REWARD, *STEPS, "--ensemble_size=3"),
    "dpo": of_command(*DPO, *STEPS),
    "sft": sft,
    "loop": of_command(*LOOP, "--updates=6", "--labels=14", again=()),
}


@dataclass
class Chain:
    """A command that is killed some times, and what was different in the end."""

    name: str
    kills: int = 0
    signals: str = ""
    difference: str = ""


def search(root: Path, seed: int, kills: int, names: Sequence[str]) -> list[Chain]:
    """Runs all chains below `root` with so many kills together; returns them, each with what was different."""
    warm_up()
    assert _run(root, lambda: write_inputs(Path())).code == 0
    chains = [Chain(name, kills // len(names) + (i < kills % len(names))) for i, name in enumerate(names)]
    for chain in chains:
        rng = random.Random(f"{seed}:{chain.name}")
        whole, killed = root / chain.name / "whole", root / chain.name / "killed"
        started = time.monotonic()
        child = _run(root, partial(CHAINS[chain.name], whole, False))
        took = time.monotonic() - started
        if child.code != 0:
            chain.difference = f"the undisturbed run ended with {child.code}: {child.written[1].decode()[-1000:]}"
            continue
        chain.difference = _killed_run(root, chain, killed, rng, took) or difference(whole, killed)
        _tell(f"{chain.name}: {chain.kills} kills ({chain.signals}): {chain.difference or 'the same to the last bit'}")
    return chains


def _killed_run(root: Path, chain: Chain, folder: Path, rng: random.Random, took: float) -> str:
    """Kills and continues until all kills are done, then runs to the end; returns what went wrong."""
    resume = False
    for _ in range(chain.kills):
        which = signal.SIGTERM if rng.random() < SIGTERM_SHARE else signal.SIGKILL
        delay = rng.uniform(0.05, 0.95) * took
        child = start(partial(CHAINS[chain.name], folder, resume), root, Case([], chain.name, seconds=SECONDS))
        while not child.poll():
            if time.monotonic() - child.started > delay:
                os.kill(child.pid, which)
                delay = SECONDS
            time.sleep(0.002)
        chain.signals += "T" if which == signal.SIGTERM else "K"
        if child.code not in ENDINGS or b"Traceback" in child.written[1]:
            return f"after {which.name} it ended with {child.code}: {child.written[1].decode()[-1500:]}"
        if not folder.exists():
            continue
        resume = True
    child = _run(root, partial(CHAINS[chain.name], folder, resume))
    return "" if child.code == 0 else f"it could not be continued ({child.code}): {child.written[1].decode()[-1500:]}"


def _run(root: Path, act: Callable[[], None]) -> Child:
    child = start(act, root, Case([], "", seconds=SECONDS))
    while not child.poll():
        time.sleep(0.002)
    return child


def difference(whole: Path, killed: Path) -> str:
    """The first file of the two runs that is not the same; times and memory may differ."""
    for path in sorted(whole.rglob("*")):
        name = path.relative_to(whole)
        if not path.is_file() or "checkpoints" in name.parts or path.suffix not in (".safetensors", ".jsonl", ".json"):
            continue
        other = killed / name
        if not other.is_file():
            return f"{name} is missing"
        if path.suffix == ".safetensors":
            if path.read_bytes() != other.read_bytes():
                return f"{name} has other weights"
        elif path.suffix == ".jsonl":
            mine, theirs = (
                [_timeless(json.loads(row)) for row in file.read_text().split("\n") if row] for file in (path, other)
            )
            if mine != theirs:
                row = next(
                    (i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b),
                    min(len(mine), len(theirs)),
                )
                return f"{name} differs from line {row + 1} on ({len(mine)} and {len(theirs)} lines)"
        elif _timeless(json.loads(path.read_text())) != _timeless(json.loads(other.read_text())):
            return f"{name} differs"
    return ""


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(item) for key, item in value.items() if not key.endswith(TIMED)}
    return [_timeless(item) for item in value] if isinstance(value, list) else value


def main() -> None:
    """Exits with code 1 if a chain ended otherwise than its undisturbed run."""
    parser = argparse.ArgumentParser(prog="make kill KILL=…", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kills", type=int, default=KILLS, help="in all chains together")
    parser.add_argument("--chains", default=";".join(CHAINS), help="with semicolons between them; default: all")
    parser.add_argument("--keep", action="store_true", help="keep the folders of all runs")
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="kill-")).resolve()
    try:
        compare(root / "runs", options.seed, options.kills, options.chains.split(";"))
    finally:
        if options.keep:
            sys.stdout.write(f"Kept: {root}\n")
        else:
            shutil.rmtree(root, ignore_errors=True)


def compare(root: Path, seed: int, kills: int, names: Sequence[str]) -> None:
    """Runs chains, says how each ended, and exits with code 1 if one ended otherwise than its undisturbed run."""
    root.mkdir()
    chains = search(root.resolve(), seed, kills, names)
    different = [chain for chain in chains if chain.difference]
    _tell(f"{sum(chain.kills for chain in chains)} kills; {len(different)} of {len(chains)} chains differ.")
    sys.exit(bool(different))


def _tell(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
