"""`deep-rlhf teach`: serves the labelling page and trains beside it: compare responses, and watch the model change.

This process serves the page, another one trains; they meet in the store. Without flags the model is the small policy of
the synthetic task, to which ten minutes of comparing teach a taste.
"""

import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from deep_rlhf.cli.flags import output_folder, parse_flags, save_config
from deep_rlhf.cli.loop_config import GUARDED, STORE_VARIABLE, LoopConfig, run_folder_errors
from deep_rlhf.cli.status_line import StatusLine
from deep_rlhf.errors import UserError
from deep_rlhf.feedback.state import STOP
from deep_rlhf.feedback.store import Store
from deep_rlhf.runtime.signals import signals_raise_stopped
from deep_rlhf.settings import setting

HOST = "127.0.0.1"
LOG = "loop.log"
SETTINGS = "config.yaml"
SECONDS_TO_SAVE = 60  # for the trainer, after Ctrl-C

console = Console(highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class TeachConfig(LoopConfig):
    """The settings of the loop and of the page. Raises ConfigError as LoopConfig does."""

    port: int = setting(8000, "port of the page on 127.0.0.1; 0 for a free one", least=0, most=65_535)


def main(argv: list[str] | None = None) -> None:
    """Serves the page and runs the trainer until Ctrl-C, SIGTERM or SIGHUP, which stop both."""
    (config,) = parse_flags(argv, TeachConfig, prog="deep-rlhf teach", description=__doc__.split("\n")[0])
    from deep_rlhf.web.app import WebSettings, create_app
    from deep_rlhf.web.server import Server

    folder = output_folder(config.output_dir)
    with signals_raise_stopped(), Store(config.store_address) as store:
        STOP.write(store, None)
        page = create_app(store, WebSettings(host=HOST, port=config.port))
        with Server(page, HOST, config.port) as server:
            status_line = StatusLine(store)
            trainer = _start_trainer(config, folder)
            try:
                _greet(server.url, config)
                with status_line:
                    _wait(trainer, folder)
            except KeyboardInterrupt:
                _stop(trainer)
                with suppress(OSError):  # the terminal may be closed
                    console.print(f"\nStopped and saved. To continue: [bold]{_command(config, folder)}[/bold]")
                    policy = f"The policy: {folder / 'model'}   " if (folder / "model").is_dir() else ""
                    console.print(f"{policy}The labels: {str(store).removeprefix('The store ')}", markup=False)
                raise
            finally:
                if trainer.poll() is None:
                    trainer.kill()
                    trainer.wait()


def _start_trainer(config: TeachConfig, folder: Path) -> subprocess.Popen[bytes]:
    """Starts `deep-rlhf loop` with the same settings; it saves and ends when this process does, even if killed."""
    loop = LoopConfig(**{name: getattr(config, name) for name in LoopConfig.__dataclass_fields__})
    values: dict[str, Any] = {"store": None, "output_dir": str(folder)}
    settings = folder / SETTINGS
    with run_folder_errors():
        save_config(settings, LoopConfig(**{**vars(loop), **values}))
        (folder / LOG).touch()
    with (folder / LOG).open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "deep_rlhf.cli.main", "loop", f"--config={settings}"],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env={**os.environ, STORE_VARIABLE: config.store_address, GUARDED: "1"},
            start_new_session=True,  # this process receives Ctrl-C and passes it on once
        )


def _wait(trainer: subprocess.Popen[bytes], folder: Path) -> None:
    """Serves the page until Ctrl-C, also when the trainer is done. Raises UserError if the trainer failed."""
    code = trainer.wait()
    if code != 0:
        raise UserError(f"The trainer {_ending(code, folder / LOG)} (Details are in '{folder / LOG}'.)")
    console.print(f"\nThe trainer is done; the policy: {folder / 'model'}. The page is served until Ctrl-C;")
    console.print("after that, the same command continues both.")
    threading.Event().wait()


def _ending(code: int, log: Path) -> str:
    """How the trainer ended: the signal that killed it, or the last line of its log."""
    if code < 0:
        guess = " (out of memory?)" if -code == signal.SIGKILL else ""
        return f"was killed by signal {-code}{guess}. The same command continues from its last checkpoint."
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return f"ended: {lines[-1].removeprefix('error: ') if lines else 'its log is empty.'}"


def _stop(trainer: subprocess.Popen[bytes]) -> None:
    if trainer.poll() is None:
        trainer.send_signal(signal.SIGINT)
        with suppress(OSError):  # the terminal may be closed
            console.print("\nStopping and saving the policy …")
        try:
            trainer.wait(SECONDS_TO_SAVE)
        except subprocess.TimeoutExpired:
            with suppress(OSError):
                console.print("Saving takes too long; the same command continues from the newest checkpoint.")


def _greet(address: str, config: TeachConfig) -> None:
    console.print(f"Open [bold]{address}[/bold] and compare responses: ← or → for the better one, ? for all keys.")
    if config.labeler == "web":
        console.print(
            f"After {config.initial_labels} labels the first reward model is fitted and the policy begins to learn;"
            " the second tab shows its progress. Choose one taste and keep to it: shorter responses, or polite ones."
        )
    console.print("Ctrl-C stops and saves; the same command continues.\n")


def _command(config: TeachConfig, folder: Path) -> str:
    """The shortest command that continues. A database address is left out, since it may contain a password."""
    flags = [] if vars(config) == vars(TeachConfig()) else [f"--config={folder / SETTINGS}"]
    if config.store:
        flags.append(f"--store={'…' if '://' in config.store else config.store}")
    return " ".join(["deep-rlhf teach", *flags])
