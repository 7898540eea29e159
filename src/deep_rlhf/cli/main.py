"""`deep-rlhf COMMAND`: the commands, and what happens when one fails."""

import logging
import os
import sys
from importlib import import_module

from deep_rlhf import __version__
from deep_rlhf.errors import UserError

COMMANDS = {
    "demo": "the whole way in a few minutes, in an embedded world: no network, no GPU",
    "teach": "compare answers in the browser while a small model learns from them",
    "label": "only the page of teach, for one person or many",
    "loop": "only the trainer of teach, on the same store",
    "store": "labels: what is in a store, export and import",
    "reward": "train a reward model on preferences (also: python reward_modeling.py)",
    "ppo": "tune a policy against a reward (also: python ppo.py)",
    "trpo": "the same by trust region policy optimisation",
    "rloo": "the same by REINFORCE with leave-one-out baselines: no critic",
    "grpo": "the same by group relative policy optimisation: no critic",
    "reinforce_plus_plus": "the same by REINFORCE++: neither critic nor groups",
    "dpo": "tune a policy on preferences directly: no reward model, no sampling",
    "plan": "the memory that a command would take, before anything is loaded",
}
# Commands that share one module, and how the classes of their algorithms are called.
ALGORITHMS = {"ppo": "PPO", "trpo": "TRPO", "rloo": "RLOO", "grpo": "GRPO", "reinforce_plus_plus": "ReinforcePlusPlus"}


def main() -> None:
    """Entry point of the console script."""
    arguments = sys.argv[1:]
    if arguments[:1] in (["--version"], ["-V"]):
        sys.stdout.write(f"deep-rlhf {__version__}\n")
    elif not arguments or arguments[0] in ("-h", "--help"):
        lines = [f"  {name:<21}{what}" for name, what in COMMANDS.items()]
        sys.stdout.write(
            "\n".join(["usage: deep-rlhf COMMAND [--flags]", "", *lines, "", "deep-rlhf COMMAND --help\n"])
        )
    else:
        run(arguments[0], arguments[1:])


def run(command: str, argv: list[str] | None = None) -> None:
    """Runs one command with the given arguments, sys.argv's by default. A user's mistake is one sentence and exit 2."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    is_main_process = os.environ.get("RANK", "0") == "0"
    logging.getLogger("deep_rlhf").setLevel(logging.INFO if is_main_process else logging.ERROR)
    try:
        if command not in COMMANDS:
            raise UserError(f"There is no command '{command}': choose one of {', '.join(COMMANDS)}.")
        import_module("deep_rlhf.cli.console").calm_libraries()
        if command in ALGORITHMS:
            import_module("deep_rlhf.cli.online").main(command, argv)
        else:
            import_module(f"deep_rlhf.cli.{command}").main(argv)
        if "WORLD_SIZE" in os.environ:
            import_module("deep_rlhf.runtime.processes").leave_processes()
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write("stopped\n")
        sys.exit(130)


if __name__ == "__main__":
    main()
