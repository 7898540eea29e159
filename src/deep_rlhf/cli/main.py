"""The console script `deep-rlhf`: runs one command, and turns its errors into one line and an exit code."""

import logging
import os
import signal
import sys
from importlib import import_module

from deep_rlhf import __version__
from deep_rlhf.cli.commands import ALGORITHMS, COMMANDS
from deep_rlhf.cli.console import lasting_output, silence_libraries
from deep_rlhf.errors import ConfigError, UserError, one_line
from deep_rlhf.extras import optional_packages
from deep_rlhf.runtime.signals import Stopped


def main() -> None:
    """Entry point of the console script."""
    command, *argv = sys.argv[1:] or ["--help"]
    run(command, argv)


def run(command: str, argv: list[str] | None = None) -> None:
    """Runs one command with the given arguments (default: those of the process).

    Exits with code 2 and one line on stderr after a UserError, and with code 130 after Ctrl-C, or 128 + n after
    another signal n that the run was stopped and saved by.
    """
    code = 0
    with lasting_output() as output:
        try:
            _run(command, argv)
            output.check()
        except UserError as error:
            sys.stderr.write(f"error: {one_line(error)}\n")  # what a flag or a file says may have line breaks
            code = 2
        except KeyboardInterrupt as stop:
            sys.stderr.write("stopped\n")
            code = 128 + (stop.number if isinstance(stop, Stopped) else signal.SIGINT)
    if code:
        sys.exit(code)


def _run(command: str, argv: list[str] | None) -> None:
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    is_main_process = os.environ.get("RANK", "0") == "0"
    logging.getLogger("deep_rlhf").setLevel(logging.INFO if is_main_process else logging.ERROR)
    if command in ("--version", "-V"):
        sys.stdout.write(f"deep-rlhf {__version__}\n")
        return
    if command in ("--help", "-h"):
        lines = [f"  {name:<21}{description}" for name, description in COMMANDS.items()]
        sys.stdout.write(
            "\n".join(["usage: deep-rlhf COMMAND [--flags]", "", *lines, "", "deep-rlhf COMMAND --help\n"])
        )
        return
    if command not in COMMANDS:
        raise ConfigError(f"There is no command '{command}': choose one of {', '.join(COMMANDS)}.")
    silence_libraries()
    with optional_packages(f"deep-rlhf {command}"):
        if command in ALGORITHMS:
            import_module("deep_rlhf.cli.online").main(command, argv)
        else:
            import_module(f"deep_rlhf.cli.{command}").main(argv)
    if "WORLD_SIZE" in os.environ:
        import_module("deep_rlhf.runtime.processes").leave_processes()


if __name__ == "__main__":
    main()
