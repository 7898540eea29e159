"""Configuration files: YAML that is damaged, or holds values of another type than the flag's."""

import random
from typing import Any

import yaml

from fuzz.case import Case, Workshop
from fuzz.kinds.flags import base_command, is_long, types_of, value_for
from fuzz.kinds.mutations import VALUES, damage
from fuzz.world import OUT

# Texts that YAML reads as something else than they look like, or cannot read.
TEXTS = (
    *(
        "on",
        "1e-5",
        "0o17",
        "0b1",
        "1_000",
        "12:30:00",
        "2024-01-01",
        "2024-01-01 10:00:00",
        "~",
        ".nan",
        ".inf",
        "-.inf",
    ),
    *(
        "!!python/object:os.system {}",
        "!!python/name:os.system",
        "&a [*a]",
        "*unknown",
        "[1, 2]",
        "{a: 1}",
        "{1: 2}",
        "|",
        "> x",
    ),
    *(
        "'unclosed",
        '"\\x"',
        "@x",
        "%x",
        "? x",
        "!!set {a, b}",
        "!!binary aGk=",
        "!!int x",
        "!!timestamp x",
        "- 1",
        "a: b: c",
        "{",
        "]",
    ),
    *(
        "!!omap [a: 1]",
        "!!float abc",
        "!!bool perhaps",
        "<<: 3",
        "!local x",
        "\t1",
        "\u2028",
        "=",
        "!!python/tuple [1]",
        "{a: .nan}",
    ),
)


def make(shop: Workshop) -> Case:
    """A command with `--config`."""
    rng = shop.random
    shop.take("policy", "encoder", "pairs.jsonl", "prompts.jsonl", "rewards.py", "votes.jsonl")
    command = rng.choice(("reward", "dpo", "ppo", "rloo", "trpo", "loop"))
    argv, path = base_command(command), shop.folder / "config.yaml"
    flags = dict(word[2:].split("=", 1) for word in argv[1:] if "=" in word)
    taken = rng.sample([*flags], rng.randint(0, len(flags)))
    values: dict[str, Any] = {name: yaml.safe_load(flags[name]) for name in taken}
    kept = [word for word in argv if not (word.startswith("--") and word[2:].split("=")[0] in taken)]
    text, what, refused = changed(rng, command, values)
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    if rng.random() < 0.25:
        how, nothing_left = damage(rng, path)
        what = f"{what}, {how}"
        refused |= nothing_left and how.split(" is ")[1] not in ("empty", "only white space", "JSON null", "/dev/null")
    words = [*kept, f"--config={path.name}", OUT]
    return Case(
        words,
        f"{command}: {what}",
        ("out", "outputs", *map(str, values.values())),
        refused,
        seconds=30,
        endless=is_long([f"x={text}"]) or True,
    )


def changed(rng: random.Random, command: str, values: dict[str, Any]) -> tuple[str, str, bool]:
    """The text of the file, what is odd about it, and whether it must be refused."""
    types = types_of(command)
    name = rng.choice([*types])
    how = rng.choice(("text", "text", "value", "flag", "unknown", "twice", "list", "key", "anchor", "root", "itself"))
    if how == "text":
        odd = rng.choice(TEXTS)
        return f"{yaml.safe_dump(values) if values else ''}{name}: {odd}\n", f"{name}: {odd}", False
    if how == "value":
        odd = rng.choice(VALUES)
        return yaml.safe_dump({**values, name: odd}), f"{name} is {odd!r:.60}", False
    if how == "flag":
        odd, refused = value_for(rng, name, types[name])
        is_number = refused and odd.lower().strip("-") == "nan"
        return f"{yaml.safe_dump(values) if values else ''}{name}: {odd}\n", f"{name}: {odd}", is_number
    if how == "unknown":
        odd = rng.choice(("nothing", "learning-rate", "--seed", "config", "help", "1", "resume_"))
        return yaml.safe_dump({**values, odd: 1}), f"key {odd}", odd in ("nothing", "resume_")
    if how == "twice":
        return f"{name}: 1\n{yaml.safe_dump(values) if values else ''}{name}: 2\n", f"{name} twice", True
    if how == "list":
        return (
            yaml.safe_dump({**values, name: [1, 2]}),
            f"{name} is a list",
            "list" not in str(types[name]) and "str" not in str(types[name]),
        )
    if how == "key":
        odd = rng.choice(("1: 2", "null: 1", "true: 1", "[a]: 1", "{a: b}: 1", "2024-01-01: 1", "'': 1"))
        return f"{yaml.safe_dump(values) if values else ''}{odd}\n", f"key {odd}", True
    if how == "anchor":
        depth = rng.choice((3, 9))
        lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"] + [
            f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, depth)
        ]
        return "\n".join(lines) + "\n", "anchors of anchors", True
    if how == "root":
        odd = rng.choice(("- a\n- b\n", "word\n", "3\n", "null\n", "--- 1\n--- 2\n", "a: 1\n--- \nb: 2\n", "&a [*a]\n"))
        return odd, f"the file is {odd!r}", odd != "null\n"
    return f"config: {rng.choice(('config.yaml', 'other.yaml'))}\n", "it names a configuration file", True
