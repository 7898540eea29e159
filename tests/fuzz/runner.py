"""Runs cases in forked children of this process, which has imported everything and started no thread."""

import faulthandler
import fcntl
import gc
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

from fuzz import oracle, world
from fuzz.case import Case
from fuzz.oracle import Fault

MEMORY = 10 * 2**30  # bytes of addresses that a command may ask for
PIPE = 2**20  # bytes
IDLE = 15.0  # seconds after which a process that only waits hangs
BEFORE_KILL = 2.0  # seconds for the stacks of a process that hangs
IMPORTED = [
    *("deep_rlhf.cli.online", "deep_rlhf.cli.reward", "deep_rlhf.cli.dpo", "deep_rlhf.cli.plan", "deep_rlhf.cli.loop"),
    *("deep_rlhf.cli.store", "deep_rlhf.cli.label", "deep_rlhf.cli.teach", "deep_rlhf.cli.demo", "deep_rlhf.web.app"),
    *(
        "deep_rlhf.algorithms.ppo",
        "deep_rlhf.algorithms.trpo",
        "deep_rlhf.algorithms.rloo",
        "deep_rlhf.algorithms.grpo",
    ),
    *("deep_rlhf.algorithms.reinforce_plus_plus", "deep_rlhf.evaluation.report", "deep_rlhf.web.server"),
    *("matplotlib.figure", "peft", "transformers.models.gpt2.modeling_gpt2", "pyarrow.parquet"),
    *("transformers.models.distilbert.modeling_distilbert", "sqlalchemy.dialects.sqlite"),
]


@dataclass
class Child:
    """A process that runs, and what it has written."""

    pid: int
    act: Callable[[], None]
    pipes: tuple[int, int]
    started: float
    seconds: float
    interrupt: float | None = None
    interrupts: bool = False
    written: tuple[bytearray, bytearray] = field(default_factory=lambda: (bytearray(), bytearray()))
    code: int | None = None
    warned: float | None = None
    busy: tuple[float, float] = (0.0, 0.0)  # its seconds of computing, and since when it has computed no more

    def read(self) -> None:
        """Takes what is in the pipes."""
        for pipe, text in zip(self.pipes, self.written, strict=True):
            while True:
                try:
                    data = os.read(pipe, 2**16)
                except BlockingIOError:
                    break
                if not data:
                    break
                text += data

    def poll(self) -> bool:
        """Whether it has ended, which a process does that is over its time."""
        self.read()
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        now = time.monotonic()
        if pid:
            self.code = None if self.warned else os.waitstatus_to_exitcode(status)
            self.read()
            _kill(self.pid)  # what it has started
            for pipe in self.pipes:
                os.close(pipe)
            return True
        if self.interrupt is not None and now - self.started > self.interrupt:
            self.interrupt = None
            os.kill(self.pid, signal.SIGINT)
        if self.warned is None and (now - self.started > self.seconds or self._is_idle(now)):
            self.warned = now
            os.kill(self.pid, signal.SIGUSR1)  # it writes where it hangs
        elif self.warned is not None and now - self.warned > BEFORE_KILL:
            _kill(self.pid)
        return False

    def _is_idle(self, now: float) -> bool:
        """Whether it waits for something that never comes, as far as Linux tells."""
        if self.interrupts or sys.platform != "linux":
            return False
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        computed = (float(fields[11]) + float(fields[12])) / os.sysconf("SC_CLK_TCK")
        if fields[0] != "S" or computed > self.busy[0]:
            self.busy = (computed, now)
        return now - self.busy[1] > IDLE


