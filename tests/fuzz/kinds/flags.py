"""Flags of every command: values that cannot be meant, values of other types, unknown names, contradictions."""

import dataclasses
import math
import random
from importlib import import_module
from typing import Any, get_args, get_type_hints

from fuzz.case import Case, Workshop
from fuzz.world import DPO, LOOP, ONLINE, OUT, REWARD

NAN_VALUES = ("nan", "NaN", "-nan")
WORDS = (
    "",
    "abc",
    "1e",
    "--",
    "0x10",
    "1,5",
    "None",
    "null",
    "[]",
    "{}",
    "é",
    "\udcff",
    "1_000",
    "١",
    " ",
    "a\nb",
    "$HOME",
)
NUMBERS = (
    *("0", "-1", "1", "2", "-0.0", "0.5", "1e-30", "1e308", "1e309", "inf", "-inf", "-1e9", "2147483648"),
    *("9223372036854775808", "100000000000000000000", "1.5", "1e3"),
)
TRUTHS = ("True", "False", "maybe", "2", "")
# Flags that start compilers, servers or downloads, or whose large values are honest work without an end.
LEFT_OUT = {
    *("torch_compile", "torch_compile_backend", "torch_compile_mode", "jit_mode_eval", "tpu_metrics_debug"),
    *("debug", "use_mps_device", "tpu_num_cores", "host", "public_url"),
}
PATHS = ("output_dir", "config", "model_name", "query_dataset", "model_name_or_path", "dataset_name", "logging_dir")


def settings_of(command: str) -> list[type]:
    """The dataclasses whose fields are the flags of a command."""
    places = {
        "reward": [("cli.reward", "RewardArguments"), ("algorithms.supervised.reward", "RewardConfig")],
        "dpo": [("cli.dpo", "DPOArguments"), ("algorithms.supervised.dpo", "DPOConfig")],
        "loop": [("cli.loop_config", "LoopConfig")],
        "teach": [("cli.teach", "TeachConfig")],
        "label": [("cli.label", "LabelConfig")],
        "demo": [("cli.demo", "DemoConfig")],
        "ppo": [("algorithms.ppo", "PPOConfig")],
        "trpo": [("algorithms.trpo", "TRPOConfig")],
        "rloo": [("algorithms.rloo", "RLOOConfig")],
        "grpo": [("algorithms.grpo", "GRPOConfig")],
        "reinforce_plus_plus": [("algorithms.reinforce_plus_plus", "ReinforcePlusPlusConfig")],
    }
    return [getattr(import_module(f"deep_rlhf.{module}"), name) for module, name in places[command]]


def base_command(command: str) -> list[str]:
    """The smallest valid command line."""
    known = {**ONLINE, "reward": REWARD, "dpo": DPO, "loop": LOOP}
    return [*known.get(command, [command])]


def types_of(command: str) -> dict[str, Any]:
    """The type of every flag."""
    types: dict[str, Any] = {}
    for kind in settings_of(command):
        hints = get_type_hints(kind)
        types |= {field.name: hints[field.name] for field in dataclasses.fields(kind) if field.init}
    return {name: hint for name, hint in types.items() if name not in LEFT_OUT}


def value_for(rng: random.Random, name: str, hint: Any) -> tuple[str, bool]:
    """A value for a flag, and whether it must be refused."""
    kinds = {hint, *get_args(hint)}
    is_text = bool(kinds & {str, dict, list}) or any("dict" in str(kind) or "list" in str(kind) for kind in kinds)
    if bool in kinds and not is_text:
        value = rng.choice(TRUTHS)
        return value, value in ("maybe", "2")
    if kinds & {int, float} and not is_text:
        if rng.random() < 0.25:
            value = rng.choice(WORDS)
            return value, value not in ("1_000", "١", "None")
        if rng.random() < 0.25:
            return rng.choice(NAN_VALUES), True
        value = rng.choice(NUMBERS)
        return value, float not in kinds and not _is_whole(value)
    return rng.choice(
        (*WORDS, *NUMBERS, "true", "x" * 5000, '{"a": 1}', '{"a": NaN}', "/dev/null", "/proc/1/mem", "../..")
    ), False


def _is_whole(value: str) -> bool:
    try:
        int(value)
    except ValueError:
        return False
    return True


