"""`deep-rlhf plan COMMAND`: the memory that a command needs, before anything is loaded, and flags that reduce it."""

import shlex
import sys
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module

from rich.console import Console
from rich.table import Table

from deep_rlhf.cli.flags import parse_flags
from deep_rlhf.errors import ConfigError, ModelError, UserError
from deep_rlhf.models.load import load_config
from deep_rlhf.planning.memory_plan import GIB, GPUS, Machine, MemoryPlan, gpu_of, this_machine
from deep_rlhf.runtime.memory import resident_peak

PLANNED = ("reward", "ppo", "rloo", "grpo", "reinforce_plus_plus")
CARDS = ", ".join(gpu.name for gpu in GPUS.values())
USAGE = f"""usage: deep-rlhf plan COMMAND [--flags of COMMAND] [--gpu=CARD]

COMMAND: {", ".join(PLANNED)}.
CARD: {CARDS}, or a size such as 24GiB. Default: the CPU and main memory of this machine.

Prints the memory of each part of a run, and the flags that make it fit.
"""

# Bytes of a process on a CPU beyond its imports (tokenizers, data, threads, freed memory that the allocator keeps),
# measured on runs of docs/memory.md; and bytes of CUDA on a GPU.
CPU_OVERHEAD, CUDA_OVERHEAD = 170 * 10**6, 600 * 10**6

Flags = tuple[str, ...]
Planner = Callable[[Flags], MemoryPlan]


