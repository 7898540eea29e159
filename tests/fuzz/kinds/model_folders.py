"""Folders of policies, base models and reward models: files damaged, settings of a wrong type, weights odd."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from fuzz.case import Case, Workshop
from fuzz.kinds.flags import base_command
from fuzz.kinds.mutations import LFS, damage, damage_json
from fuzz.world import FUNCTION, OUT, PAIRS, SAMPLING

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def make(shop: Workshop) -> Case:
    """A command that opens a damaged model; sometimes one that is right, with an odd name."""
    rng = shop.random
    shop.take("pairs.jsonl", "prompts.jsonl", "rewards.py", "votes.jsonl")
    command = rng.choice(
        ("ppo", "reward", "dpo", "rloo", "trpo", "scorer", "scorer", "plan", "loop", "reward of a policy")
    )
    model = {"reward": "encoder", "scorer": "reward"}.get(command, "policy")
    shop.take(*{model, "policy"})
    argv = {
        "scorer": ["ppo", *SAMPLING, "--reward_model=reward"],
        "plan": ["plan", "ppo", *SAMPLING, FUNCTION],
        "reward of a policy": ["reward", "--model_name_or_path=policy", *PAIRS],
    }.get(command) or base_command(command)
    if command == "plan" and rng.random() < 0.5:
        argv = ["plan", "reward", f"--model_name_or_path={model}"]
    folder = shop.folder / model
    if rng.random() < 0.06:
        return renamed(shop, [*argv, OUT], model)
    made = rng.choices([damaged_file, damaged_config, odd_weights, damaged_tokenizer, other_layout], (4, 5, 3, 2, 2))[0]
    what, refused = made(rng, folder)
    refused &= command != "plan"
    return Case([*argv, OUT], f"{command}: {what}", refused=refused)


def damaged_file(rng: random.Random, folder: Path) -> tuple[str, bool]:
    """One file of the folder, which is still needed if it is one of the three that every model has."""
    needed = [WEIGHTS, CONFIG, "tokenizer.json"]
    names = sorted(
        path.name for path in folder.iterdir() if path.is_file() and path.suffix in (".json", ".safetensors")
    )
    name = rng.choice([*needed, WEIGHTS, *names])
    how, nothing_left = damage(rng, folder / name)
    return how, nothing_left and name in needed


def damaged_config(rng: random.Random, folder: Path) -> tuple[str, bool]:
    """Values of a JSON file."""
    names = [
        path.name
        for path in folder.iterdir()
        if path.suffix == ".json" and path.name not in ("tokenizer.json", "summary.json")
    ]
    name = rng.choice([CONFIG, CONFIG, CONFIG, *sorted(names)])
    return damage_json(rng, folder / name), False


def damaged_tokenizer(rng: random.Random, folder: Path) -> tuple[str, bool]:
    """Values of the tokenizer."""
    return damage_json(rng, folder / rng.choice(("tokenizer.json", "tokenizer_config.json"))), False


def odd_weights(rng: random.Random, folder: Path) -> tuple[str, bool]:
    """Weights that are whole, but cannot be right."""
    path = folder / WEIGHTS
    tensors = load_file(path)
    names = [name for name, tensor in tensors.items() if tensor.is_floating_point()]
    name = rng.choice(names)
    changes: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], bool]] = {
        "NaN": (lambda tensor: tensor * float("nan"), True),
        "one NaN": (lambda tensor: tensor.flatten().index_fill(0, torch.tensor(0), float("nan")).view_as(tensor), True),
        "infinite": (lambda tensor: tensor + float("inf"), True),
        "1e38": (lambda tensor: tensor + 1e38, False),
        "zero": (torch.zeros_like, False),
        "of another shape": (lambda tensor: torch.cat([tensor, tensor]), True),
        "a row short": (lambda tensor: tensor[:-1].contiguous(), True),
        "flat": (lambda tensor: tensor.flatten().contiguous(), tensors[name].dim() > 1),
        "integers": (lambda tensor: tensor.mul(100).to(torch.int8), False),
        "float16": (lambda tensor: tensor.half(), False),
        "empty": (lambda tensor: tensor[:0].contiguous(), True),
    }
    how = rng.choice([*changes, "left out", "renamed", "all left out", "without the format"])
    head = name.startswith(("lm_head", "classifier", "score", "pre_classifier", "vocab_"))
    if how in changes:
        change, refused = changes[how]
        tensors[name] = change(tensors[name])
    elif how == "left out":
        del tensors[name]
        refused = not head
    elif how == "renamed":
        tensors[f"x.{name}"] = tensors.pop(name)
        refused = not head
    elif how == "all left out":
        tensors, refused = {"x": torch.zeros(1)}, True
    else:
        refused = False
    save_file(tensors, path, metadata=None if how == "without the format" else {"format": "pt"})
    return f"{path.name}: {name} is {how}", refused and not head


def other_layout(rng: random.Random, folder: Path) -> tuple[str, bool]:
    """Files that stand for other ones: pickles, shards, several formats, no folder at all."""
    how = rng.choice(
        (
            "pickle",
            "damaged pickle",
            "shards",
            "lost shard",
            "bad index",
            "file",
            "empty",
            "weights only",
            "no weights",
            "layers",
            "vocabulary",
        )
    )
    weights = folder / WEIGHTS
    if how in ("pickle", "damaged pickle"):
        torch.save(load_file(weights), folder / "pytorch_model.bin")
        weights.unlink()
        if how == "pickle":
            return how, False
        (folder / "pytorch_model.bin").write_bytes(
            rng.choice((b"", LFS.encode(), rng.randbytes(1000), b"cos\nsystem\n(S'x'\ntR."))
        )
        return how, True
    if how in ("shards", "lost shard", "bad index"):
        tensors = load_file(weights)
        weights.unlink()
        names = sorted(tensors)
        for i, part in enumerate((names[::2], names[1::2]), 1):
            save_file(
                {name: tensors[name] for name in part},
                folder / f"model-0000{i}-of-00002.safetensors",
                metadata={"format": "pt"},
            )
        places = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {"total_size": 1}, "weight_map": places})
        )
        if how == "lost shard":
            (folder / "model-00002-of-00002.safetensors").unlink()
        elif how == "bad index":
            return damage_json(rng, folder / "model.safetensors.index.json"), False
        return how, how == "lost shard"
    if how == "file":
        shutil.rmtree(folder)
        folder.write_text("a file")
        return "the model is a file", True
    if how == "empty":
        shutil.rmtree(folder)
        folder.mkdir()
        return "the model is an empty folder", True
    if how in ("weights only", "no weights"):
        for path in folder.iterdir():
            if path.is_file() and (path.name == WEIGHTS) == (how == "no weights"):
                path.unlink()
        return how, True
    settings = json.loads((folder / CONFIG).read_text())
    if how == "layers":
        name = next(name for name in ("n_layer", "n_layers", "num_hidden_layers") if name in settings)
        settings[name] += rng.choice((-1, 1))
    else:
        settings["vocab_size"] += rng.choice((-400, -1, 1))
    (folder / CONFIG).write_text(json.dumps(settings))
    return f"{how} other than the weights'", True


def renamed(shop: Workshop, argv: list[str], model: str) -> Case:
    """A right model under a name that libraries may stumble over."""
    name = shop.random.choice(
        ("ü", "a b", "a,b=c", "%s{x}", "[bold]m", "'quoted'", "-x", "a" * 200, "x.gguf", "\udcff")
    )
    (shop.folder / model).rename(shop.folder / name)
    argv = [word.replace(f"={model}", f"=./{name}") for word in argv]
    return Case(argv, f"the model is called {name}")
