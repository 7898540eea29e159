"""Commands that are killed, interrupted or refused disk space for real, and resumed; each in a process of its own."""

import os
import resource
import shutil
import signal
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub.constants
import processes
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from deep_rlhf.cli.main import run


class Run(NamedTuple):
    """A command, what stops it, how it ends then, what happens before it is resumed, and flags of the first try."""

    command: list[str]
    stop: Callable[[], Any] = lambda: None
    ending: int = -signal.SIGKILL
    before_resume: Callable[[Path], Any] = lambda folder: None
    flags: tuple[str, ...] = ()


class Runs:
    """The runs of a module in one folder, each made when it is first asked for.

    `runs` maps names to what stops them, `whole` names to the commands that nothing stops. `module` is the name of the
    module that has both as RUNS and WHOLE: the processes find there what does not travel between processes.
    """

    def __init__(self, folder: Path, module: str, runs: dict[str, Run], whole: dict[str, list[str]]) -> None:
        self.folder, self.module, self.runs, self.commands = folder, module, runs, whole
        self.whole, self.stopped, self.resumed = cache(self._whole), cache(self._stopped), cache(self._resumed)

    def log(self, name: str) -> str:
        """What both processes of a run wrote."""
        self.resumed(name)
        return self._log(name).read_text()

    def _log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def _process(self, act: Callable[..., None], name: str) -> int:
        return processes.run(act, self.module, name, self.folder, log=self._log(name))

    def _whole(self, name: str) -> Path:
        """The folder of a run that nothing stopped."""
        assert self._process(run_whole, name) == 0, self._log(name).read_text()
        return self.folder / name

    def _stopped(self, name: str) -> Path:
        """A copy of what a run left when it was stopped."""
        ending = self._process(run_until_stopped, name)
        assert ending == self.runs[name].ending, self._log(name).read_text()
        return Path(shutil.copytree(self.folder / name, self.folder / f"{name}, stopped"))

    def _resumed(self, name: str) -> Path:
        """The folder of a run that was stopped and then resumed until its end."""
        self.stopped(name)
        self.runs[name].before_resume(self.folder / name)
        assert self._process(run_resumed, name) == 0, self._log(name).read_text()
        return self.folder / name


# ---- in the processes


def run_whole(module: str, name: str, folder: Path) -> None:
    """The command of this name, until its end."""
    _run(import_module(module).WHOLE[name], name, folder)


def run_until_stopped(module: str, name: str, folder: Path) -> None:
    """The command of the run of this name, until what stops it."""
    run_: Run = import_module(module).RUNS[name]
    run_.stop()
    _run([*run_.command, *run_.flags], name, folder)


def run_resumed(module: str, name: str, folder: Path) -> None:
    """The command of the run of this name with --resume."""
    _run([*import_module(module).RUNS[name].command, "--resume"], name, folder)


def _run(command: list[str], name: str, folder: Path) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    os.environ["HF_HUB_OFFLINE"] = "1"
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    torch.set_num_threads(1)
    os.chdir(folder)
    run(command[0], [*command[1:], f"--output_dir={name}"])


# ---- what stops them


def kill() -> None:
    """The process dies at once."""
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt() -> None:
    """Ctrl-C."""
    os.kill(os.getpid(), signal.SIGINT)


def terminate() -> None:
    """A scheduler ends the process."""
    os.kill(os.getpid(), signal.SIGTERM)


def hang_up() -> None:
    """The terminal is closed."""
    os.kill(os.getpid(), signal.SIGHUP)


def flip_bit(path: Path, place: int) -> None:
    """One bit of a file changes."""
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


def at_update(number: int, act: Callable[[], Any] = kill) -> None:
    """`act` just before the weights change for the `number`-th time."""
    updates = iter(range(1, 1000))
    register_optimizer_step_pre_hook(lambda *_: act() if next(updates) == number else None)


def limit_files(update: int, size: int) -> None:
    """From the `update`-th update on the kernel refuses to write beyond `size` bytes of a file."""
    at_update(update, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))