def warm_up() -> None:
    """Imports what commands import, so that their processes need not."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.dont_write_bytecode = True
    for name in IMPORTED:
        import_module(name)
    import huggingface_hub.constants
    import torch

    huggingface_hub.constants.HF_HUB_OFFLINE = True
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    assert threading.active_count() == 1, "a forked process would lack the other threads"


def start(act: Callable[[], None], folder: Path, case: Case) -> Child:
    """Forks a process that calls `act` in `folder`."""
    out, err = os.pipe(), os.pipe()
    for pipe in (out, err):
        os.set_blocking(pipe[0], False)
        if hasattr(fcntl, "F_SETPIPE_SZ"):
            fcntl.fcntl(pipe[1], fcntl.F_SETPIPE_SZ, PIPE)
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        _in_child(act, folder, case, out[1], err[1])
    for pipe in (out, err):
        os.close(pipe[1])
    return Child(pid, act, (out[0], err[0]), time.monotonic(), case.seconds, case.interrupt, case.interrupt is not None)


def _in_child(act: Callable[[], None], folder: Path, case: Case, out: int, err: int) -> None:
    """The forked process: never returns."""
    code = 70
    try:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(os.open(case.stdout, os.O_WRONLY) if case.stdout else out, 1)
        os.dup2(err, 2)
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
        encoding = "ascii" if case.ascii_output else "utf-8"
        sys.stdout = open(1, "w", closefd=False, encoding=encoding)  # noqa: SIM115
        sys.stderr = open(2, "w", closefd=False, encoding=encoding, errors="backslashreplace", buffering=1)  # noqa: SIM115
        faulthandler.enable(sys.stderr)
        faulthandler.register(signal.SIGUSR1, sys.stderr)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _settle(folder, case)
        code = _ending(act)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _settle(folder: Path, case: Case) -> None:
    """The child's environment: everything that a command writes without being asked goes into the folder, too."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for name in ("home", "cache"):
        (folder / name).mkdir(exist_ok=True)
    for name in [name for name in os.environ if name.startswith(("WANDB", "DEEP_RLHF", "HF_TOKEN"))]:
        del os.environ[name]
    os.environ |= {
        "HOME": str(folder / "home"),
        "TMPDIR": str(folder / "cache"),
        "XDG_CACHE_HOME": str(folder / "home"),
    }
    os.environ |= {"COLUMNS": "200", **case.env}
    tempfile.tempdir = None
    os.chdir(folder)
    case.prepare()


def _ending(act: Callable[[], None]) -> int:
    """Calls `act` as the interpreter does; returns its exit code."""
    code = 0
    try:
        act()
    except SystemExit as stop:
        if isinstance(stop.code, str):
            sys.stderr.write(stop.code + "\n")
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 130 if isinstance(sys.exception(), KeyboardInterrupt) else 1
    threading._shutdown()  # type: ignore[attr-defined]
    try:
        sys.stdout.flush()
    except (OSError, ValueError) as error:
        sys.stderr.write(f"Exception ignored in sys.stdout: {error}\n")
        code = 120
    return code


def _kill(group: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def command(argv: list[str]) -> Callable[[], None]:
    """`deep-rlhf` with these arguments."""

    def act() -> None:
        from deep_rlhf.cli.main import main

        sys.argv = ["deep-rlhf", *argv]
        main()

    return act


def build_world(folder: Path, jobs: int, tell: Callable[[str], None]) -> None:
    """Builds the valid input of all cases in `folder`. Raises AssertionError if a step fails."""
    for steps in world.STEPS:
        waiting, running = list(steps.items()), dict[str, Child]()
        while waiting or running:
            while waiting and len(running) < jobs:
                name, act = waiting.pop(0)
                running[name] = start(act, folder, Case([], name, seconds=300))
            for name, child in list(running.items()):
                if child.poll():
                    del running[name]
                    allowed = (0, -signal.SIGKILL) if name.startswith("unfinished") else (0,)
                    assert child.code in allowed, f"{name} ended with {child.code}: {child.written[1].decode()}"
                    tell(f"built: {name} ({time.monotonic() - child.started:.1f} s)")
            time.sleep(0.005)
    for name in ("home", "cache"):
        shutil.rmtree(folder / name, ignore_errors=True)


def run_cases(
    cases: Iterator[tuple[str, Path, Case]], jobs: int, *, started: Callable[[str, Case], None] = lambda *_: None
) -> Iterator[tuple[str, Path, Case, list[Fault], str, float]]:
    """Runs cases, some at the same time; yields of each its name, folder, faults, what it wrote, and its seconds."""
    running: dict[str, tuple[Path, Case, dict[str, str], Child]] = {}
    exhausted = False
    while running or not exhausted:
        while not exhausted and len(running) < jobs:
            following = next(cases, None)
            if following is None:
                exhausted = True
                break
            name, folder, case = following
            started(name, case)
            before = oracle.contents(folder)
            running[name] = (folder, case, before, start(command(case.argv), folder, case))
        for name, (folder, case, before, child) in list(running.items()):
            if child.poll():
                del running[name]
                out, err = (text.decode("utf-8", "backslashreplace") for text in child.written)
                found = [*oracle.faults(case, folder, before, child.code, out, err)]
                yield name, folder, case, found, f"exit code {child.code}\n{out}{err}", time.monotonic() - child.started
        time.sleep(0.003)