def make(shop: Workshop) -> Case:
    """One to three flags of a command with odd values, or flags that do not exist."""
    rng = shop.random
    weights = {"reward": 4, "dpo": 3, "ppo": 4, "loop": 2, "teach": 1, "label": 1, "plan": 2, "demo": 1, "store": 2}
    names = [*weights, "trpo", "rloo", "grpo", "reinforce_plus_plus"]
    command = rng.choices(names, [weights.get(name, 1) for name in names])[0]
    shop.take("policy", "encoder", "pairs.jsonl", "prompts.jsonl", "rewards.py", "votes.jsonl")
    if command == "store":
        return store_command(shop)
    planned = (
        rng.choice(("reward", "ppo", "rloo", "grpo", "reinforce_plus_plus", "trpo", "dpo", "x"))
        if command == "plan"
        else command
    )
    if planned == "x":
        return Case(
            ["plan", *rng.sample(["x", "--gpu=abc", "--gpu=-1GiB", "--gpu=nanGiB", "--", ""], 2)],
            "plan of nothing",
            refused=True,
        )
    argv, types = base_command(planned), types_of(planned)
    flags, must = [], False
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        name = rng.choice([*types])
        value, refused = value_for(rng, name, types[name])
        flags.append(rng.choice((f"--{name}={value}", f"--{name}={value}", f"--{name.replace('_', '-')}={value}")))
        must |= refused
    if rng.random() < 0.1:
        flags.append(
            rng.choice(("--nothing=1", "--learning_rat=1", "word", "-x", "--", "--=3", "--seed", "--resume=3"))
        )
    flags += [OUT] if command != "label" and not any(flag.startswith("--output") for flag in flags) else []
    what = f"{command} with {' '.join(flags)}"
    if command == "plan":
        return Case(["plan", *argv, *flags], what, refused=must and planned not in ("trpo", "dpo"))
    if command in ("teach", "label", "demo"):
        extra = ["--port=0", "--store=labels.db"] if command == "label" else ["--port=0"] if command == "teach" else []
        argv = [command, *extra, *flags]
        writes = ("out", "labels.db", "outputs", *paths_in(flags))
        return Case(argv, what, writes, refused=must, interrupt=6.0, seconds=40, endless=command == "demo")
    return Case(
        [*argv, *flags], what, ("out", "outputs", *paths_in(flags)), refused=must, seconds=30, endless=is_long(flags)
    )


def paths_in(flags: list[str]) -> list[str]:
    """Paths that flags name, where a command may write."""
    return [flag.split("=", 1)[1] for flag in flags if "dir" in flag.split("=")[0] or "store" in flag.split("=")[0]]


def is_long(flags: list[str]) -> bool:
    """Whether a flag asks for much work."""
    for flag in flags:
        value = flag.partition("=")[2]
        try:
            number = float(value)
        except ValueError:
            continue
        if math.isfinite(number) and number >= 1000:
            return True
    return False


def store_command(shop: Workshop) -> Case:
    """`deep-rlhf store` with the wrong words."""
    rng = shop.random
    shop.take("labels.db", "labels.jsonl", "labels.parquet")
    words = [
        "labels.db",
        "labels.jsonl",
        "labels.parquet",
        "nothing.db",
        "x.jsonl",
        "x.csv",
        "policy",
        "",
        "-",
        ".",
        "/dev/null",
    ]
    words += [
        "sqlite:///labels.db",
        "mysql://a:b@c/d",
        "postgresql://localhost:1/x",
        "postgresql://[::1",
        "sqlite://",
        "http://x",
    ]
    words += [
        "--all",
        "--all=maybe",
        "--template=plain",
        "--template=x",
        "--on_bad_rows=skip",
        "--x",
        "\udcff.db",
        "x" * 300,
    ]
    what = rng.choice(("show", "export", "import", "show", "list", ""))
    argv = ["store", what, *(rng.choice(words) for _ in range(rng.choice((0, 1, 2, 2, 2, 3))))]
    target = argv[2:3] if what == "import" else argv[3:4] if what == "export" else []
    writes = [name for name in target if name not in ("policy", ".", "", "-")] + ["x.jsonl", "sqlite:"]
    if what == "export":  # the file is what an export replaces
        writes += [name for name in argv[3:] if name in ("labels.jsonl", "labels.parquet")]
    writes += [name.removeprefix("sqlite:///") for name in target]
    return Case(argv, f"store {argv[1:]}", writes, seconds=40, refused=what in ("list", "") and len(argv) > 2)
