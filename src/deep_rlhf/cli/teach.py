"""`deep-rlhf teach`: one command, one page: compare answers, and watch the model change.

The page is served by this process and the trainer runs in another one beside it; they meet in the store. Without flags
it is about the small policy of the embedded world, and ten minutes of comparing teach it a taste.
"""

import os
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from deep_rlhf.cli.flags import output_folder, parse_flags, save_config
from deep_rlhf.cli.loop_config import GUARDED, STORE_VARIABLE, LoopConfig
from deep_rlhf.cli.loop_progress import Progress
from deep_rlhf.errors import UserError
from deep_rlhf.feedback.state import STOP
from deep_rlhf.feedback.store import Store

HOST = "127.0.0.1"
LOG = "loop.log"
SETTINGS = "config.yaml"
SECONDS_TO_SAVE = 60  # that the trainer gets after Ctrl-C

console = Console(highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class TeachConfig(LoopConfig):
    """The flags of the loop, and the page's. Raises UserError for a value that cannot work."""

    port: int = field(default=8000, metadata={"help": "of the page on 127.0.0.1; 0 takes a free one"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.port < 65_536:
            raise UserError(f"port must lie between 0 and 65535, not {self.port}.")


def main(argv: list[str] | None = None) -> None:
    """Serves the page and runs the trainer until Ctrl-C, which stops both."""
    (config,) = parse_flags(argv, TeachConfig, prog="deep-rlhf teach", description=__doc__.split("\n")[0])
    from deep_rlhf.web.app import WebSettings, create_app
    from deep_rlhf.web.server import Server

    folder = output_folder(config.output_dir)
    with Store(config.store_address) as store:
        STOP.write(store, None)
        page = create_app(store, WebSettings(host=HOST, port=config.port))
        with Server(page, HOST, config.port) as server:
            progress = Progress(store)
            trainer = _start_trainer(config, folder)
            try:
                _greet(server.url, config)
                with progress:
                    _watch(trainer, folder)
            except KeyboardInterrupt:
                _stop(trainer)
                console.print(f"\nStopped and saved. To go on: [bold]{_command(config, folder)}[/bold]")
                policy = f"The policy: {folder / 'model'}   " if (folder / "model").is_dir() else ""
                console.print(f"{policy}The answers: {str(store).removeprefix('The store ')}", markup=False)
                raise
            finally:
                if trainer.poll() is None:
                    trainer.kill()
                    trainer.wait()


def _start_trainer(config: TeachConfig, folder: Path) -> subprocess.Popen[bytes]:
    """`deep-rlhf loop` with the same flags; it ends, saved, when this process does, however that comes about."""
    loop = LoopConfig(**{name: getattr(config, name) for name in LoopConfig.__dataclass_fields__})
    values: dict[str, Any] = {"store": None, "output_dir": str(folder)}
    settings = folder / SETTINGS
    save_config(settings, LoopConfig(**{**vars(loop), **values}))
    with (folder / LOG).open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "deep_rlhf.cli.main", "loop", f"--config={settings}"],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env={**os.environ, STORE_VARIABLE: config.store_address, GUARDED: "1"},
            start_new_session=True,  # Ctrl-C comes to this process, which passes it on once
        )


def _watch(trainer: subprocess.Popen[bytes], folder: Path) -> None:
    """Never returns: the page outlives a trainer that is done. Raises UserError if the trainer failed."""
    code = trainer.wait()
    if code != 0:
        raise UserError(f"The trainer {_ending(code, folder / LOG)} ('{folder / LOG}' has all of it.)")
    console.print(
        f"\nThe trainer is done; the policy: {folder / 'model'}. The page goes on until Ctrl-C; then the same"
    )
    console.print("command goes on with both.")
    threading.Event().wait()


def _ending(code: int, log: Path) -> str:
    """In the trainer's own last words, unless a signal left it none."""
    if code < 0:
        guess = " (is there too little memory?)" if -code == signal.SIGKILL else ""
        return f"was killed by signal {-code}{guess}. The same command goes on from its last checkpoint."
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return f"ended: {lines[-1].removeprefix('error: ') if lines else 'it said nothing.'}"


def _stop(trainer: subprocess.Popen[bytes]) -> None:
    if trainer.poll() is None:
        console.print("\nStopping; the policy is being saved …")
        trainer.send_signal(signal.SIGINT)
        try:
            trainer.wait(SECONDS_TO_SAVE)
        except subprocess.TimeoutExpired:
            console.print("It takes too long: the newest checkpoint is where it goes on.")


def _greet(address: str, config: TeachConfig) -> None:
    console.print(f"Open [bold]{address}[/bold] and compare answers: ← or → for the better one, ? for all keys.")
    if config.labeler == "web":
        console.print(
            f"After {config.initial_labels} answers the first reward model is fitted, and the policy begins to learn;"
            " the second tab shows it. Think of one taste and keep to it: shorter answers, or polite ones."
        )
    console.print("Ctrl-C stops and saves; the same command goes on.\n")


def _command(config: TeachConfig, folder: Path) -> str:
    """The shortest command that goes on. The address of a database stays unsaid: there may be a password in it."""
    flags = [] if vars(config) == vars(TeachConfig()) else [f"--config={folder / SETTINGS}"]
    if config.store:
        flags.append(f"--store={'…' if '://' in config.store else config.store}")
    return " ".join(["deep-rlhf teach", *flags])