def main(argv: list[str] | None = None) -> None:
    """Prints the plan, and flags that make the run fit. Raises ConfigError or ModelError for invalid input."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        sys.stdout.write(USAGE)
        return
    command, machine, flags = _split(argv)
    planner = cache(_reward_planner(machine) if command == "reward" else _online_planner(command, machine))
    plan = planner(flags)
    console = Console(highlight=False)
    console.print(_table(plan, f"deep-rlhf {command}"))
    room = f"{machine.name} ({_gib(machine.memory)} GiB)"
    console.print(f"Peak: {_gib(plan.peak)} GiB, in {plan.largest.name}.")
    if plan.peak <= machine.memory:
        console.print(f"It fits in {room}.")
        return
    with console.status("Looking for settings that make it fit …"):
        added = advice(planner, flags, ladders(command, machine), machine.memory)
    least = planner(flags + added).peak
    if least <= machine.memory:
        console.print(f"It does not fit in {room}. With these flags it needs {_gib(least)} GiB and fits:")
    else:
        console.print(
            f"It does not fit in {room}: the smallest peak is {_gib(least)} GiB, with these flags:"
            if added
            else f"It does not fit in {room}, and no setting makes it smaller: use a smaller model."
        )
    if added:
        console.print(shlex.join(added), soft_wrap=True)


def ladders(command: str, machine: Machine) -> Iterator[list[str]]:
    """The ways to save memory, cheapest first; each is a list of flags of growing effect, of which one is used."""
    if machine.has_bf16:
        yield ["--precision=bf16"]
    yield ["--gradient_checkpointing=True"]
    if command == "reward":
        yield [f"--per_device_train_batch_size={size}" for size in (8, 2, 1)]
    else:
        yield [f"--forward_batch_size={size}" for size in (16, 4, 1)]
        yield ["--frozen_precision=bf16"]
        if machine.is_gpu:
            yield ["--frozen_device=cpu"]
        yield ["--optimizer=adamw_8bit"]
    if command == "ppo":
        yield ["--critic=shared"]
    yield ["--use_peft=True"]
    if command == "reward":
        yield [f"--max_length={length}" for length in (256, 128)]
    else:
        yield ["--load_in_4bit=True"]
        yield [f"--max_prompt_length={length}" for length in (256, 128)]
        yield [f"--max_new_tokens={length}" for length in (64, 32)]


def advice(planner: Planner, flags: Flags, steps: Iterator[list[str]], memory: int) -> Flags:
    """The fewest flags with which a run fits in `memory` bytes; all that help if it never fits."""
    added: Flags = ()
    for ladder in steps:
        for flag in ladder:
            best = _peak(planner, flags + added)
            if best <= memory:
                break
            others = tuple(other for other in added if other not in ladder)
            if _peak(planner, (*flags, *others, flag)) < best:
                added = (*others, flag)
    if _peak(planner, flags + added) <= memory:
        for flag in added:
            others = tuple(other for other in added if other != flag)
            if _peak(planner, flags + others) <= memory:
                added = others
    return added


def _peak(planner: Planner, flags: Flags) -> float:
    """The peak of a plan in bytes; infinite for flags that contradict each other."""
    try:
        return planner(flags).peak
    except UserError:
        return float("inf")


def _split(argv: list[str]) -> tuple[str, Machine, Flags]:
    command, *rest = argv
    if command not in PLANNED:
        raise ConfigError(f"There is no plan for '{command}': give one of {', '.join(PLANNED)}.")
    machine, flags = this_machine(), []
    words = iter(rest)
    for word in words:
        name, equals, value = word.partition("=")
        if name != "--gpu":
            flags.append(word)
        elif given := value if equals else next(words, ""):
            machine = gpu_of(given)
        else:
            raise ConfigError("--gpu needs a card or a size, such as --gpu=24GiB.")
    return command, machine, tuple(flags)


def _online_planner(command: str, machine: Machine) -> Planner:
    baseline = _baseline("deep_rlhf.cli.online", machine)
    from deep_rlhf.cli.online import algorithm
    from deep_rlhf.planning.online import plan_online

    config_class, _ = algorithm(command)

    def plan(flags: Flags) -> MemoryPlan:
        (config,) = parse_flags(list(flags), config_class, prog=f"deep-rlhf plan {command}", description=__doc__)
        trusted = {"trust_remote_code": config.trust_remote_code}
        policy = load_config(config.model_name, "configuration of --model_name", **trusted)
        is_function = config.reward_model.startswith("python:")
        reward = None if is_function else load_config(config.reward_model, "configuration of --reward_model", **trusted)
        return _model_errors(config.model_name, lambda: plan_online(config, policy, reward, machine, baseline=baseline))

    return plan


def _reward_planner(machine: Machine) -> Planner:
    baseline = _baseline("deep_rlhf.cli.reward", machine)
    from deep_rlhf.algorithms.supervised.reward import RewardConfig
    from deep_rlhf.cli.reward import RewardArguments
    from deep_rlhf.planning.reward import plan_reward

    def plan(flags: Flags) -> MemoryPlan:
        arguments, config = parse_flags(
            list(flags), RewardArguments, RewardConfig, prog="deep-rlhf plan reward", description=__doc__
        )
        name, trusted = arguments.model_name_or_path, {"trust_remote_code": arguments.trust_remote_code}
        model = load_config(name, "configuration of --model_name_or_path", **trusted)
        return _model_errors(name, lambda: plan_reward(config, model, machine, baseline=baseline, **trusted))

    return plan


def _baseline(module: str, machine: Machine) -> int:
    """The bytes of a process that has imported the command's module, as this one now has; on a GPU those of CUDA."""
    import_module(module)
    return CUDA_OVERHEAD if machine.is_gpu else resident_peak() + CPU_OVERHEAD


def _model_errors(name: str, plan: Callable[[], MemoryPlan]) -> MemoryPlan:
    """Calls `plan`. Raises ModelError for an architecture that the command cannot train."""
    try:
        return plan()
    except ConfigError:
        raise
    except ValueError as error:
        raise ModelError(f"The architecture of '{name}' is not one that this command trains: give another.") from error


def _table(plan: MemoryPlan, title: str) -> Table:
    table = Table(title=f"{title}, GiB", title_justify="left")
    table.add_column("")
    for phase in plan.phases:
        table.add_column(phase.name, justify="right")
    for part in plan.parts:
        table.add_row(part, *(_gib(phase.parts.get(part, 0)) for phase in plan.phases))
    table.add_section()
    table.add_row("total", *(_gib(phase.total) for phase in plan.phases), style="bold")
    return table


def _gib(amount: float) -> str:
    return f"{amount / GIB:.2f}" if amount else ""
