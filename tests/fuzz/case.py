"""One case: a command line in a folder whose content has been damaged, and what may come of it."""

import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Case:
    """A command of `deep-rlhf`, run in a folder of its own.

    `writes` are the paths, relative to the folder, that the command may change or create, and `replaces` those that it
    may change if it succeeds. A case that is `refused` must
    not end with exit code 0. `prepare` is called in the process before the command. After `interrupt` seconds the
    process receives SIGINT. `seconds` is the limit of time; a case that may be `endless` has a right to reach it.
    """

    argv: list[str]
    what: str
    writes: Sequence[str] = ("out",)
    replaces: Sequence[str] = ()
    refused: bool = False
    env: dict[str, str] = field(default_factory=dict)
    prepare: Callable[[], None] = lambda: None
    interrupt: float | None = None
    seconds: float = 60.0
    endless: bool = False
    ascii_output: bool = False
    stdout: str | None = None  # a file in place of the pipe, such as /dev/full
    check: Callable[[Path], str | None] = lambda folder: None  # after exit code 0; returns what is wrong


@dataclass
class Workshop:
    """What a kind of case is made with: random numbers, the folder of the case, and the valid input to copy from."""

    random: random.Random
    folder: Path
    world: Path

    def take(self, *names: str) -> None:
        """Copies files and folders of the valid input into the folder of the case."""
        for name in names:
            source, target = self.world / name, self.folder / name
            if source.is_dir():
                shutil.copytree(source, target, symlinks=True)
            else:
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, target)
