"""Run folders and checkpoints that were damaged between a run and its continuation."""

import json
import os
import random
import shutil
from pathlib import Path

from safetensors import SafetensorError, safe_open

from fuzz.case import Case, Workshop
from fuzz.kinds.mutations import damage, damage_json
from fuzz.world import DPO, LOOP, ONLINE, REWARD, SAVED

PPO = [*ONLINE["ppo"], "--save_freq=1"]
COMMANDS = {
    "ppo_part": [*PPO, "--steps=16"],
    "ppo_run": PPO,
    "reward_part": [*REWARD, *SAVED, "--max_steps=4"],
    "reward": [*REWARD, *SAVED],
    "dpo_run": DPO,
    "loop_run": LOOP,
}


def make(shop: Workshop) -> Case:
    """A command that continues, repeats or replaces a run."""
    rng = shop.random
    shop.take("policy", "encoder", "pairs.jsonl", "prompts.jsonl", "rewards.py", "votes.jsonl")
    run = rng.choices([*COMMANDS], (5, 3, 5, 3, 1, 4))[0]
    shop.take(run)
    folder = shop.folder / run
    what = [break_one(rng, folder) for _ in range(rng.choice((1, 1, 1, 2)))]
    argv = [*COMMANDS[run], f"--output_dir={run}"]
    chance = rng.random()
    if run != "loop_run" and chance < 0.75:
        argv.append("--resume")
    if rng.random() < 0.1:
        flag = rng.choice(
            (
                "--seed=7",
                "--learning_rate=1e-4",
                "--resume=False",
                "--batch_size=8",
                "--save_freq=2",
                "--save_total_limit=1",
            )
        )
        what.append(flag)
        argv.append(flag)
    if rng.random() < 0.05:
        other = rng.choice((*ONLINE.values(), REWARD, DPO))
        argv = [*other, f"--output_dir={run}", "--resume"]
        what.append(f"another command: {other[0]}")
    return Case(
        argv,
        f"{run}: {', '.join(what)}; {' '.join(argv[-2:])}",
        (run,),
        check=lambda folder: whole(folder / run, argv[0]),
    )


def break_one(rng: random.Random, folder: Path) -> str:
    """Damages one thing in the folder of a run; returns what."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    checkpoints = [path for path in files if "checkpoints" in path.parts]
    how = rng.random()
    if not files:
        return "nothing is left"
    if how < 0.35 and checkpoints:
        path = rng.choice(checkpoints)
        if path.suffix == ".json" and rng.random() < 0.6:
            return f"{path.parent.name}/{damage_json(rng, path)}"
        return f"{path.parent.name}/{damage(rng, path)[0]}"
    if how < 0.45 and (folder / "checkpoints").is_dir():
        return break_folders(rng, folder / "checkpoints")
    if how < 0.6:
        path = folder / rng.choice(
            ("metrics.jsonl", "samples.jsonl", "summary.json", "report.html", "config.yaml", "model", "checkpoints")
        )
        if path.is_dir():
            shutil.rmtree(path)
        if not path.exists() or rng.random() < 0.3:
            path.unlink(missing_ok=True)
            path.mkdir()
            return f"{path.name} is an empty folder"
    elif how < 0.7:
        name = rng.choice(("metrics.jsonl", "samples.jsonl"))
        if (folder / name).is_file():
            return damage_json(rng, folder / name) if (folder / name).read_bytes().startswith(b"{") else "nothing"
        return "nothing"
    else:
        path = rng.choice(files)
    return f"{path.relative_to(folder)}: {damage(rng, path)[0]}"


def break_folders(rng: random.Random, folder: Path) -> str:
    """Damages the folder of checkpoints itself."""
    how = rng.choice(
        ("all gone", "newest gone", "oldest gone", "swapped", "strange name", "a file", "copy", "half renamed", "link")
    )
    steps = sorted(folder.glob("step-*"), key=lambda path: int(path.name.split("-")[1]))
    if how == "all gone" or not steps:
        shutil.rmtree(folder)
    elif how == "newest gone":
        shutil.rmtree(steps[-1])
    elif how == "oldest gone":
        shutil.rmtree(steps[0])
    elif how == "swapped":
        steps[0].rename(folder / "x")
        steps[-1].rename(steps[0]) if steps[-1] != steps[0] else None
        (folder / "x").rename(steps[-1])
    elif how == "strange name":
        steps[-1].rename(
            folder / rng.choice(("step-", "step-x", "step-99999999999999999999", "step--1", "step-0", "step-007"))
        )
    elif how == "a file":
        (folder / "step-999").write_text("a file")
    elif how == "copy":
        shutil.copytree(steps[-1], folder / "step-50")
    elif how == "half renamed":
        steps[-1].rename(folder / f".{steps[-1].name}.{rng.choice(('old', 'tmp'))}")
    else:
        steps[-1].rename(folder.parent / "elsewhere")
        steps[-1].symlink_to(os.path.relpath(folder.parent / "elsewhere", folder))
    return f"checkpoints: {how}"


def whole(folder: Path, command: str) -> str | None:
    """After success metrics and samples count every update once, and a policy is beside them."""
    metrics = folder / "metrics.jsonl"
    if command in ONLINE and metrics.is_file():
        steps = [json.loads(line)["step"] for line in metrics.read_text().rstrip("\n").split("\n")]
        if steps != [*range(1, len(steps) + 1)]:
            return f"metrics.jsonl has the steps {steps}"
        sampled = sorted(
            {json.loads(line)["step"] for line in (folder / "samples.jsonl").read_text().rstrip("\n").split("\n")}
        )
        if sampled != steps:
            return f"samples.jsonl has the steps {sampled} of {steps}"
        if json.loads((folder / "summary.json").read_text())["updates"] != len(steps):
            return f"summary.json counts other updates than the {len(steps)} of metrics.jsonl"
    for path in folder.glob("**/model*.safetensors"):
        if any(part == "earlier_run" or "damaged" in part for part in path.parts):  # moved as it was
            continue
        try:
            with safe_open(path, framework="pt") as tensors:
                if not tensors.keys():
                    return f"{path.name} is empty"
        except (SafetensorError, OSError) as error:
            return f"{path.relative_to(folder)} cannot be read: {error}"
    return None
