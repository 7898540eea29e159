"""The kinds of cases, and how a seed makes a case."""

import random
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

from fuzz.case import Case, Workshop

# The module of each kind, and how often it is chosen.
KINDS = {
    "flags": 4,
    "yaml_files": 2,
    "data_files": 4,
    "model_folders": 5,
    "reward_functions": 3,
    "checkpoints": 4,
    "stores": 4,
    "exports": 2,
    "environments": 2,
    "full_disks": 2,
}


def make_case(seed: int, number: int, folder: Path, world: Path) -> Case:
    """The case of a seed and a number, in a new folder."""
    kind, rng = draw(seed, number)
    folder.mkdir(parents=True)
    make: Callable[[Workshop], Case] = import_module(f"fuzz.kinds.{kind}").make
    return make(Workshop(rng, folder, world))


def draw(seed: int, number: int) -> tuple[str, random.Random]:
    """The kind of a case, and the generator that it is made with."""
    rng = random.Random(f"{seed}:{number}")
    return rng.choices([*KINDS], [*KINDS.values()])[0], rng


def numbers_of(seed: int, count: int, kinds: frozenset[str]) -> Iterator[int]:
    """The first `count` numbers of cases of these kinds."""
    number = 0
    while count:
        if draw(seed, number)[0] in kinds:
            yield number
            count -= 1
        number += 1
